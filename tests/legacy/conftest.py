"""Models of tf_keras and tfmot, made in this process and saved as users have them."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def _needs_the_extra():
    # Not importorskip: importing tfmot changes the environment, which the package takes care of.
    if not all(find_spec(name) for name in ("tf_keras", "tensorflow_model_optimization")):
        pytest.skip('tfmot is not installed: pip install ".[test,tfmot]"')


@pytest.fixture(scope="session")
def k2():
    """tf_keras."""
    import tf_keras

    return tf_keras


@pytest.fixture(scope="session")
def tfmot():
    """tfmot, imported as the package does it."""
    from compress.legacy.twins import import_tfmot

    return import_tfmot()


@pytest.fixture(scope="session")
def images():
    """`(x, y)`: 64 images of 8 x 8 x 3 and their classes, of which there are 4."""
    x = np.random.default_rng(0).standard_normal((64, 8, 8, 3)).astype("float32")
    return x, (np.arange(64) % 4).astype("int64")
