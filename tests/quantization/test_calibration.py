"""Calibration: the ranges that it sets, and what it keeps for a second call on the same model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.quantization.calibration import calibrate
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.layers import FakeQuant, QuantizedLayer
from compress.quantization.scale_search import search_scales

X = np.random.default_rng(0).uniform(-1, 1, (80, 4)).astype("float32")


@pytest.fixture
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = layers.Dense(5, activation="relu", name="first")(inputs)
    return fake_quantize(keras.Model(inputs, layers.Dense(3, name="last")(x)), "int8", bits={"*": 8, "first": 3})


def ranges(model: keras.Model) -> dict[str, tuple[float, float]]:
    return {
        each.name: (float(each.minimum), float(each.maximum)) for each in model.layers if isinstance(each, FakeQuant)
    }


def by_hand(model: keras.Model) -> tuple[float, float]:
    """Return the extremes of the last layer, of weights on their grids and activations that are not."""
    x = X
    for layer in model.layers:
        if isinstance(layer, QuantizedLayer):
            x = x @ layer.stored_weights()[0].dequantize() + np.asarray(layer.layer.bias)
            x = np.maximum(x, 0) if layer.path_in_model == "first" else x
    return float(x.min()), float(x.max())


def test_ranges_are_those_of_weights_on_their_grids(model):
    calibrate(model, X, observer="min-max")
    assert len(ranges(model)) == 3
    np.testing.assert_allclose(list(ranges(model).values())[-1], by_hand(model), rtol=1e-4)


def test_a_second_call_sees_what_changed_meanwhile(model):
    calibrate(model, X, observer="min-max")
    before = by_hand(model)
    first = next(each for each in model.layers if isinstance(each, QuantizedLayer))
    first.weight_variable("kernel").assign(2.5 * np.asarray(first.weight_variable("kernel")))
    calibrate(model, X, observer="min-max")
    after = by_hand(model)
    assert abs(after[1] - before[1]) + abs(after[0] - before[0]) > 0.1
    np.testing.assert_allclose(list(ranges(model).values())[-1], after, rtol=1e-4)
    search_scales(model)  # scales of 3 bits get variables of their own
    calibrate(model, X, observer="min-max")
    np.testing.assert_allclose(list(ranges(model).values())[-1], by_hand(model), rtol=1e-4)


def test_a_second_call_compiles_nothing(model, monkeypatch):
    calibrate(model, X)
    wanted = ranges(model)
    calls = []
    plain = layers.Dense.call
    monkeypatch.setattr(layers.Dense, "call", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    calibrate(model, X)
    assert not calls
    assert ranges(model) == wanted


def test_a_model_keeps_no_memory_of_scales_after_calibration(model):
    calibrate(model, X)
    x = X[:2]
    before = model.predict(x, verbose=0)
    first = next(each for each in model.layers if isinstance(each, QuantizedLayer))
    first.weight_variable("kernel").assign(0 * np.asarray(first.weight_variable("kernel")))
    assert np.abs(model.predict(x, verbose=0) - before).max() > 0.01
