"""One-shot pruning of a copy."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import DataError, PassError, UsageError
from compress.models.kernel_layout import find_layouts, to_matrices
from compress.models.walking import find_kernels
from compress.pruning.magnitude import prune_weights
from compress.quantization.fake_quantization import fake_quantize


@pytest.fixture
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, name="one"),
            layers.BatchNormalization(),
            layers.Dense(3, name="two"),
        ]
    )


@pytest.fixture(scope="module")
def every_layer() -> keras.Model:
    """Every layer type that has kernels, nested and shared ones too; every input axis is a multiple of 4."""
    keras.utils.set_random_seed(0)
    same = {"padding": "same"}
    image = keras.Input((4, 4, 4), name="image")
    x = layers.Conv2D(8, 3, **same)(image)
    x = layers.DepthwiseConv2D(3, depth_multiplier=4, **same)(x)
    x = layers.SeparableConv2D(8, 3, depth_multiplier=4, **same)(x)
    x = layers.Conv2DTranspose(8, 3, **same)(x)
    shared = layers.Conv2D(8, 1, name="shared")
    inner = [keras.Input((4, 4, 8)), layers.Conv2DTranspose(8, 1, name="up"), layers.BatchNormalization()]
    inner = keras.Sequential(inner, name="inner")
    x = inner(shared(inner(shared(x))))
    x = layers.Reshape((1, 4, 4, 8))(x)
    x = layers.Conv3DTranspose(8, 1)(layers.Conv3D(8, 1)(x))
    x = layers.ConvLSTM2D(4, 3, **same)(x)
    x = layers.TimeDistributed(layers.Conv1D(4, 3, **same))(x)
    x = layers.Reshape((4, 16))(x)
    tokens = keras.Input((4,), name="tokens", dtype="int32")
    x = layers.Concatenate()([x, layers.Embedding(12, 16)(tokens)])
    x = layers.Conv1DTranspose(8, 3, **same)(layers.SeparableConv1D(8, 3, **same)(layers.DepthwiseConv1D(3, **same)(x)))
    x = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.GroupQueryAttention(4, 2, 1)(x, x)
    x = layers.EinsumDense("abc,dc->abd", (None, 8))(x)
    x = layers.LSTM(4, return_sequences=True)(x)
    x = layers.SimpleRNN(4, return_sequences=True)(layers.GRU(4, return_sequences=True)(x))
    x = layers.Bidirectional(layers.LSTM(4))(x)
    model = keras.Model([image, tokens], layers.Dense(4)(x))
    model.compile("sgd", "mse", run_eagerly=True)
    return model


def zeros(model: keras.Model, name: str) -> int:
    return int(np.count_nonzero(model.get_layer(name).get_weights()[0] == 0))


def kernels_of(model):
    kernels, _ = find_kernels(model)
    layouts = find_layouts(model, [kernel.variable for kernel in kernels])
    values = [keras.ops.convert_to_numpy(kernel.variable) for kernel in kernels]
    return {k.path: (value, layout) for k, value, layout in zip(kernels, values, layouts, strict=True)}


def test_exact_and_on_a_copy(model):
    before = [value.copy() for value in model.get_weights()]
    pruned = prune_weights(model, 0.7)
    assert (zeros(pruned, "one"), zeros(pruned, "two")) == (14, 10)  # round(0.7 * 20), round(0.7 * 15): half to even
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    kept = pruned.get_layer("one").get_weights()[0]
    assert np.array_equal(kept[kept != 0], before[0][kept != 0])
    assert np.abs(before[0][kept == 0]).max() <= np.abs(kept[kept != 0]).min()


def test_selection_and_global(model):
    pruned = prune_weights(model, 0.5, exclude=["two"])
    assert (zeros(pruned, "one"), zeros(pruned, "two")) == (10, 0)
    pruned = prune_weights(model, 0.6, distribution="global")
    assert zeros(pruned, "one") + zeros(pruned, "two") == 21  # round(0.6 * 35)
    pruned = prune_weights(model, 0.6, distribution={"two": 0.2})
    assert (zeros(pruned, "one"), zeros(pruned, "two")) == (12, 3)


def test_pruning_twice_keeps_zeros(model):
    once = prune_weights(model, 0.8)
    twice = prune_weights(once, 0.3, score="random", seed=5)
    assert (zeros(twice, "one"), zeros(twice, "two")) == (16, 12)


def test_bfloat16():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="one", dtype="bfloat16")])
    assert zeros(prune_weights(model, 0.5), "one") == 10


def test_2_4_holds_in_every_group_of_every_layer(every_layer):
    pruned = kernels_of(prune_weights(every_layer, pattern="2:4"))
    assert len(pruned) == 37
    for path, (value, layout) in pruned.items():
        matrices = to_matrices(value, layout)
        groups = matrices.reshape(matrices.shape[0], -1, 4, matrices.shape[2])
        assert (np.count_nonzero(groups, axis=2) == 2).all(), path


@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_every_layer_at_its_exact_count(every_layer, pattern):
    for path, (value, _) in kernels_of(prune_weights(every_layer, 0.75, pattern=pattern)).items():
        expected = round(0.75 * value.size) if pattern == "unstructured" else 4 * round(0.75 * value.size / 4)
        assert np.count_nonzero(value == 0) == expected, path


def test_every_layer_by_taylor(every_layer):
    random = np.random.default_rng(0)
    x = {"image": random.random((8, 4, 4, 4), np.float32), "tokens": random.integers(0, 12, (8, 4))}
    pruned = kernels_of(
        prune_weights(every_layer, 0.5, score="taylor", distribution="global", data=(x, random.random((8, 4))))
    )
    zero = sum(np.count_nonzero(value == 0) for value, _ in pruned.values())
    assert zero == round(0.5 * sum(value.size for value, _ in pruned.values()))


def test_taylor_keeps_what_the_loss_depends_on(model):
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    x[:, 1] = 0  # a dead input: its weights have no gradient, however large they are
    kernel = model.get_layer("one").kernel
    kernel.assign(np.where(np.arange(4)[:, None] == 1, 9.0, kernel))
    model.compile("sgd", "mse")
    pruned = prune_weights(model, 0.25, include=["one"], score="taylor", data=(x, np.ones((64, 3))))
    assert np.array_equal(pruned.get_layer("one").get_weights()[0] == 0, (np.arange(4) == 1)[:, None].repeat(5, 1))


def test_bad_input(model):
    with pytest.raises(UsageError, match="sparsity=1"):
        prune_weights(model, 1)
    with pytest.raises(UsageError, match="include: the pattern"):
        prune_weights(model, 0.5, include=["conv"])
    with pytest.raises(UsageError, match="two/kernel with 5"):
        prune_weights(model, pattern="2:4")
    with pytest.raises(UsageError, match="one/kernel to keep a weight. Received: sparsity=0.99, which prunes 20 of 20"):
        prune_weights(model, 0.99)
    with pytest.raises(UsageError, match="data=None"):
        prune_weights(model, 0.5, score="taylor")
    with pytest.raises(UsageError, match="needs a training"):
        prune_weights(model, 0.5, score="movement")
    with pytest.raises(UsageError, match="not compiled"):
        prune_weights(model, 0.5, score="taylor", data=(np.ones((2, 4)), np.ones((2, 3))))
    model.compile("sgd", "mse")
    with pytest.raises(DataError, match="without labels"):
        prune_weights(model, 0.5, score="taylor", data=np.ones((2, 4)))
    model.get_layer("two").set_weights([np.full((5, 3), np.nan), np.zeros(3)])
    with pytest.raises(PassError, match="NaN in two/kernel"):
        prune_weights(model, 0.5)


def test_frozen_and_quantized_kernels(model):
    model.get_layer("two").trainable = False
    assert zeros(prune_weights(model, 0.5), "two") == 0
    with pytest.raises(UsageError, match=r"Received: 'two': two/kernel: frozen"):
        prune_weights(model, 0.5, include=["one", "two"])
    with pytest.raises(UsageError, match="BatchNormalization has no kernel"):
        prune_weights(model, 0.5, include=["one", "batch*"])
    model.get_layer("two").trainable = True
    with pytest.raises(UsageError, match=r"Received: one/\S*kernel of a fake-quantized layer") as caught:
        prune_weights(fake_quantize(model, "int8"), 0.5)
    assert "Prune before you quantize" in caught.value.help
