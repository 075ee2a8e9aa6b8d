"""The JAX and PyTorch backends of Keras, each in a child process, and what TensorFlow makes of the models that they saved."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import compress
from compress.deploy.runtimes import open_runtime

CHECKS = sorted(map(str, Path(__file__).parent.glob("*_checks.py")))
PROCESSORS = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}  # sums on a GPU come in another order


@pytest.fixture(scope="module", params=["jax", "torch"])
def shared(request, tmp_path_factory):
    """A folder with what the checks left, once they have passed on a backend."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-rs", *CHECKS],
        env={**inherited, **PROCESSORS, "KERAS_BACKEND": request.param, "BMCOMPRESS_SHARED": str(folder)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if child.returncode:
        pytest.fail(f"on {request.param}:\n{child.stdout[-6000:]}\n{child.stderr[-2000:]}", pytrace=False)
    return folder


def test_the_saved_model_gives_the_same_answers_on_tensorflow(shared):
    with np.load(shared / "answers.npz") as stored:
        x, answers = stored["x"], stored["answers"]
    model = compress.load_model(shared / "net.keras")
    assert model.loss == "sparse_categorical_crossentropy"
    assert type(model.optimizer).__name__ == "Adam"
    differences = np.abs(model.predict(x, verbose=0) - answers)
    # A value at the middle of two steps may be rounded either way.
    assert np.mean(differences < 1e-5) > 0.99
    assert differences.max() < 1 / 64


@pytest.mark.parametrize("name", ["net.tflite", "net.onnx"])
def test_files_exported_on_that_backend_agree(shared, name):
    with np.load(shared / "answers.npz") as stored:
        x, answers = stored["x"][:64], stored["answers"][:64]
    runtime = open_runtime(shared / name)
    outputs = np.concatenate([runtime.run([sample[None]])[0] for sample in x])
    assert np.mean(outputs.argmax(-1) == answers.argmax(-1)) > 0.98
    assert np.abs(outputs - answers).mean() < 1 / 256


def test_the_same_channels_are_kept_as_on_tensorflow(shared):
    from channel_checks import NAMES, kept_channels

    for name in NAMES:
        assert json.loads((shared / f"kept-{name}.json").read_text()) == kept_channels(name)
