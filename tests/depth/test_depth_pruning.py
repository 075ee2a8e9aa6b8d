"""Dropping residual blocks: what goes, what it costs, and that the rest computes as before."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers as L

import compress
from compress.depth.blocks import find_blocks
from compress.depth.pruning import prune_blocks
from compress.errors import DataError, ModelError, UsageError


def randomise(model: keras.Model, seed: int = 0) -> keras.Model:
    generator = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(generator.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean", "bias"):
            variable.assign(generator.normal(0, 0.3, variable.shape))
    return model


def conv(x, filters: int, name: str, strides: int = 1):
    x = L.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False, name=name)(x)
    return L.BatchNormalization(name=f"{name}_norm")(x)


def resnet(scales: tuple[float, ...] = (1.0, 1.0, 1.0)) -> keras.Model:
    """Return a net of identity blocks whose branches are as strong as `scales` say, and one with a projection."""
    x = keras.Input((8, 8, 3))
    y = conv(x, 8, "stem")
    for index in range(len(scales)):
        branch = L.ReLU()(conv(y, 8, f"a{index}"))
        branch = conv(branch, 8, f"b{index}")
        y = L.ReLU()(L.Add(name=f"block{index}")([y, branch]))
    y = L.Add(name="projected")([L.Conv2D(16, 1, strides=2)(y), conv(y, 16, "down", 2)])
    model = randomise(keras.Model(x, L.Dense(5, name="out")(L.GlobalAveragePooling2D()(y))))
    for index, scale in enumerate(scales):
        norm = model.get_layer(f"b{index}_norm")
        norm.gamma.assign(norm.gamma * scale)
        norm.beta.assign(norm.beta * scale)
    return model


def operators() -> keras.Model:
    x = keras.Input((6,))
    y = L.Dense(8)(x)
    for _ in range(2):
        y = y + L.Dense(8, activation="relu")(y)
    return randomise(keras.Model(x, L.Dense(3)(y)))


def transformer() -> keras.Model:
    x = keras.Input((5, 8))
    y = x
    for index in range(2):
        z = L.LayerNormalization()(y)
        y = L.Add(name=f"attention{index}")([y, L.MultiHeadAttention(2, 4)(z, z)])
        z = L.Dense(16, activation="gelu")(L.LayerNormalization()(y))
        y = L.Add(name=f"mlp{index}")([y, L.Dropout(0.5)(L.Dense(8)(z))])
    return randomise(keras.Model(x, L.Dense(3)(L.GlobalAveragePooling1D()(y))))


def nested() -> keras.Model:
    inner_x = keras.Input((8,))
    inner = keras.Model(inner_x, L.Add(name="sum")([inner_x, L.Dense(8)(inner_x)]), name="inner")
    x = keras.Input((8,))
    y = L.Add(name="outer")([x, L.Dense(8)(inner(x))])
    return randomise(keras.Model(x, L.Dense(2)(y)))


def shared() -> keras.Model:
    x = keras.Input((8,))
    dense = L.Dense(8, name="shared")
    y = dense(x)
    y = L.Add(name="sum")([y, L.Dense(8, name="own")(dense(y))])
    return randomise(keras.Model(x, L.Dense(2)(y)))


NETS = {"resnet": resnet, "operators": operators, "transformer": transformer, "nested": nested, "shared": shared}


def samples(model: keras.Model, count: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *model.input_shape[1:])).astype("float32")


@pytest.mark.parametrize("name", sorted(NETS))
def test_without_its_branch_a_sum_is_its_skip(name):
    model = NETS[name]()
    x = samples(model)
    before = model.get_weights()
    for block in find_blocks(model):
        pruned = prune_blocks(model, 1, include=[block.path], data=x)
        assert [each.path for each in pruned.dropped] == [block.path]
        assert model.count_params() - pruned.model.count_params() == block.parameters > 0
        assert np.abs(np.asarray(pruned.model(x)) - np.asarray(model(x))).max() > 1e-4
        if name == "resnet":  # the law: the branch multiplied by nothing
            silent = compress.copy_model(model)
            norm = silent.get_layer(f"b{block.path[-1]}_norm")
            norm.gamma.assign(norm.gamma * 0)
            norm.beta.assign(norm.beta * 0)
            np.testing.assert_allclose(pruned.model(x), silent(x), atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_a_transformer_without_a_block_is_the_transformer_written_without_it():
    model = transformer()
    x = samples(model)
    silent = compress.copy_model(model)
    attention = next(layer for layer in silent.layers if isinstance(layer, L.MultiHeadAttention))
    attention.set_weights([0 * w for w in attention.get_weights()])
    pruned = prune_blocks(model, 1, include=["attention0"], data=x)
    np.testing.assert_allclose(pruned.model(x), silent(x), atol=1e-5)


def test_what_is_found():
    assert [block.path for block in find_blocks(resnet())] == ["block0", "block1", "block2"]
    assert [block.path for block in find_blocks(transformer())] == ["attention0", "mlp0", "attention1", "mlp1"]
    assert sorted(block.path for block in find_blocks(nested())) == ["inner/sum", "outer"]
    (block,) = find_blocks(shared())
    assert block.layers == ("own",)  # the other one goes on


def test_the_block_that_costs_least_goes_first():
    model = resnet((1.0, 0.01, 0.2))
    pruned = prune_blocks(model, 2, data=samples(model))
    assert [each.path for each in pruned.dropped] == ["block1", "block2"]
    assert pruned.dropped[0].change < 0.1 * pruned.dropped[1].change
    names = [layer.name for layer in model.layers]
    assert [name for name in names if name in {layer.name for layer in pruned.model.layers}] == [
        layer.name for layer in pruned.model.layers
    ]


@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_a_target_is_reached_and_counted(cost, tmp_path):
    model = resnet()
    pruned = prune_blocks(model, target={cost: 0.75}, data=samples(model))
    counts = []
    for name, each in (("before", model), ("after", pruned.model)):
        each.save(tmp_path / f"{name}.keras")
        counts.append(getattr(compress.inspect_model(tmp_path / f"{name}.keras"), cost))
    assert counts[1] / counts[0] == pytest.approx(pruned.left[cost])
    assert pruned.left[cost] <= 0.75
    assert 0 < len(pruned.dropped) < 3


@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50V2", "EfficientNetB0"])
def test_networks_of_keras_applications(name):
    options = {"alpha": 0.35} if name == "MobileNetV2" else {}
    model = getattr(keras.applications, name)(input_shape=(32, 32, 3), weights=None, classes=10, **options)
    blocks = find_blocks(model)
    assert len(blocks) == {"MobileNetV2": 10, "ResNet50V2": 9, "EfficientNetB0": 9}[name]
    chosen = [blocks[0].path, blocks[-1].path]
    pruned = prune_blocks(model, 2, include=chosen, data=samples(model, 4))
    assert {each.path for each in pruned.dropped} == set(chosen)
    assert model.count_params() - pruned.model.count_params() == sum(blocks[i].parameters for i in (0, -1))


def test_saved_it_loads_without_us_and_trains_on(tmp_path):
    model = resnet()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = samples(model)
    pruned = prune_blocks(model, 1, data=(x, np.arange(16) % 5)).model
    pruned.fit(x, np.arange(16) % 5, verbose=0)
    pruned.save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", pruned(x))
    script = f"""
import sys, keras, numpy as np
model = keras.saving.load_model(r"{tmp_path / "m.keras"}")
np.testing.assert_allclose(model(np.load(r"{tmp_path / "x.npy"}")), np.load(r"{tmp_path / "y.npy"}"), atol=1e-5)
assert "compress" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a count or a target"),
        ({"count": 1, "target": {"macs": 0.5}}, "a count or a target"),
        ({"count": 4}, "a count of 1 to 3"),
        ({"count": 0}, "a count of 1 to 3"),
        ({"target": {"macs": 0.01}}, "the least that can be left is"),
        ({"target": {"time": 0.5}}, "expected a target such as"),
        ({"count": 1, "include": ["nothing"]}, "matches no"),
        ({"count": 1, "exclude": ["*"]}, "a block that may go"),
    ],
)
def test_bad_options(options, message):
    model = resnet()
    with pytest.raises(UsageError, match=message):
        prune_blocks(model, **options, data=samples(model))


def test_models_without_blocks_and_without_data():
    with pytest.raises(DataError, match="needs samples"):
        prune_blocks(resnet(), 1)
    x = keras.Input((3,))
    with pytest.raises(UsageError, match="without any"):
        prune_blocks(keras.Model(x, L.Dense(2)(x)), 1, data=np.ones((2, 3), "float32"))
    with pytest.raises(UsageError, match="fake-quantized"):
        prune_blocks(compress.fake_quantize(resnet(), "int8_weights"), 1, data=samples(resnet()))

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(2)

        def call(self, x):
            return x + self.dense(x)

    model = Own()
    model(keras.ops.zeros((1, 2)))
    with pytest.raises(ModelError, match="functional"):
        prune_blocks(model, 1, data=np.ones((2, 2), "float32"))


def blocks_in_blocks() -> keras.Model:
    x = keras.Input((8,))
    h = L.Dense(16)(x)
    for place in range(2):
        branch = L.Dense(16, activation="relu", name=f"first{place}")(h)
        branch = L.Add(name=f"inner{place}")([branch, L.Dense(16, activation="relu", name=f"second{place}")(branch)])
        h = L.Add(name=f"outer{place}")([h, branch])
    return keras.Model(x, L.Dense(3)(h))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_block_inside_of_one_that_went_counts_as_gone(count):
    model = randomise(blocks_in_blocks())
    for scale in (1e-3, 1.0):  # with small outer branches, the outer blocks go first
        for place in range(2):
            model.get_layer(f"first{place}").kernel.assign(model.get_layer(f"first{place}").kernel * scale)
        result = prune_blocks(model, count, data=samples(model))
        sums = {layer.name for layer in result.model.layers if isinstance(layer, L.Add)}
        assert len(sums) == 4 - count
        assert {each.path for each in result.dropped} <= {layer.name for layer in model.layers} - sums


def test_blocks_that_share_their_layers_go_for_a_target_of_parameters():
    x = keras.Input((8,))
    h = L.Dense(16)(x)
    layer = L.Dense(16, activation="tanh", name="shared")
    for place in range(3):
        h = L.Add(name=f"sum{place}")([h, layer(h)])
    model = keras.Model(x, L.Dense(3)(h))
    result = prune_blocks(model, target={"parameters": 0.9}, data=samples(model))
    assert {each.path for each in result.dropped} == {"sum0", "sum1", "sum2"}
    assert result.left["parameters"] == pytest.approx(195 / 467)
