"""`bmcompress quantize` and `qat`, from a float model to files that were run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from compress.cli import app
from compress.deploy.runtimes import open_runtime
from compress.manifest import Manifest

QUICK = ("--data", "npz:data.npz", "--set", "benchmark.enabled=false")


@pytest.fixture
def invoke(monkeypatch, workspace):
    monkeypatch.chdir(workspace)

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return result

    return call


def test_quantize_to_files_that_take_integers(invoke, tmp_path, blobs):
    out = tmp_path / "out"
    invoke("quantize", "net.keras", *QUICK, "--samples", 64, "--io", "int8", "-o", out)
    for name in ("model.tflite", "model.onnx"):
        runtime = open_runtime(out / name)
        assert [info.dtype for info in (*runtime.inputs, *runtime.outputs)] == ["int8", "int8"]
    records = Manifest.load(out).exports
    assert {record.mean_steps is not None for record in records if record.path.startswith("model")} == {True}
    # The fake-quantized model is a model like any other for the other commands.
    assert "QuantizedLayer" in invoke("inspect", out / "model.keras").stdout
    compared = json.loads(
        invoke("compare", out / "model.keras", out / "model.tflite", "--data", "npz:data.npz", "--json").stdout
    )
    assert compared["outputs"][0]["metrics_b"]["agreement"]["value"] >= 0.99


def test_max_drop_holds_on_the_files(invoke, tmp_path):
    """With 2-bit weights the net is at a loss; layers go back to float until the files keep the promise."""
    out = tmp_path / "out"
    result = invoke("quantize", "net.keras", *QUICK, "--bits", 2, "--max-drop", "2 pp", "--to", "tflite", "-o", out)
    manifest = Manifest.load(out)
    (step,) = manifest.steps
    (note,) = [each for each in step.notes if "on the files" in each]
    drops = manifest.input_metrics["accuracy"] - np.array([step.metrics["accuracy"]])
    assert drops.max() <= 0.02 + 1e-9
    assert "allowed are 2 pp" in note
    assert "ptq" in result.stdout


def test_qat_and_a_mixed_budget(invoke, tmp_path):
    out = tmp_path / "out"
    invoke(
        "qat", "net.keras", *QUICK, "--epochs", 1, "--samples", 64, "--mixed-size", "70%", "--to", "tflite", "-o", out
    )  # fmt: skip
    step = Manifest.load(out).steps[0]
    assert step.options["mixed"]["size"] == 0.7


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--scheme", "int9"), 3, "int8"),
        (("--scheme", "int8_weights", "--io", "int8", "--to", "tflite"), 2, "io='float32'"),
        (("--exclude", "nothing"), 2, "matches no layer"),
    ],
)
def test_mistakes(invoke, tmp_path, arguments, code, text):
    result = invoke("quantize", "net.keras", *QUICK, "-o", tmp_path / "out", *arguments, code=code)
    assert text in result.output
