"""What is said of a fake-quantized model, from the model itself."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from compress.errors import UsageError
from compress.models.opening import load_model
from compress.quantization.calibration import calibrate
from compress.quantization.description import QuantizationSummary, describe_quantization
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.restoration import restore_layers

X = np.random.default_rng(0).uniform(-1, 1, size=(32, 6, 6, 2)).astype("float32")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2), name="image")
    y = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    y = keras.layers.ReLU(name="relu")(y)
    y = keras.layers.Flatten(name="flat")(y)
    y = keras.layers.Dense(8, name="hidden")(y)
    y = keras.layers.LayerNormalization(name="norm")(y)
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="head")(y))


def by_layer(summary):
    return {layer.layer: layer for layer in summary.layers}


def test_integers_and_what_stays_float(model, tmp_path):
    quantized = calibrate(fake_quantize(model, "int8", bits={"hidden": 4}), X, observer="min-max")
    summary = describe_quantization(quantized)
    layers = by_layer(summary)
    assert {name: layer.compute for name, layer in layers.items()} == {
        "conv": "integer", "relu": "integer", "flat": "integer", "hidden": "integer", "norm": "float", "head": "integer",
        next(name for name in layers if "softmax" in name): "integer",
    }  # fmt: skip
    assert layers["norm"].reason == "LayerNormalization has no integer kernel"
    (kernel,) = layers["hidden"].weights
    assert (kernel.name, kernel.bits, kernel.granularity, kernel.scales) == ("kernel", 4, "per channel", 8)
    assert (kernel.size_bytes, kernel.container_bytes) == (64 * 8 // 2 + 32, 64 * 8 + 32)
    assert layers["conv"].macs == 16 * 72
    assert summary.integer_mac_share == 1
    image = summary.inputs["image"]
    assert (image.maximum - image.minimum) / 255 == pytest.approx(image.scale)
    assert image.minimum == pytest.approx(X.min(), abs=image.scale)
    assert layers["relu"].output.minimum == 0
    assert summary.float_bytes == 4 * (72 + 512 + 24)

    quantized.save(tmp_path / "q.keras")
    assert describe_quantization(load_model(tmp_path / "q.keras")) == summary
    assert QuantizationSummary.model_validate_json(summary.model_dump_json()) == summary
    json.dumps(summary.model_dump(mode="json"), allow_nan=False)
    assert "LayerNormalization has no integer kernel" in str(summary)


def test_left_out_layers(model):
    quantized = calibrate(fake_quantize(model, "int8", exclude=["hidden"]), X)
    hidden = by_layer(describe_quantization(quantized))["hidden"]
    assert (hidden.compute, hidden.weights) == ("float", ())
    assert "left out" in hidden.reason
    summary = describe_quantization(restore_layers(quantized, ["conv"]))
    assert by_layer(summary)["conv"].compute == "float"
    assert by_layer(summary)["relu"].compute == "float"
    assert summary.integer_mac_share == pytest.approx(24 / (16 * 72 + 512 + 24))


def test_uncalibrated(model):
    summary = describe_quantization(fake_quantize(model, "int8"))
    assert summary.inputs["image"].scale is None
    assert "not calibrated" in str(summary)


@pytest.mark.parametrize(
    ("scheme", "compute", "granularity"),
    [
        ("int8_dynamic", "dynamic", "per channel"),
        ("int4_weights", "float", "groups of 32"),
        ("float16", "float", "none"),
    ],
)
def test_other_schemes(model, scheme, compute, granularity):
    hidden = by_layer(describe_quantization(fake_quantize(model, scheme)))["hidden"]
    assert (hidden.compute, hidden.weights[0].granularity, hidden.output) == (compute, granularity, None)


def test_float_models_are_refused(model):
    with pytest.raises(UsageError, match="fake-quantized"):
        describe_quantization(model)
