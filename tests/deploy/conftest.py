"""Tiny models of every kind, each exported once to both formats for all tests of this folder."""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest

from compress.deploy.exporting import export_models

L = keras.layers


class Scale(L.Layer):
    """A custom layer that nobody registered."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="random_normal", name="factor")

    def call(self, x):
        return x * (1 + self.factor)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.hidden = [L.Dense(6, activation="relu", name="hidden"), Scale(name="scale")]
        self.head = L.Dense(3, name="head")

    def call(self, x):
        for layer in self.hidden:
            x = layer(x)
        return {"logits": self.head(x), "features": x}


def cnn():
    layers = [
        L.Conv2D(4, 3, name="conv"),
        L.BatchNormalization(name="bn"),
        L.ReLU(name="relu"),
        L.Flatten(name="flat"),
    ]
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), *layers, L.Dense(3, activation="softmax", name="head")], name="cnn"
    )
    model.get_layer("bn").moving_mean.assign([0.1, -0.2, 0.3, 0.0])
    model.get_layer("bn").moving_variance.assign([0.5, 2.0, 1.0, 1.5])
    return model


def several():
    """Inputs and outputs that a converter would sort another way, two of one shape; a shared layer."""
    left, right = keras.Input((4,), name="z:left"), keras.Input((4,), name="a right")
    tokens = keras.Input((3,), dtype="int32", name="m_tokens")
    shared = L.Dense(5, activation="tanh", name="shared")
    table = L.Embedding(2, 5, name="table")(tokens)
    joined = shared(left) - 2 * shared(right) + keras.ops.mean(table, axis=1)
    inner = keras.Sequential(
        [keras.Input((5,)), L.Dense(4, name="inner_dense"), Scale(name="inner_scale")], name="block"
    )
    outputs = [
        L.Dense(2, name="zeta")(joined),
        L.Softmax(name="probabilities")(inner(joined)),
        L.Dense(2, name="alpha")(joined),
    ]
    return keras.Model([left, right, tokens], outputs, name="several")


def named():
    """A model that takes and returns dicts, whose keys are not the names of its inputs."""
    inputs = {"wide": keras.Input((4,), name="first"), "deep": keras.Input((4,), name="second")}
    both = inputs["wide"] - 3 * inputs["deep"]
    return keras.Model(inputs, {"sum": L.Dense(1, name="d1")(both), "class": L.Dense(3, name="d2")(both)}, name="named")


def recurrent():
    layers = [L.LSTM(4, name="lstm"), L.Dense(2, name="head")]
    return keras.Sequential([keras.Input((6, 3)), *layers], name="recurrent")


def mixed():
    policy = "mixed_float16"
    inputs = keras.Input((8, 8, 2), name="image")
    x = L.Conv2D(4, 3, dtype=policy, activation="relu", name="conv")(inputs)
    x = L.GlobalAveragePooling2D(dtype=policy, name="pool")(x)
    return keras.Model(inputs, L.Dense(3, dtype=policy, name="head")(x), name="mixed")


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 5), "float32"))
    return model


def _samples(name):
    generator = np.random.default_rng(1)
    normal = lambda *shape: generator.standard_normal((10, *shape))  # noqa: E731
    return {
        "cnn": normal(8, 8, 1),
        "several": [normal(4), normal(4).astype("float32"), generator.integers(0, 2, (10, 3))],
        "named": {"wide": normal(4), "deep": normal(4)},
        "recurrent": normal(6, 3),
        "mixed": None,
        "subclassed": None,
    }[name]


MODELS = {function.__name__: function for function in (cnn, several, named, recurrent, mixed, subclassed)}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Return `get(name)`: the model, its samples, the two files and their records; each is made once."""
    made = {}

    def get(name):
        if name not in made:
            keras.utils.set_random_seed(3)
            model, folder, x = MODELS[name](), tmp_path_factory.mktemp(name), _samples(name)
            paths = {"tflite": folder / "m.tflite", "onnx": folder / "m.onnx"}
            records = {record.format: record for record in export_models(model, paths, samples=x)}
            made[name] = SimpleNamespace(model=model, x=x, paths=paths, records=records)
        return made[name]

    return get
