"""Low-rank factorisation: the factors compute what they stand for, cost what is planned, and lose what they may."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers as L

import compress
from compress.errors import ModelError, UsageError
from compress.low_rank.decompositions import factors_of, rebuild, spectrum_of
from compress.low_rank.factorizing import factorize
from compress.targets.files import FileCosts


def randomise(model: keras.Model, seed: int = 0) -> keras.Model:
    generator = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(generator.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean", "bias"):
            variable.assign(generator.normal(0, 0.3, variable.shape))
    return model


def image_net(**options) -> keras.Model:
    x = keras.Input((12, 10, 4))
    y = L.Conv2D(16, **{"kernel_size": 3, "padding": "same", "activation": "relu", "name": "conv", **options})(x)
    y = L.BatchNormalization()(y)
    return randomise(keras.Model(x, L.Dense(3, name="out")(L.GlobalAveragePooling2D()(y))))


def dense_net() -> keras.Model:
    x = keras.Input((20,))
    y = L.Dense(32, activation="relu", name="a")(x)
    return randomise(keras.Model(x, L.Dense(3, name="out")(L.Dense(24, activation="tanh", name="b")(y))))


def sequence_net() -> keras.Model:
    x = keras.Input((16, 8))
    y = L.Conv1D(24, 5, strides=2, padding="causal", name="conv")(x)
    return randomise(keras.Model(x, L.Dense(2)(L.Flatten()(L.Dense(16, name="each")(y)))))


def shared_net() -> keras.Model:
    x = keras.Input((20,))
    shared = L.Dense(20, activation="relu", name="shared")
    return randomise(keras.Model(x, L.Dense(2)(shared(shared(x)))))


def nested_net() -> keras.Model:
    inner = keras.Sequential([keras.Input((16,)), L.Dense(24, name="deep")], name="inner")
    x = keras.Input((16,))
    return randomise(keras.Model(x, L.Dense(2)(inner(x))))


NETS = {
    "dense": dense_net,
    "same": image_net,
    "valid": lambda: image_net(padding="valid"),
    "strides": lambda: image_net(strides=2),
    "uneven_strides": lambda: image_net(strides=(1, 2), kernel_size=(3, 5)),
    "dilated": lambda: image_net(dilation_rate=2),
    "one_by_one": lambda: image_net(kernel_size=1, strides=2),
    "without_bias": lambda: image_net(use_bias=False),
    "sequence": sequence_net,
    "shared": shared_net,
    "nested": nested_net,
    "sequential": lambda: randomise(keras.Sequential([keras.Input((20,)), L.Dense(24), L.Dense(3)])),
}


def samples(model: keras.Model) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, *model.input_shape[1:])).astype("float32")


@pytest.mark.parametrize("method", ["auto", "svd", "spatial", "tucker"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_the_factors_compute_what_they_stand_for(name, method):
    model = NETS[name]()
    before = model.get_weights()
    if method in ("spatial", "tucker") and name in ("dense", "shared", "nested", "sequential", "one_by_one"):
        return
    if method == "spatial" and name == "sequence":
        return
    found = factorize(model, rank=0.3, method=method, multiple_of=1)
    assert found.layers
    assert found.difference < 1e-5  # to the original with the kernels that the factors stand for
    assert np.abs(np.asarray(found.model(samples(model))) - np.asarray(model(samples(model)))).max() > 1e-4
    assert {layer.name for layer in model.layers if "inner" not in layer.name} <= {
        layer.name for layer in found.model.layers
    }
    assert type(found.model) is type(model)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize("name", sorted(set(NETS) - {"nested"}))
def test_with_all_the_energy_nothing_is_lost(name):
    model = NETS[name]()
    (path, *_) = factorize(model, rank=1, multiple_of=1).layers
    layer = model.get_layer(path)
    kernel, *others = layer.get_weights()
    random = np.random.default_rng(0)
    parts = [random.normal(size=(*kernel.shape[:-1], 1)) * random.normal(size=kernel.shape[-1]) for _ in range(2)]
    layer.set_weights([sum(parts), *others])  # a kernel of rank 2
    found = factorize(model, 0.999999, multiple_of=1, include=[path])
    assert found.left["parameters"] < 1
    np.testing.assert_allclose(found.model(samples(model)), model(samples(model)), rtol=1e-2, atol=1e-2)


def test_decompositions_by_hand():
    kernel = np.random.default_rng(0).normal(size=(3, 5, 6, 7))
    for method in ("svd", "spatial", "tucker"):
        full = spectrum_of(kernel, method).full
        np.testing.assert_allclose(rebuild(factors_of(kernel, method, full), method), kernel, atol=1e-10)
    values = spectrum_of(kernel, "svd").values[0]
    np.testing.assert_allclose(values, np.linalg.svd(kernel.reshape(-1, 7))[1])
    for rank in (1, 3):  # the best approximation of this rank (Eckart and Young 1936)
        error = np.linalg.norm(rebuild(factors_of(kernel, "svd", (rank,)), "svd") - kernel)
        assert error == pytest.approx(np.sqrt(np.square(values[rank:]).sum()))
    assert spectrum_of(np.ones((1, 1, 4, 4)), "tucker") is None


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_the_error_is_what_the_energy_allows(energy):
    for name in ("same", "dense"):
        for layer in factorize(NETS[name](), energy, multiple_of=1).layers.values():
            assert layer.error**2 <= 1 - energy + 1e-6


@pytest.mark.parametrize("cost", ["parameters", "macs"])
@pytest.mark.parametrize("name", ["dense", "sequence", "wide", "mobilenet"])
def test_targets_are_met_and_counted(cost, name, tmp_path):
    if name == "mobilenet":
        options = {"input_shape": (64, 64, 3), "weights": None, "classes": 10, "alpha": 0.5}
        model = randomise(keras.applications.MobileNetV2(**options))
    elif name == "wide":
        x = keras.Input((16, 16, 8))
        y = L.Conv2D(32, 3, strides=2, padding="same")(x)
        y = L.Conv2D(48, (3, 5), strides=(1, 2), padding="same")(L.ReLU()(y))
        model = randomise(keras.Model(x, L.Dense(3)(L.Flatten()(y))))
    else:
        model = NETS[name]()
    found = factorize(model, target={cost: 0.7}, multiple_of=1)
    counts = []
    for label, each in (("before", model), ("after", found.model)):
        each.save(tmp_path / f"{label}.keras")
        counts.append(getattr(compress.inspect_model(tmp_path / f"{label}.keras"), cost))
    assert counts[1] / counts[0] == pytest.approx(0.7, rel=0.03)
    assert found.left[cost] == pytest.approx(counts[1] / counts[0], rel=1e-6)
    assert found.reached.measured == pytest.approx(found.left[cost])


def test_a_target_in_bytes_is_met_in_the_file(tmp_path):
    model = dense_net()
    found = factorize(model, target={"bytes": 0.8}, multiple_of=1)
    sizes = [
        compress.export_model(each, tmp_path / f"{name}.tflite").size_bytes
        for name, each in (("before", model), ("after", found.model))
    ]
    assert sizes[1] / sizes[0] == pytest.approx(0.8, rel=0.03)


def test_a_target_in_time_is_found_by_measuring(monkeypatch):
    model = dense_net()
    count = model.count_params()
    monkeypatch.setattr(FileCosts, "share", lambda files, other: 0.3 + 0.7 * other.count_params() / count)
    assert factorize(model, target={"latency": 0.75}, multiple_of=1).reached.measured == pytest.approx(0.75, rel=0.03)
    monkeypatch.setattr(FileCosts, "share", lambda files, other: 1.1)
    with pytest.raises(UsageError, match="nearest latency that was measured|least that can be left"):
        factorize(model, target={"latency": 0.75}, multiple_of=1)


def test_half_precision_and_settings_are_kept(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = image_net()
    finally:
        keras.config.set_dtype_policy("float32")
    model.get_layer("conv").trainable = False
    model.compile("adam", "mse")
    found = factorize(model, rank=0.3).model
    assert found.get_layer("conv").dtype_policy.name == found.get_layer("conv_in").dtype_policy.name == "mixed_bfloat16"
    assert not found.get_layer("conv_in").trainable
    assert found.compiled
    found.save(tmp_path / "m.keras")
    script = f"""
import sys, keras
model = keras.saving.load_model(r"{tmp_path / "m.keras"}")
assert model.get_layer("conv_in") and "compress" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_what_is_left_alone_is_said():
    x = keras.Input((8, 8, 8))
    y = L.DepthwiseConv2D(3, name="depthwise")(x)
    y = L.Conv2D(16, 3, groups=2, name="grouped")(y)
    model = keras.Model(x, L.Dense(2, name="out")(L.GlobalAveragePooling2D()(L.Conv2D(32, 1, name="wide")(y))))
    found = factorize(model, rank=0.25, multiple_of=1)
    assert set(found.layers) == {"wide", "out"}
    assert found.skipped == {"depthwise": "DepthwiseConv2D is not factorised", "grouped": "has groups"}
    assert factorize(model, rank=0.9, multiple_of=1).skipped["wide"] == "would not get cheaper"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "an energy, a rank or a target"),
        ({"energy": 0.9, "rank": 2}, "an energy, a rank or a target"),
        ({"energy": 0.0}, "energy above 0"),
        ({"rank": 0}, "rank of at least 1"),
        ({"rank": 1.5}, "rank of at least 1"),
        ({"target": {"time": 0.5}}, "expected a target such as"),
        ({"target": {"macs": 0.001}}, "the least that can be left is"),
        ({"energy": 0.9, "method": "qr"}, "method to be"),
        ({"energy": 0.9, "include": ["nothing"]}, "matches no layer"),
        ({"energy": 0.9, "exclude": ["*"]}, "a dense layer or convolution"),
        ({"energy": 0.9, "multiple_of": 0}, "at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        factorize(dense_net(), **options)


def test_models_that_cannot_be_factorised():
    with pytest.raises(UsageError, match="fake-quantized"):
        factorize(compress.fake_quantize(dense_net(), "int8_weights"), 0.9)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Own()
    model(keras.ops.zeros((1, 3)))
    with pytest.raises(ModelError, match="functional"):
        factorize(model, 0.9)
