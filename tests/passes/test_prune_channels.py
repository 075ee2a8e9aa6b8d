"""The pass `prune_channels`: what it leaves, records and exports, alone and with others."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from pydantic import ValidationError

import compress
from compress.errors import UsageError
from compress.passes.prune_channels import ChannelPruning

X = np.random.default_rng(0).normal(size=(256, 8, 8, 3)).astype("float32")
Y = (X.mean(axis=(1, 2, 3)) > 0).astype("int64")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(32, 3, padding="same", name="first")(x)
    y = layers.ReLU()(layers.BatchNormalization(name="norm")(y))
    y = layers.Add()([y, layers.Conv2D(32, 3, padding="same", name="second")(y)])
    y = layers.Dense(2, activation="softmax", name="head")(layers.GlobalAveragePooling2D()(y))
    model = keras.Model(x, y)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(X, Y, epochs=3, verbose=0)
    return model


def test_narrower_trained_and_recorded(model):
    cut = ChannelPruning(ratio="50%", epochs=2)
    result = cut(model, (X, Y))
    kept = cut.record()["kept_channels"]
    assert set(kept) == {"first", "second"}
    assert kept["first"] == kept["second"]
    assert len(kept["first"]) == 16
    assert result.get_layer("first").kernel.shape == (3, 3, 3, 16)
    assert result.compiled
    before, after = (float(each.evaluate(X, Y, verbose=0)[1]) for each in (model, result))
    assert after > before - 0.1


def test_without_data_it_only_cuts(model):
    cut = ChannelPruning(ratio=0.5, epochs=0)
    assert cut.needs_data() == ()
    result = cut(model)
    kept = cut.record()["kept_channels"]["first"]
    np.testing.assert_array_equal(result.get_layer("norm").gamma, np.array(model.get_layer("norm").gamma)[kept])


def test_steps_remember_channels_of_the_first_model(model):
    cut = ChannelPruning(ratio=0.75, steps=2, epochs=0)
    result = cut(model)
    kept = cut.record()["kept_channels"]["first"]
    assert result.get_layer("first").filters == len(kept) == 8
    np.testing.assert_array_equal(
        result.get_layer("first").kernel, np.array(model.get_layer("first").kernel)[..., kept]
    )


def test_what_cannot_be_is_said_before_training(model):
    with pytest.raises(ValidationError, match="less than 1"):
        ChannelPruning(ratio=1)
    for options in ({}, {"ratio": 0.5, "target": {"macs": 0.5}}, {"target": {}}, {"target": {"time": 0.5}}):
        with pytest.raises(ValidationError):
            ChannelPruning(**options)
    with pytest.raises(UsageError, match="matches no layer"):
        ChannelPruning(ratio={"third": 0.5}).check(model)
    with pytest.raises(UsageError, match="channels that can be removed"):
        ChannelPruning(ratio=0.5, exclude=("first",)).check(model)


def test_in_a_recipe_with_eight_bits(model, tmp_path):
    model.save(tmp_path / "m.keras")
    np.savez(tmp_path / "d.npz", x_train=X[:192], y_train=Y[:192], x_test=X[192:], y_test=Y[192:])
    recipe = {
        "schema": "bmcompress/recipe/v1",
        "name": "narrow",
        "model": {"path": str(tmp_path / "m.keras")},
        "data": f"npz:{tmp_path / 'd.npz'}",
        "passes": [{"type": "prune_channels", "ratio": 0.5, "epochs": 1, "teacher": "input"}, {"type": "ptq"}],
        "exports": [{"format": "tflite"}, {"format": "onnx"}],
        "benchmark": {"enabled": False},
    }
    run = compress.run(recipe, tmp_path / "run")
    step = run.manifest.steps[0]
    assert len(step.record["kept_channels"]["first"]) == 16
    assert step.statistics["macs"] < 0.4 * run.manifest.input_statistics["macs"]
    assert all(path.exists() for path in run.artifacts.values())
