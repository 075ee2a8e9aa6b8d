"""Opening model files: custom classes only from packages that the invoker trusts, custom losses without a crash."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest

from compress.errors import ModelError
from compress.models.digest import compile_digest, content_digest
from compress.models.opening import load_model, trust_packages

LAYERS = """
import keras

class Doubling(keras.layers.Layer):
    def call(self, x):
        return 2 * x

@keras.saving.register_keras_serializable(package="acme")
class Tripling(keras.layers.Layer):
    def call(self, x):
        return 3 * x
"""


@pytest.fixture
def custom_model(tmp_path, monkeypatch):
    (tmp_path / "acme_layers.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import acme_layers

    model = keras.Sequential([keras.Input((3,)), acme_layers.Doubling(), acme_layers.Tripling(), keras.layers.Dense(2)])
    model.save(tmp_path / "m.keras")
    yield tmp_path / "m.keras", model
    sys.modules.pop("acme_layers", None)


def test_custom_classes_need_trust(custom_model):
    path, model = custom_model
    with pytest.raises(ModelError, match="Doubling") as caught:
        load_model(path)
    assert "--allow-import acme_layers" in caught.value.help
    x = np.ones((2, 3), "float32")
    assert np.array_equal(load_model(path, allow_imports=("acme_layers",))(x), model(x))
    with trust_packages(("acme_layers",)):
        assert np.array_equal(load_model(path)(x), model(x))
    with pytest.raises(ModelError):
        load_model(path)


def test_loss_that_cannot_be_restored_is_left_out(tmp_path, caplog):
    def my_loss(y, p):
        return keras.ops.mean((y - p) ** 2)

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", my_loss)
    model.save(tmp_path / "m.keras")
    loaded = load_model(tmp_path / "m.keras")
    assert not loaded.compiled
    assert "cannot be restored" in caplog.text


def test_pinned_digest(tmp_path):
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match="another file than the recipe pins"):
        load_model(tmp_path / "m.keras", sha256="0" * 64)


def test_compile_settings_have_a_digest_of_their_own(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    digests = []
    for loss in ("mse", "mse", "mae"):
        model.compile("sgd", loss)
        model.save(tmp_path / "m.keras")
        digests.append((content_digest(tmp_path / "m.keras"), compile_digest(tmp_path / "m.keras")))
    assert digests[0] == digests[1]
    assert digests[1][0] == digests[2][0]
    assert digests[1][1] != digests[2][1]
