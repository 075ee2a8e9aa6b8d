"""GPTQ over models: error below nearest rounding in every layer, groups, several axes, layers that saw nothing."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import DataError, UsageError
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.model_gptq import apply_gptq
from compress.quantization.scale_search import search_scales


@pytest.fixture(scope="module")
def attention():
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 12))
    y = layers.MultiHeadAttention(2, 6, name="attention")(x, x) + x
    y = layers.Dense(20, activation="relu", name="wide")(y)
    model = keras.Model(x, layers.Dense(4, name="head")(layers.GlobalAveragePooling1D()(y)))
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(90, 6, 4)) @ rng.normal(size=(4, 12)) + 0.2 * rng.normal(size=(90, 6, 12))
    return model, mixed.astype("float32")


def error(model, q, x):
    return float(np.square(q.predict(x, verbose=0) - model.predict(x, verbose=0)).mean())


@pytest.mark.parametrize("group_size", [None, 5])
def test_outputs_come_closer_than_with_nearest_rounding(attention, group_size):
    model, x = attention
    options = {"bits": 3, "group_size": group_size}
    q = fake_quantize(model, "int8_weights", **options)
    rounded, skipped = apply_gptq(q, x)
    names = ["query", "key", "value", "attention_output"]
    assert {each.path for each in rounded} == {*(f"attention/{name}" for name in names), "wide", "head"}
    assert skipped == []
    assert all(each.error < 0.9 * each.nearest_error for each in rounded)
    assert error(model, q, x) < 0.7 * error(model, search_scales(fake_quantize(model, "int8_weights", **options)), x)


def test_convolutions_are_rounded_and_others_reported():
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(5, 3, strides=2, padding="same", name="conv")(x)
    y = layers.DepthwiseConv2D(3, name="depthwise")(y)
    model = keras.Model(x, layers.Conv2DTranspose(2, 2, name="transposed")(y))
    kernel = keras.ops.convert_to_numpy(model.get_layer("conv").kernel).copy()
    kernel[0, 1] = 0
    model.get_layer("conv").kernel.assign(kernel)
    q = fake_quantize(model, "int8_weights", bits=3)
    samples = np.random.default_rng(0).uniform(0, 1, (40, 8, 8, 3)).astype("float32")
    rounded, skipped = apply_gptq(q, samples)
    assert [each.path for each in rounded] == ["conv"]
    assert rounded[0].error < 0.5 * rounded[0].nearest_error
    assert [each.path for each in skipped] == ["depthwise", "transposed"]
    assert skipped[0].reason == "is no matrix product that GPTQ knows: DepthwiseConv2D"
    assert not q.get_layer("conv").stored_weights()[0].values[0, 1].any()


def test_a_layer_that_sees_nothing_is_an_error_that_names_it():
    x = keras.Input((4,))
    y = layers.Dense(3, kernel_initializer="zeros", name="dead")(x)
    q = fake_quantize(keras.Model(x, layers.Dense(2, name="starved")(y)), "int8_weights", bits=4)
    with pytest.raises(DataError, match=r"'starved' must see calibration data. Received: 8 inputs, all of them zero"):
        apply_gptq(q, np.ones((8, 4), "float32"))
    with pytest.raises(DataError, match="data=None"):
        apply_gptq(q, None)


def test_nothing_to_round_is_an_error():
    x = keras.Input((8, 8, 3))
    q = fake_quantize(keras.Model(x, layers.DepthwiseConv2D(3, name="depthwise")(x)), "int8")
    with pytest.raises(UsageError, match=r"a layer that GPTQ can round.*depthwise: is no matrix product"):
        apply_gptq(q, np.ones((8, 8, 8, 3), "float32"))
