"""The options of `ptq` beyond calibration: what each changes, what data it reads, and combinations that cannot be."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from pydantic import ValidationError

from compress.errors import DataError, UsageError
from compress.passes.ptq import PostTrainingQuantization


@pytest.fixture(scope="module")
def trained():
    """Return a model with a bias in every layer, and samples whose channels are correlated."""
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(6, 3, activation="relu", name="conv")(x)
    y = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(y)
    y = layers.Dense(16, activation="relu", name="wide")(layers.Flatten()(y))
    model = keras.Model(x, layers.Dense(4, name="head")(y))
    return model, np.random.default_rng(0).uniform(0, 1, (120, 8, 8, 3)).astype("float32")


def error(trained, **options) -> float:
    model, x = trained
    quantized = PostTrainingQuantization(**options)(model, (x, None))
    return float(np.square(quantized.predict(x, verbose=0) - model.predict(x, verbose=0)).mean())


def test_each_way_of_rounding_comes_closer_than_nearest(trained):
    nearest = error(trained, bits=3, correct_biases=False)
    assert error(trained, bits=3) < 0.7 * nearest
    assert error(trained, bits=3, rounding="gptq", correct_biases=False) < 0.7 * nearest


def test_learned_rounding_comes_closer_than_nearest(trained):
    options = {"bits": 3, "include": ("wide",), "samples": 64, "correct_biases": False}
    nearest = error(trained, **options)
    assert error(trained, **options, rounding="adaround", rounding_steps=60) < 0.9 * nearest


def test_activation_aware_weights(trained):
    found = [
        error(trained, scheme="int4_weights", bits=3, activation_aware=aware, rounding="gptq")
        for aware in (True, False)
    ]
    assert found[0] != found[1]
    assert found[0] < 0.8 * error(trained, scheme="int4_weights", bits=3)


def test_the_model_stays_as_it_is(trained):
    model, _ = trained
    before = model.get_weights()
    error(trained, scheme="int4_weights", rounding="gptq", activation_aware=True)
    for mine, theirs in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("options", "splits"),
    [
        ({}, ("train",)),
        ({"scheme": "int8_weights"}, ()),
        ({"scheme": "int8_weights", "rounding": "gptq"}, ("train",)),
        ({"scheme": "int8_weights", "correct_biases": True}, ("train",)),
        ({"scheme": "int4_weights", "activation_aware": True}, ("train",)),
        ({"scheme": "float16"}, ()),
    ],
)
def test_data_that_is_needed(options, splits):
    assert PostTrainingQuantization(**options).needs_data() == splits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "float16", "rounding": "gptq"}, "integer weights. Received: scheme=float16"),
        ({"scheme": "bfloat16", "correct_biases": True}, "integer weights. Received: scheme=bfloat16"),
        ({"scheme": "int8", "activation_aware": True}, "int8_weights or int4_weights. Received: scheme=int8"),
        ({"rounding": "gptq", "rounding_steps": 20}, "rounding: adaround. Received: rounding=gptq"),
    ],
)
def test_combinations_that_cannot_be(options, message):
    with pytest.raises(ValidationError, match=message):
        PostTrainingQuantization(**options)


def test_layers_that_a_method_leaves_out_are_noted(trained):
    model, x = trained
    item = PostTrainingQuantization(rounding="gptq", samples=16)
    (note,) = item.notes(item(model, (x, None)))
    assert note == (
        "GPTQ left layers as rounding to nearest makes them: "
        "depthwise is no matrix product that GPTQ knows: DepthwiseConv2D"
    )
    assert PostTrainingQuantization().notes(model) == []


def test_options_without_a_layer_to_change_are_said_before_calibration():
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, layers.DepthwiseConv2D(3, name="depthwise")(x))
    bad = np.full((4, 8, 8, 3), np.nan, "float32")  # calibration would refuse it
    with pytest.raises(UsageError, match="a layer that GPTQ can round"):
        PostTrainingQuantization(rounding="gptq")(model, (bad, None))
    with pytest.raises(UsageError, match="layers that AWQ can scale"):
        PostTrainingQuantization(scheme="int4_weights", activation_aware=True)(model, (bad, None))
    with pytest.raises(DataError, match="train"):
        PostTrainingQuantization(scheme="int8_weights", rounding="adaround")(model)
