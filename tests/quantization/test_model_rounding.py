"""AdaRound over models: closer to the float model than nearest rounding, zeros kept, shared layers, skipped ones."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import DataError, UsageError
from compress.models.copying import copy_model
from compress.quantization.calibration import calibrate
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.model_rounding import learn_roundings
from compress.quantization.scale_search import search_scales


@pytest.fixture(scope="module")
def cnn():
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 2))
    y = layers.ReLU()(layers.Conv2D(6, 3, name="conv")(x))
    y = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(y)
    model = keras.Model(x, layers.Dense(3, name="head")(layers.Flatten()(y)))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if layer.weights:
            layer.kernel.assign(rng.normal(size=layer.kernel.shape))
    kernel = keras.ops.convert_to_numpy(model.get_layer("conv").kernel)
    model.get_layer("conv").kernel.assign(np.where(np.abs(kernel) < 0.5, 0, kernel))
    return model, rng.uniform(0, 1, (80, 8, 8, 2)).astype("float32")


def error(model, q, x):
    return float(np.square(q.predict(x, verbose=0) - model.predict(x, verbose=0)).mean())


def test_outputs_come_closer_than_with_nearest_rounding(cnn, tmp_path):
    model, x = cnn
    before = model.get_weights()
    nearest = search_scales(calibrate(fake_quantize(model, "int8", bits=3), x))
    q = calibrate(fake_quantize(model, "int8", bits=3), x)
    rounded, skipped = learn_roundings(q, x, samples=40, steps=50)
    assert [each.path for each in rounded] == ["conv", "depthwise", "head"]
    assert skipped == []
    assert all(each.error <= each.nearest_error for each in rounded)
    assert error(model, q, x) < 0.7 * error(model, nearest, x)
    for mine, theirs in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    zeros = keras.ops.convert_to_numpy(model.get_layer("conv").kernel) == 0
    assert zeros.any()
    assert not q.get_layer("conv").stored_weights()[0].values[zeros].any()
    q.save(tmp_path / "q.keras")
    loaded = keras.saving.load_model(tmp_path / "q.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), q.predict(x, verbose=0))


def test_one_seed_one_result(cnn):
    model, x = cnn
    q = calibrate(fake_quantize(model, "int8", bits=3, include=["head"]), x)
    twin = copy_model(q)
    for each in (q, twin):
        learn_roundings(each, x, samples=40, steps=20)
    for mine, theirs in zip(q.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_shared_layers_learn_from_all_calls_and_others_are_reported():
    keras.utils.set_random_seed(0)
    shared = layers.Dense(4, name="shared")
    tokens = keras.Input((3,), dtype="int32")
    y = layers.LSTM(4, name="lstm")(layers.Embedding(5, 4, name="table")(tokens))
    model = keras.Model(tokens, layers.Dense(2, name="head")(shared(shared(y))))
    q = fake_quantize(model, "int8_weights", bits=3)
    x = np.random.default_rng(0).integers(0, 5, (40, 3)).astype("int32")
    rounded, skipped = learn_roundings(q, x, steps=20)
    assert [each.path for each in rounded] == ["shared", "head"]
    assert {each.path: each.reason for each in skipped} == {
        "table": "is a table: its rows are its outputs",
        "lstm": "has several quantized weights",
    }


def test_errors(cnn):
    model, x = cnn
    with pytest.raises(UsageError, match=r"a layer that AdaRound can round.*no layer is quantized"):
        learn_roundings(model, x)
    with pytest.raises(UsageError, match="conv: is stored as floats"):
        learn_roundings(fake_quantize(model, "float16"), x)
    with pytest.raises(DataError, match="'conv' must be finite"):
        learn_roundings(fake_quantize(model, "int8_weights", bits=3), np.full_like(x, np.nan))
