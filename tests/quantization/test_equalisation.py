"""Channels of like size in neighbouring layers, with the same outputs."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from compress.models.graph import repeat, rewrite_graph, trace_graph
from compress.quantization.equalisation import equalise_graph


def spread_weights(model: keras.Model, seed: int = 0) -> None:
    """Give each layer channels whose weights differ by up to a factor of e^4."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        for weight in layer.weights:
            if "kernel" in weight.name or weight.name == "bias":
                channels = weight.shape[-2:] if "Depthwise" in type(layer).__name__ else weight.shape[-1:]
                weight.assign(rng.normal(size=weight.shape) * np.exp(rng.uniform(-2, 2, channels)))


def equalise(model: keras.Model, **options):
    """Equalise, and check the promises that always hold."""
    weights = model.get_weights()
    result = equalise_graph(trace_graph(model), **options)
    built = rewrite_graph(result.graph, repeat)
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(3, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]
    want, got = np.array(model(x if len(x) > 1 else x[0])), np.array(built(x if len(x) > 1 else x[0]))
    assert result.replaced or np.abs(want - got).max() <= 1e-5 * np.abs(want).max()
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    return result, built


def test_numbers_worked_out_by_hand():
    """Ranges 8 and 2 before, 2 and 8 behind: factors sqrt(16) / 2 = 2 and sqrt(16) / 8 = 0.5."""
    x = keras.Input((2,))
    model = keras.Model(x, layers.Dense(1, name="b")(layers.Dense(2, activation="relu", name="a")(x)))
    model.set_weights(
        [np.array([[8.0, 2.0], [-4.0, 1.0]]), np.array([6.0, 3.0]), np.array([[2.0], [-8.0]]), np.array([1.0])]
    )
    result, built = equalise(model)
    kernel, bias, behind, last = built.get_weights()
    assert kernel.tolist() == [[4.0, 4.0], [-2.0, 2.0]]
    assert bias.tolist() == [3.0, 6.0]
    assert behind.tolist() == [[4.0], [-4.0]]
    assert last.tolist() == [1.0]
    assert (result.pairs, result.sweeps, result.largest) == ((("a", "b"),), 2, pytest.approx(2.0))


def test_no_bias_outgrows_the_largest_of_its_layer():
    """Channel 1 is nearly dead: ranges 0.0001 and 1 call for a factor of 0.01, which would turn its bias 2 into 200."""
    x = keras.Input((1,))
    model = keras.Model(x, layers.Dense(1)(layers.Dense(2, activation="relu")(x)))
    model.set_weights([np.array([[1.0, 1e-4]]), np.array([4.0, 2.0]), np.array([[1.0], [1.0]]), np.array([0.0])])
    _, built = equalise(model)
    kernel, bias, behind, _ = built.get_weights()
    assert bias.tolist() == [4.0, 4.0]
    np.testing.assert_allclose(kernel, [[1.0, 2e-4]])
    np.testing.assert_allclose(behind, [[1.0], [0.5]])


def test_mobilenet_chain_converges_and_evens_out_channels():
    model = keras.Sequential(
        [keras.Input((8, 8, 2)), layers.Conv2D(6, 3, activation="relu", name="stem"), layers.DepthwiseConv2D(3, activation="relu", name="dw1"),
         layers.Conv2D(8, 1, name="pw1"), layers.ReLU(), layers.ZeroPadding2D(), layers.DepthwiseConv2D(3, depth_multiplier=2, name="dw2"),
         layers.LeakyReLU(), layers.Conv2D(5, 1, activation="relu", name="pw2"), layers.MaxPooling2D(2), layers.Dropout(0.5), layers.Flatten(), layers.Dense(3, name="head")]
    )  # fmt: skip
    spread_weights(model)
    for layer in model.layers:
        if hasattr(layer, "bias"):
            layer.bias.assign(np.zeros(layer.bias.shape))
    result, built = equalise(model)
    assert result.pairs == (("stem", "dw1"), ("dw1", "pw1"), ("pw1", "dw2"), ("dw2", "pw2"), ("pw2", "head"))
    assert result.sweeps < 100

    def unevenness(net: keras.Model) -> float:
        largest = np.abs(net.get_layer("dw1").get_weights()[0]).max(axis=(0, 1, 3))
        return float(largest.max() / largest.min())

    # A depthwise channel ends as the geometric mean of its own range and those around it.
    assert unevenness(built) < unevenness(model) / 3
    stem, depthwise = (np.abs(built.get_layer(name).get_weights()[0]) for name in ("stem", "dw1"))
    np.testing.assert_allclose(stem.max(axis=(0, 1, 2)), depthwise.max(axis=(0, 1, 3)), rtol=5e-3)
    head = np.abs(built.get_layer("head").get_weights()[0]).reshape(-1, 5, 3).max(axis=(0, 2))
    np.testing.assert_allclose(np.abs(built.get_layer("pw2").get_weights()[0]).max(axis=(0, 1, 2)), head, rtol=5e-3)


PAIRS = {
    "grouped": ((6, 6, 2), [layers.Conv2D(4, 3, activation="relu"), layers.Conv2D(6, 3, groups=2)]),
    "transposed": ((4, 4, 2), [layers.Conv2DTranspose(4, 3, strides=2, activation="relu"), layers.Conv2DTranspose(3, 3, padding="same")]),
    "conv1d": ((6, 2), [layers.Conv1D(4, 3, padding="causal"), layers.ReLU(), layers.MaxPooling1D(2), layers.Conv1D(3, 3, padding="same")]),
    "separable": ((6, 6, 2), [layers.SeparableConv2D(4, 3, activation="relu"), layers.Conv2D(3, 1)]),
    "conv3d": ((4, 4, 4, 1), [layers.Conv3D(3, 2, activation="relu"), layers.GlobalAveragePooling3D(), layers.Dense(2)]),
    "kept dims": ((4, 4, 1), [layers.Conv2D(3, 2, activation="relu"), layers.GlobalMaxPooling2D(keepdims=True), layers.Reshape((3,)), layers.Dense(2)]),
    "einsum": ((5, 3), [layers.EinsumDense("abc,cd->abd", (None, 6), bias_axes="d", activation="relu"), layers.EinsumDense("...d,de->...e", 2)]),
    "leaky": ((3,), [layers.Dense(4, activation="leaky_relu"), layers.Dense(2, activation="softmax")]),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_are_exact(name):
    shape, sequence = PAIRS[name]
    model = keras.Sequential([keras.Input(shape), *sequence])
    spread_weights(model)
    result, _ = equalise(model)
    assert len(result.pairs) == 1
    assert result.largest > 1.1


def test_what_ends_a_pair():
    def sequence(*between, **options):
        return keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(3, 3, **options), *between, layers.Conv2D(2, 3)])

    for model in (
        sequence(activation="relu6"),
        sequence(activation="sigmoid"),
        sequence(layers.ReLU(6.0)),
        sequence(layers.ReLU(threshold=1.0)),
        sequence(layers.BatchNormalization()),
        sequence(layers.SeparableConv2D(3, 1), layers.LayerNormalization()),
    ):
        spread_weights(model)
        assert equalise(model)[0].pairs == ()


def test_shared_layers_and_several_readers_stay():
    x = keras.Input((6, 6, 3))
    conv = layers.Conv2D(3, 3, padding="same", activation="relu")
    assert equalise(keras.Model(x, layers.Conv2D(2, 1)(conv(conv(x)))))[0].pairs == ()
    y = layers.Conv2D(3, 3, activation="relu")(x)
    assert equalise(keras.Model(x, layers.Conv2D(3, 1)(y) + y))[0].pairs == ()


def test_relu6_is_replaced_on_request():
    model = keras.Sequential(
        [keras.Input((4, 4, 2)), layers.Conv2D(3, 3, activation="relu6", name="a"), layers.Conv2D(3, 1, name="b"), layers.ReLU(6.0, name="six"),
         layers.Flatten(), layers.Dense(2, name="c"), layers.ReLU(6.0, name="last")]
    )  # fmt: skip
    result, built = equalise(model, relu6="replace")
    assert result.replaced == ("a", "six")
    assert built.get_layer("a").activation is keras.activations.relu
    assert built.get_layer("six").max_value is None
    assert built.get_layer("last").max_value == 6.0  # no pair, no need
    small = np.full((1, 4, 4, 2), 0.1, "float32")
    np.testing.assert_allclose(built(small), model(small), atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(1e-4, 1e4), min_size=12, max_size=12), st.sets(st.integers(0, 3)))
def test_ranges_meet_and_dead_channels_stay(numbers, dead):
    x = keras.Input((2,))
    model = keras.Model(x, layers.Dense(1)(layers.Dense(4, use_bias=False)(x)))
    first, second = np.array(numbers[:8], "float32").reshape(2, 4), np.array(numbers[8:], "float32").reshape(4, 1)
    first[:, sorted(dead)] = 0
    model.set_weights([first, second, np.zeros(1)])
    built = rewrite_graph(equalise_graph(trace_graph(model)).graph, repeat)
    before, behind = (
        np.abs(weight).max(axis=axis) for weight, axis in zip(built.get_weights()[:2], (0, 1), strict=True)
    )
    alive = first.max(axis=0) > 0
    np.testing.assert_allclose(before[alive], behind[alive], rtol=1e-4)
    assert np.array_equal(behind[~alive], second[~alive, 0])
    np.testing.assert_allclose(built.get_weights()[0] @ built.get_weights()[1], first @ second, rtol=1e-4)


def test_int8_per_tensor_error_falls():
    """The case of the paper: one scale for a whole depthwise kernel, or any other."""
    model = keras.Sequential(
        [keras.Input((10, 10, 3)), layers.Conv2D(8, 3, activation="relu"), layers.DepthwiseConv2D(3, activation="relu"),
         layers.Conv2D(8, 1, activation="relu"), layers.DepthwiseConv2D(3, activation="relu"), layers.Conv2D(4, 1)]
    )  # fmt: skip
    spread_weights(model)
    x = np.random.default_rng(2).normal(size=(16, 10, 10, 3)).astype("float32")
    want = np.array(model(x))

    def error(net: keras.Model) -> float:
        rounded = keras.models.clone_model(net)
        scales = [np.abs(value).max() / 127 if value.ndim > 1 else 1.0 for value in net.get_weights()]
        grid = [np.round(v / s) * s if v.ndim > 1 else v for v, s in zip(net.get_weights(), scales, strict=True)]
        rounded.set_weights(grid)
        return float(np.square(np.array(rounded(x)) - want).mean() / np.square(want).mean())

    assert error(equalise(model)[1]) < error(model) / 3
