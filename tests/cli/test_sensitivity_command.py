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


def test_zeros_layer_by_layer(workspace, monkeypatch, tmp_path):
    monkeypatch.chdir(workspace)
    arguments = ["net.keras", "--data", "npz:data.npz", "--of", "sparsity", "--samples", 32]
    found = json.loads(run(*arguments, "--sparsities", "50%,0.9", "--plot", tmp_path / "p.svg", "--json").stdout)
    assert found["metric_name"] == "accuracy"
    assert [kernel["path"] for kernel in found["kernels"]] == ["conv/kernel", "head/kernel"]
    assert [point["sparsity"] for point in found["kernels"][0]["points"]] == [0.5, 0.9]
    assert 0 <= found["kernels"][0]["points"][1]["metric"] <= 1
    assert "conv/kernel" in (tmp_path / "p.svg").read_text()
    table = run(*arguments, "--pattern", "2:4", "--include", "head", "-q").stdout
    assert "50% zeros" in table
    assert "conv" not in table.replace("net.keras", "")
    assert "accuracy on 32 samples" in table


def test_a_plot_of_quantization(workspace, monkeypatch, tmp_path):
    monkeypatch.chdir(workspace)
    run("net.keras", "--data", "npz:data.npz", "--samples", 8, "--plot", tmp_path / "p.png", "-q")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    assert "no --data" in run("net.keras", code=2).stderr
    assert "expected a scheme" in run("net.keras", "--data", "npz:data.npz", "--scheme", "int3", code=2).stderr
    reference = ["net.keras", "--data", "npz:data.npz"]
    assert "--sparsities does not go" in run(*reference, "--sparsities", "0.5", code=2).stderr
    assert "--scheme does not go" in run(*reference, "--of", "sparsity", "--scheme", "int8", code=2).stderr
    assert "such as 0.5,0.8" in run(*reference, "--of", "sparsity", "--sparsities", "much", code=2).stderr
    sparsity = [*reference, "--of", "sparsity", "--sparsities"]
    assert "such as 0.5,0.8" in run(*sparsity, ",", code=2).stderr
    assert "pattern 2:4 has sparsity 0.5" in run(*sparsity, "80%", "--pattern", "2:4", code=2).stderr
    assert ".png, .svg, .pdf" in run(*reference, "--plot", "plot.doc", code=2).stderr
    monkeypatch.setattr("compress.cli.plots.find_spec", lambda name: None)
    assert 'pip install "bmcompress[plot]"' in run(*reference, "--plot", "plot.png", code=8).stderr
