"""`bmcompress sensitivity`: the table, the JSON, and mistakes."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from compress.cli import app


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["sensitivity", *map(str, arguments)])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


def test_layers_by_sensitivity(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    found = json.loads(run("net.keras", "--data", "npz:data.npz", "--samples", 16, "--json").stdout)
    losses = [each["loss"] for each in found]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) > 1
    table = run("net.keras", "--data", "npz:data.npz", "--samples", 16, "--scheme", "int8_weights", "-q").stdout
    assert all(each["layer"] in table for each in found)


def test_mistakes(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    assert "no --data" in run("net.keras", code=2).stderr
    assert "expected a scheme" in run("net.keras", "--data", "npz:data.npz", "--scheme", "int3", code=2).stderr
