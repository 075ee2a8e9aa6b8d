"""The command `compare` as a user types it."""

from __future__ import annotations

import json

import jsonschema
import pytest
from typer.testing import CliRunner

from compress.cli import app
from compress.schemas import published_schema


@pytest.fixture
def invoke(monkeypatch, workspace):
    monkeypatch.chdir(workspace)

    def run(*arguments: str, code: int = 0):
        result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
        assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
        return result

    return run


def test_tables_and_verdict(invoke, tmp_path):
    written = tmp_path / "found.json"
    result = invoke("net.keras", "net.keras", "--data", "npz:data.npz", "--samples", 8, "--output", written)
    assert "conv" in result.stdout
    assert "equal" in result.stdout
    assert "100.00 %" in result.stdout
    assert "no layer is below 30 dB" in result.stdout
    document = json.loads(written.read_text())
    jsonschema.validate(document, published_schema("compare"))
    assert document["layer_samples"] == 8
    assert document["outputs"][0]["flips"] == 0


def test_other_models_exit_0_and_say_where_they_part(invoke):
    result = invoke("net.keras", "teacher.keras", "--take", 16, "--data", "npz:data.npz", "--json")
    found = json.loads(result.stdout)
    assert found["first_parting"]["layer"]
    assert found["data"]["samples"] == 16


def test_mistakes(invoke, workspace, tmp_path):
    assert "does not exist" in invoke("net.keras", "none.tflite", code=4).stderr
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x01 nothing")
    assert "broken.onnx" in invoke(broken, "net.keras", code=4).stderr
    invoke("net.keras", code=2)
    invoke("net.keras", "net.keras", "--samples", 0, code=2)
