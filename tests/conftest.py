"""Tiny models and data that the tests share. Nothing here needs a network or a file outside `tmp_path`."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest


@pytest.fixture(scope="module", autouse=True)
def _seeded_module():
    """What the fixtures of a module draw does not depend on the modules before it."""
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _seeded(_seeded_module):
    """What a test draws does not depend on the tests before it."""
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def blobs():
    """Four classes of points in 8 x 8 images with one bright quarter: `(x, y)` for training and for testing."""
    rng = np.random.default_rng(0)

    def make(samples: int):
        y = np.arange(samples) % 4
        x = rng.normal(0.0, 0.4, (samples, 8, 8, 1)).astype("float32")
        for quarter in range(4):
            row, column = 4 * (quarter // 2), 4 * (quarter % 2)
            x[y == quarter, row : row + 4, column : column + 4] += 1
        return x, y

    return make(256), make(128)


@pytest.fixture(scope="session")
def cnn_factory():
    """Return a function that builds a small compiled classifier for `blobs`."""

    def build(filters: int = 4, name: str = "net", seed: int = 0):
        import keras

        keras.utils.set_random_seed(seed)
        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1), name="image"),
                layers.Conv2D(filters, 3, activation="relu", name="conv"),
                layers.BatchNormalization(name="norm"),
                layers.MaxPooling2D(name="pool"),
                layers.Flatten(name="flat"),
                layers.Dense(4, activation="softmax", name="head"),
            ],
            name=name,
        )
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    return build


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, blobs, cnn_factory):
    """A folder as a user has it: `data.npz`, a trained `net.keras` and a larger trained `teacher.keras`."""
    folder = tmp_path_factory.mktemp("workspace")
    (x_train, y_train), (x_test, y_test) = blobs
    np.savez(folder / "data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    for filters, name in ((4, "net"), (8, "teacher")):
        model = cnn_factory(filters, name)
        model.fit(x_train, y_train, epochs=4, batch_size=32, verbose=0)
        model.save(folder / f"{name}.keras")
    return folder
