"""Commands as a user types them: what they print where, and the exit code of each kind of mistake."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from compress.cli import app


@pytest.fixture
def invoke(monkeypatch, workspace):
    """Return a function that runs a command in the user's folder."""
    monkeypatch.chdir(workspace)

    def run(*arguments: str, code: int = 0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
        return result

    return run


def test_version_and_help(invoke):
    assert invoke("--version").stdout.startswith("bmcompress 0.")
    for command in (
        "run",
        "distill",
        "prune",
        "finetune",
        "quantize",
        "qat",
        "export",
        "benchmark",
        "compare",
        "sensitivity",
        "inspect",
        "check",
        "quickstart",
        "recipe",
    ):
        assert invoke(command, "--help").stdout


def test_prune_then_check(invoke, tmp_path):
    out = tmp_path / "out"
    result = invoke(
        "prune", "net.keras", "--sparsity", "50%", "--data", "npz:data.npz", "--epochs", 1, "--to", "tflite", "-o", out,
        "--set", "benchmark.enabled=false", "--set", "budgets=[{artifact: tflite, file: 1 MiB, accuracy: {min: 10%}}]",
    )  # fmt: skip
    assert "model.tflite" in result.stdout
    assert "prune: accuracy" in result.stdout
    assert "loss: sparse_categorical_crossentropy (from the compiled model)" in result.stderr
    assert "loss:" not in result.stdout
    assert "accuracy.min" in invoke("check", out).stdout
    sizes = json.loads(invoke("check", out, "--size-only", "--json").stdout)
    assert [v["limit"] for v in sizes["verdicts"]] == ["file"]


def test_broken_budget_file_exits_6(invoke, tmp_path, workspace):
    budget = tmp_path / "b.yaml"
    budget.write_text(
        "schema: bmcompress/budget/v1\n"
        f"artifacts: {{net: {workspace}/net.keras}}\n"
        "budgets:\n  - {artifact: net, file: 1 KiB}\n"
    )
    result = invoke("check", budget, "--size-only", code=6)
    assert "fail" in result.stdout
    assert "1 of 1 limits are broken: net: file" in result.stderr
    budget.write_text(budget.read_text().replace("1 KiB", "1 KIB"))
    assert f"{budget}:4: budgets.0.file: expected a size" in invoke("check", budget, code=3).stderr


def test_print_recipe_is_the_same_run(invoke, tmp_path):
    arguments = [
        "prune",
        "net.keras",
        "--sparsity",
        "0.5",
        "--data",
        "npz:data.npz",
        "--epochs",
        0,
        "--to",
        "none",
    ]
    text = invoke(*arguments, "--rescale", "1/2", "--print-recipe").stdout
    recipe = yaml.safe_load(text)
    assert recipe["passes"][0] | {"sparsity": 0.5, "epochs": 0, "type": "prune"} == recipe["passes"][0]
    assert recipe["data"]["train"]["preprocess"] == [{"rescale": 0.5}]
    (tmp_path / "r.yaml").write_text(text)
    assert invoke("recipe", "show", tmp_path / "r.yaml").stdout == text


def test_distill_with_unlabelled_inputs(invoke, workspace, blobs, tmp_path):
    np.savez(workspace / "more.npz", x=blobs[0][0])
    command = ["distill", "--teacher", "teacher.keras", "--student", "net.keras", "--data", "npz:data.npz?take=16"]
    command += ["--unlabelled", "npz:more.npz", "--epochs", 1, "--to", "none", "-o", tmp_path / "o"]
    recipe = yaml.safe_load(invoke(*command, "--print-recipe").stdout)
    assert recipe["data"]["unlabelled"]["labels"] is False
    assert "split" not in recipe["data"]["unlabelled"]
    result = invoke(*command, "--json")
    manifest = json.loads(result.stdout)
    assert set(manifest["data"]) == {"train", "test", "unlabelled"}
    assert manifest["steps"][0]["type"] == "distill"


def test_inspect(invoke):
    result = invoke("inspect", "net.keras")
    assert "conv" in result.stdout
    assert "1 kernel, 36 weights" in result.stdout
    summary = json.loads(invoke("inspect", "net.keras", "--json", "--exclude", "head").stdout)
    assert {layer["path"]: layer["passes"]["prune"] for layer in summary["layers"]}["head"] == "no: excluded by pattern"


def test_inspect_says_what_sparse_kernels_accept(invoke):
    result = invoke("inspect", "net.keras", "--xnnpack")
    assert "no speed is promised" in result.stdout
    layers = json.loads(invoke("inspect", "net.keras", "--xnnpack", "--json").stdout)["layers"]
    assert {layer["path"]: layer["qualifies"] for layer in layers} == {"conv": False, "head": False}


def test_dry_run_says_what_would_be_done_and_does_nothing(invoke, workspace, tmp_path):
    text = invoke("prune", "net.keras", "--sparsity", "0.5", "--data", "npz:data.npz", "--print-recipe").stdout
    (tmp_path / "r.yaml").write_text(text)
    plan = json.loads(invoke("run", tmp_path / "r.yaml", "--dry-run", "--json", "-o", tmp_path / "o").stdout)
    assert [step["step"] for step in plan["steps"]] == [
        "input",
        "prune",
        "export tflite",
        "export onnx",
        "benchmark",
    ]
    assert not (tmp_path / "o").exists()
    assert plan["expectations"][0].startswith("prune: zeros (unstructured) make the compressed file smaller")
    text = invoke("run", tmp_path / "r.yaml", "--dry-run", "-o", tmp_path / "o").stdout
    assert plan["expectations"][0] in text


def test_benchmark_without_keras_files(invoke, workspace, tmp_path):
    invoke("export", "net.keras", "-o", tmp_path, "--data", "npz:data.npz")
    files = [tmp_path / "net.tflite", tmp_path / "net.onnx"]
    report = json.loads(invoke("benchmark", *files, "--data", "npz:data.npz", "--processes", 1, "--json").stdout)
    assert [r["file"] for r in report["results"]] == ["net.tflite", "net.onnx"]
    assert report["results"][1]["quality"]["agreement"]["value"] == 1.0
    assert report["results"][1]["quality"]["accuracy"]["n"] == 128


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prune", "net.keras"], 2, "expected --sparsity"),
        (["prune-channels", "net.keras"], 2, "expected one of --ratio"),
        (["factorize", "net.keras", "--energy", "0.9", "--rank", "4"], 2, "expected one of --energy"),
        (["prune-blocks", "net.keras"], 2, "expected one of --count"),
        (["prune-blocks", "net.keras", "--count", "1", "--data", "npz:data.npz"], 2, "expected residual blocks"),
        (["prune", "net.keras", "--sparsity", "0.5", "--sparcity", "1"], 2, "No such option"),
        (["prune", "net.keras", "--sparsity", "1.5", "--epochs", "0"], 3, "less than 1"),
        (["prune", "nets.keras", "--sparsity", "0.5", "--epochs", "0"], 4, "nets.keras"),
        (["prune", "data.npz", "--sparsity", "0.5", "--epochs", "0"], 4, "data.npz"),
        (["prune", "net.keras", "--sparsity", "0.5"], 4, "needs a 'train' split"),
        (["prune", "net.keras", "--sparsity", "0.5", "--data", "nzp:data.npz"], 2, "did you mean `npz:`?"),
        (
            ["prune", "net.keras", "--sparsity", "0.5", "--epochs", "0", "--to", "tflight"],
            2,
            "expected tflite",
        ),
        (
            ["prune", "net.keras", "--sparsity", "0.5", "--epochs", "0", "--exclude", "hed"],
            2,
            "Did you mean 'head'?",
        ),
        (
            ["prune", "net.keras", "--sparsity", "0.5", "--epochs", "0", "--set", "passes.prun.x=1"],
            3,
            "no entry `prun`",
        ),
        (["prune", "net.keras", "--sparsity", "0.5", "--data", "mod:function"], 3, "--allow-import mod"),
        (["run", "quickstrat"], 3, "Did you mean `quickstart`?"),
        (["inspect", "data.npz"], 4, "data.npz"),
        (["inspect", "net.keras", "--include", "cnov"], 2, "Did you mean 'conv'?"),
        (["benchmark", "data.npz"], 4, "data.npz"),
        (["check", "nothing.yaml"], 3, "cannot be read"),
        (["check", "."], 2, "directory of a run"),
        (["recipe", "schema", "--of", "recipes"], 2, "expected one of recipe"),
    ],
)
def test_mistakes(invoke, tmp_path, arguments, code, message):
    if arguments[0] == "prune":
        arguments = [*arguments, "-o", str(tmp_path / "o")]
    result = invoke(*arguments, code=code)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((0, 8, 8, 1)), "y_train": np.zeros(0, int)}, "0 samples"),
        ({"y_train": np.full(256, 7)}, "label 7 of a 4-class head"),
        ({"y_train": np.full(256, -1)}, "label -1 of a 4-class head"),
        ({"y_train": np.zeros(255, int)}, "256"),
        ({"x_train": np.zeros((256, 9, 8, 1), "float32")}, "(8, 8, 1)"),
        ({"x_train": np.zeros((256, 8, 8, 3), "float32")}, "3 channels instead of 1"),
        ({"x_train": np.full((256, 8, 8, 1), np.nan, "float32")}, "must be finite"),
        ({"y_train": np.zeros((256, 4), "float32")}, "one-hot"),
    ],
)
def test_bad_data_is_one_line_before_training(invoke, blobs, tmp_path, change, message):
    (x, y), (x_test, y_test) = blobs
    np.savez(tmp_path / "bad.npz", **{"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, **change})
    data = f"npz:{tmp_path / 'bad.npz'}"
    result = invoke("prune", "net.keras", "--sparsity", "0.5", "--data", data, "-o", tmp_path / "o", code=4)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "o").exists()


def test_json_errors_are_json(invoke):
    answer = json.loads(invoke("inspect", "missing.keras", "--json", code=4).stdout)
    assert answer["error"]["type"] == "ModelError"
    assert answer["error"]["exit_code"] == 4


def test_recipe_commands(invoke, tmp_path):
    assert "quickstart: valid" in invoke("recipe", "validate", "quickstart").stdout
    listed = json.loads(invoke("recipe", "list", "--json").stdout)
    assert set(listed["passes"]) == {
        "cluster", "distill", "factorize", "finetune", "prune", "prune_blocks", "prune_channels", "ptq", "qat"
    }  # fmt: skip
    for name in ("recipe", "budget", "benchmark", "manifest", "check", "baseline", "inspect", "compare"):
        assert json.loads(invoke("recipe", "schema", "--of", name).stdout)["$schema"]
    bad = tmp_path / "bad.yaml"
    bad.write_text("schema: bmcompress/recipe/v1\nname: x\nmodel: {path: m.keras}\npasses: [{type: prun}]\n")
    assert (
        f"{bad}:4: passes.0: unknown pass `prun`; did you mean `prune`?"
        in invoke("recipe", "validate", bad, code=3).stderr
    )
