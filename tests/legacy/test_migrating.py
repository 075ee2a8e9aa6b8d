"""Files of Keras 2 become Keras 3 models with the same outputs; what tfmot left in them is carried over."""

from __future__ import annotations

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras2_nets import answers, plain, residual, train
from typer.testing import CliRunner

import compress
from compress.cli import app
from compress.errors import ModelError
from compress.legacy.migrating import migrate_model
from compress.quantization.layers import FakeQuant, QuantizedLayer

SUFFIXES = ("h5", "keras")


def kernels(model) -> dict[str, np.ndarray]:
    return {f"{layer.name}/{w.name}": keras.ops.convert_to_numpy(w) for layer in model.layers for w in layer.weights}


def migrated(model, path) -> keras.Model:
    model.save(path)
    return migrate_model(path).model


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("net", [plain, residual])
def test_model_of_keras_2(k2, images, tmp_path, net, suffix):
    model = train(k2, net(k2), images)
    found = migrated(model, tmp_path / f"old.{suffix}")
    np.testing.assert_allclose(answers(found, images[0]), answers(model, images[0]), atol=1e-5)
    assert [layer.name for layer in found.layers] == [layer.name for layer in model.layers]
    found.save(tmp_path / "new.keras")
    again = compress.load_model(tmp_path / "new.keras")
    np.testing.assert_array_equal(answers(again, images[0]), answers(found, images[0]))


def rich(k):
    """Attention, recurrence with states, nested models, a shared layer, TensorFlow functions, two inputs and outputs."""
    layers = k.layers
    sequence, numbers = k.Input((6, 4), name="sequence"), k.Input((3,), name="numbers")
    x = layers.MultiHeadAttention(2, 3, name="mha")(sequence, sequence)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(2)]), return_sequences=True)(x)
    nested = k.Sequential([layers.Dense(4, input_shape=(6, 2)), layers.LayerNormalization()], name="nested")
    x = layers.TimeDistributed(layers.Dense(3))(nested(x))
    outputs, state, _ = layers.LSTM(3, return_sequences=True, return_state=True)(x)
    x = layers.LSTM(3, name="second")(outputs, initial_state=[state, state])
    shared = layers.Dense(3, activation="tanh", name="shared")
    x = layers.Concatenate()([shared(x), shared(numbers)])
    x = x * 2.0 + k.activations.sigmoid(x) - 1.0
    inner_input = k.Input((6,))
    inner = k.Model(inner_input, layers.Dense(5, activation="hard_sigmoid", name="hard")(inner_input), name="inner")
    y = inner(x)
    return k.Model([sequence, numbers], [layers.Dense(2, name="a")(y), layers.Dense(1, name="b")(y)], name="rich")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rich_graph(k2, tmp_path, suffix):
    model = rich(k2)
    random = np.random.default_rng(0)
    model.set_weights([random.uniform(-1, 1, w.shape) for w in model.get_weights()])
    x = [random.standard_normal((5, 6, 4)).astype("float32"), random.standard_normal((5, 3)).astype("float32")]
    found = migrated(model, tmp_path / f"rich.{suffix}")
    for ours, theirs in zip(found.predict(x, verbose=0), model.predict(x, verbose=0), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert compress.models.graph.output_names(found) == ["a", "b"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sequential_models(k2, tmp_path, suffix):
    layers = k2.layers
    model = k2.Sequential([layers.Embedding(9, 4, input_length=6), layers.GRU(3, reset_after=False), layers.Dense(2)])
    model.build((None, 6))
    x = np.random.default_rng(0).integers(0, 9, (5, 6))
    found = migrated(model, tmp_path / f"words.{suffix}")
    assert isinstance(found, keras.Sequential)
    np.testing.assert_allclose(answers(found, x), answers(model, x), atol=1e-5)


def test_hard_sigmoid_of_keras_2_is_another_function(k2, tmp_path):
    model = k2.Sequential([k2.layers.Activation("hard_sigmoid", input_shape=(5,))])
    x = np.array([[-3.0, -1.0, 0.0, 1.0, 2.6]], "float32")
    found = migrated(model, tmp_path / "hard.h5")
    np.testing.assert_allclose(answers(found, x), [[0.0, 0.3, 0.5, 0.7, 1.0]], atol=1e-6)
    lstm = k2.Sequential([k2.layers.LSTM(2, activation="hard_sigmoid", name="lstm", input_shape=(3, 2))])
    with pytest.raises(ModelError, match=r"'lstm': Keras 3 has no activation 'hard_sigmoid' \(its"):
        migrated(lstm, tmp_path / "lstm.h5")


HARD = {"recurrent_activation": "hard_sigmoid"}
GATED = {
    "LSTM": ((6, 3), lambda L: L.LSTM(4, unit_forget_bias=False, **HARD)),
    "GRU": ((6, 3), lambda L: L.GRU(4, **HARD)),
    "GRU of Keras 1": ((6, 3), lambda L: L.GRU(4, reset_after=False, **HARD)),
    "without bias": ((6, 3), lambda L: L.LSTM(4, use_bias=False, **HARD)),
    "Bidirectional": ((6, 3), lambda L: L.Bidirectional(L.LSTM(4, **HARD))),
    "cells": ((6, 3), lambda L: L.RNN([L.LSTMCell(4, **HARD), L.GRUCell(3, **HARD), L.SimpleRNNCell(2)])),
    "ConvLSTM2D": ((4, 6, 6, 2), lambda L: L.ConvLSTM2D(3, 3)),  # its default in Keras 2
    "TimeDistributed": ((2, 6, 3), lambda L: L.TimeDistributed(L.GRU(4, **HARD))),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", GATED)
def test_hard_sigmoid_gates(k2, tmp_path, name, suffix):
    shape, make = GATED[name]
    layer = make(k2.layers)
    inputs = k2.Input(shape)
    model = k2.Model(inputs, k2.Sequential([layer], name="nested")(inputs))
    random = np.random.default_rng(0)
    model.set_weights([random.uniform(-2, 2, w.shape) for w in model.get_weights()])
    x = random.uniform(-3, 3, (16, *shape)).astype("float32")
    found = migrated(model, tmp_path / f"gates.{suffix}")
    np.testing.assert_allclose(answers(found, x), answers(model, x), atol=1e-5)


def test_files_of_early_releases(tmp_path):
    """Embedding noted the dtype of its indices, and a sequential model was a list without an input layer."""
    import h5py

    random = np.random.default_rng(0)
    table, kernel = (random.standard_normal(shape).astype("float32") for shape in ((9, 4), (4, 2)))
    layers = [
        {"class_name": "Embedding", "config": {"name": "words", "dtype": "int32", "input_dim": 9, "output_dim": 4,
         "batch_input_shape": [None, 5], "input_length": 5, "mask_zero": False, "trainable": True}},
        {"class_name": "GlobalAveragePooling1D", "config": {"name": "mean", "trainable": True}},
        {"class_name": "Dense", "config": {"name": "head", "units": 2, "use_bias": False, "activation": "linear"}},
    ]  # fmt: skip
    with h5py.File(tmp_path / "early.h5", "w") as file:
        file.attrs["keras_version"] = "2.0.2"
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": layers}).encode()
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"words", b"mean", b"head"]
        for layer, name, value in (("words", "embeddings", table), ("mean", None, None), ("head", "kernel", kernel)):
            stored = group.create_group(layer)
            stored.attrs["weight_names"] = [] if name is None else [f"{layer}/{name}:0".encode()]
            if name is not None:
                stored[f"{layer}/{name}:0"] = value
    found = migrate_model(tmp_path / "early.h5")
    x = random.integers(0, 9, (3, 5))
    assert found.keras_version == "2.0.2" and isinstance(found.model, keras.Sequential)
    np.testing.assert_allclose(answers(found.model, x), table[x].mean(1) @ kernel, atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_masks_of_pruning(k2, tfmot, images, tmp_path, suffix):
    api = tfmot.sparsity.keras
    model = api.prune_low_magnitude(residual(k2), api.ConstantSparsity(0.5, 0, -1, 1))
    train(k2, model, images, api.UpdatePruningStep())
    for wrapper in model.layers:  # weights drift behind their masks until tfmot applies these
        if getattr(wrapper, "pruning_vars", None):
            weight, mask, _ = wrapper.pruning_vars[0]
            weight.assign(weight + 0.01 * (1 - mask))
    expected = api.strip_pruning(model)
    for layer, wrapper in zip(expected.layers, model.layers, strict=True):
        if getattr(wrapper, "pruning_vars", None):
            weights = layer.get_weights()
            layer.set_weights([weights[0] * wrapper.pruning_vars[0][1].numpy(), *weights[1:]])
    model.save(path := tmp_path / f"pruned.{suffix}")
    found = migrate_model(path)
    assert found.masks == 4  # stem, body, hidden, head; tfmot does not prune depthwise kernels
    assert (kernels(found.model)["stem/kernel"] == 0).mean() == 0.5
    np.testing.assert_allclose(answers(found.model, images[0]), answers(expected, images[0]), atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_clusters(k2, tfmot, images, tmp_path, suffix):
    api = tfmot.clustering.keras
    model = train(k2, api.cluster_weights(residual(k2), 8, api.CentroidInitialization.LINEAR), images)
    model.save(path := tmp_path / f"clustered.{suffix}")
    found = migrate_model(path)
    assert found.clusters == 4
    assert len(np.unique(kernels(found.model)["body/kernel"])) <= 8
    np.testing.assert_allclose(answers(found.model, images[0]), answers(model, images[0]), atol=1e-5)


def tfmot_scales(model) -> dict[str, tuple[np.ndarray, int]]:
    """Return the scale (and the zero point, of activations) of each quantizer of tfmot, by TensorFlow's own rule."""
    found = {}
    for weight in model.weights:
        name = weight.name.partition(":")[0]
        if name.endswith("_min"):
            high = next(w for w in model.weights if w.name.partition(":")[0] == name[:-3] + "max").numpy()
            found[name[:-4]] = weight.numpy(), high
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("net", [plain, residual])
def test_quantization_aware_model(k2, tfmot, images, tmp_path, net, suffix):
    float_model = train(k2, net(k2), images, epochs=40, rate=1e-2)
    model = train(k2, tfmot.quantization.keras.quantize_model(float_model), images, epochs=40, rate=1e-3)
    model.save(path := tmp_path / f"quantized.{suffix}")
    found = migrate_model(path)
    expected = answers(model, images[0])
    assert np.std(expected) > 0.1  # it tells samples apart
    difference = np.abs(answers(found.model, images[0]) - expected)
    assert np.median(difference) < 1e-4 and difference.max() < 0.1  # float sums may flip a rounding here and there
    np.testing.assert_array_equal(answers(found.model, images[0]).argmax(-1), expected.argmax(-1))
    ranges = tfmot_scales(model)
    layers = {layer.name: layer for layer in found.model.layers}
    dense = layers["hidden"]
    assert isinstance(dense, QuantizedLayer)
    low, high = ranges["quant_hidden/kernel"]
    np.testing.assert_allclose(
        dense.scales()["kernel"].reshape(-1), (high - low) / 254, rtol=2e-5
    )  # ours have few bits, so that products are exact
    stored = sorted((float(low), float(high)) for name, (low, high) in ranges.items() if "kernel" not in name)
    quantizers = [layer for layer in found.model.layers if isinstance(layer, FakeQuant)]
    np.testing.assert_allclose(
        sorted((float(q.minimum.numpy()), float(q.maximum.numpy())) for q in quantizers), stored, rtol=1e-6
    )
    assert found.ranges == len(stored) and not any(
        isinstance(layer, keras.layers.BatchNormalization) for layer in found.model.layers
    )


def test_quantization_aware_model_is_one_of_ours(k2, tfmot, images, tmp_path):
    model = train(k2, tfmot.quantization.keras.quantize_model(train(k2, residual(k2), images)), images)
    found = migrated(model, tmp_path / "quantized.h5")
    found.save(tmp_path / "new.keras")
    again = compress.load_model(tmp_path / "new.keras")
    np.testing.assert_array_equal(answers(again, images[0]), answers(found, images[0]))
    assert compress.models.graph.output_names(again) == ["head"]
    records = compress.export_models(again, {"tflite": tmp_path / "q.tflite"}, samples=images[0])
    assert records[0].agreement == 1.0
    again.compile("adam", "sparse_categorical_crossentropy")
    before = kernels(again)["body/kernel"]
    again.fit(*images, verbose=0)
    assert np.abs(kernels(again)["body/kernel"] - before).max() > 0  # it can be trained on


def test_frozen_and_kept_options(k2, tmp_path):
    model = plain(k2)
    model.get_layer("conv").trainable = False
    model.get_layer("hidden").kernel_regularizer = None
    found = migrated(model, tmp_path / "frozen.h5")
    assert not found.get_layer("conv").trainable and found.get_layer("hidden").trainable
    layer = k2.layers.Dense(2, kernel_regularizer="l2", bias_constraint="non_neg", input_shape=(3,))
    found = migrated(k2.Sequential([layer]), tmp_path / "kept.keras").layers[0]
    assert found.kernel_regularizer.l2 == pytest.approx(0.01)
    assert type(found.bias_constraint).__name__ == "NonNeg"


def test_what_cannot_come_along_is_named(k2, tmp_path):
    model = k2.Sequential([k2.layers.LocallyConnected1D(2, 3, name="local", input_shape=(8, 2))])
    with pytest.raises(ModelError, match=r"'local' is a LocallyConnected1D, which Keras 3 does not have"):
        migrated(model, tmp_path / "local.h5")
    model = k2.Sequential([k2.layers.LSTM(2, time_major=True, name="turned", input_shape=(8, 2))])
    with pytest.raises(ModelError, match="has no option time_major"):
        migrated(model, tmp_path / "turned.h5")
    inputs = k2.Input((4, 4, 1))
    import tensorflow as tf

    model = k2.Model(inputs, tf.image.rot90(inputs))
    with pytest.raises(ModelError, match=r"image\.rot90|for which there is no counterpart|calls tf\."):
        migrated(model, tmp_path / "function.h5")


def test_weights_alone_and_keras_3(k2, tmp_path, images):
    model = plain(k2)
    model.save_weights(tmp_path / "weights.h5")
    with pytest.raises(ModelError, match="weights without a model"):
        migrate_model(tmp_path / "weights.h5")
    three = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    three.save(tmp_path / "three.keras")
    with pytest.raises(ModelError, match="needs no migration"):
        migrate_model(tmp_path / "three.keras")
    model.save(tmp_path / "two.keras")
    with pytest.raises(ModelError, match="bmcompress migrate"):
        compress.load_model(tmp_path / "two.keras")


def test_command(k2, tfmot, images, tmp_path):
    api = tfmot.sparsity.keras
    model = api.prune_low_magnitude(plain(k2), api.ConstantSparsity(0.5, 0, -1, 1))
    train(k2, model, images, api.UpdatePruningStep()).save(tmp_path / "old.h5")
    command = ["migrate", str(tmp_path / "old.h5"), "-o", str(tmp_path / "new.keras")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["masks"] == 3
    assert CliRunner().invoke(app, command).exit_code == 2  # it is there already
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert CliRunner().invoke(app, ["migrate", "old.h5", "-o", "new.h5"]).exit_code == 2
    new = str(tmp_path / "new.keras")
    itself = CliRunner().invoke(app, ["migrate", new, "-o", new, "--force"])
    assert itself.exit_code == 2
    assert "another file than the old model" in itself.output
    missing = CliRunner().invoke(app, ["migrate", str(tmp_path / "missing.h5"), "-o", new, "--force"])
    assert missing.exit_code == 4
    assert compress.load_model(new).count_params() > 0
    inspected = CliRunner().invoke(app, ["inspect", str(tmp_path / "new.keras"), "--json"])
    assert inspected.exit_code == 0
    refused = CliRunner().invoke(app, ["inspect", str(tmp_path / "old.h5")])
    assert refused.exit_code == 4


def test_no_keras_2_is_needed_to_migrate(k2, images, tmp_path):
    """The file is read without tf_keras or tfmot, and nothing imports them."""
    plain(k2).save(tmp_path / "old.h5")
    script = f"""
import sys
from compress.legacy.migrating import migrate_model
found = migrate_model({str(tmp_path / "old.h5")!r}).model
loaded = [name for name in ("tf_keras", "tensorflow_model_optimization") if name in sys.modules]
print(found.count_params(), loaded)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [f"{plain(k2).count_params()} []"], done.stderr[-800:]
