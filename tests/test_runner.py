"""Runs: resumed, locked, reverted, stopped; the record of what was done; nothing done twice, nothing lost."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import compress
import compress.schemas
from compress.errors import BudgetError, DataError, LockedError, ModelError, PassError, UsageError
from compress.models.digest import content_digest


def recipe(workspace: Path, *passes: dict, **sections) -> dict:
    """Return a recipe that trains and measures nothing, unless `data` says otherwise."""
    return {
        "schema": "bmcompress/recipe/v1",
        "name": "test",
        "seed": 3,
        "model": {"path": str(workspace / "net.keras")},
        "data": {"train": f"npz:{workspace / 'data.npz'}?split=train"},
        "passes": list(passes),
        "benchmark": {"enabled": False},
        **sections,
    }


def everything(workspace: Path) -> str:
    """Return the data reference with a test split, on which the files are measured."""
    return f"npz:{workspace / 'data.npz'}"


PRUNE = {"type": "prune", "sparsity": 0.5, "epochs": 2, "batch_size": 32}


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory):
    """A finished run of distil, prune and both exports, with its latency measured."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    passes = [
        {
            "type": "distill",
            "teacher": {"path": str(workspace / "teacher.keras")},
            "epochs": 2,
            "batch_size": 32,
        },
        PRUNE,
    ]
    exports = [{"format": "tflite"}, {"format": "onnx"}]
    sections = {
        "data": everything(workspace),
        "exports": exports,
        "budgets": [{"artifact": "tflite", "file": "1 MiB", "accuracy": {"min": 0.1}}],
        "benchmark": {"processes": 1, "pairs": 30},
    }
    source = recipe(workspace, *passes, **sections)
    return source, compress.run(source, directory)


def test_directory_holds_everything(finished):
    _, run = finished
    assert {p.name for p in run.directory.iterdir()} == {
        ".lock", "recipe.yaml", "manifest.json", "00-input.keras", "01-distill.keras", "02-prune.keras", "model.keras",
        "00-input.tflite", "00-input.onnx", "model.tflite", "model.onnx",
    }  # fmt: skip
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert [step["id"] for step in manifest["steps"]] == ["distill", "prune"]
    assert manifest["steps"][1]["statistics"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert {"keras", "tensorflow", "onnxruntime"} <= set(manifest["versions"])
    jsonschema.validate(manifest, compress.schemas.published_schema("manifest"))


def test_the_exported_files_are_what_was_measured(finished):
    _, run = finished
    measured = {result.file: result for result in run.manifest.benchmark.results}
    for name in ("model.tflite", "model.onnx"):
        result = measured[name]
        assert result.size.file_bytes == (run.directory / name).stat().st_size
        assert result.size.sparsity == pytest.approx(0.5, abs=0.01)
        assert result.quality["accuracy"].n == 128
        assert result.latency[0].reference == name.replace("model", "00-input")
    assert [v.verdict for v in run.manifest.verdicts] == ["pass", "pass"]


def test_notebook_and_table(finished):
    _, run = finished
    header, rows = run.rows()
    assert [row[0] for row in rows] == [
        "00-input.keras", "model.keras", "00-input.tflite", "model.tflite", "00-input.onnx", "model.onnx",
    ]  # fmt: skip
    assert len(header) == len(rows[0])
    assert "<table>" in run._repr_html_()
    assert run.artifacts["onnx"] == run.directory / "model.onnx"


def test_resolved_recipe_runs_again_and_does_nothing_twice(finished):
    _, run = finished
    before = {p.name: p.stat().st_mtime_ns for p in run.directory.glob("0*.keras")}
    again = compress.run(run.directory / "recipe.yaml", run.directory, overrides=["benchmark.enabled=false"])
    assert {p.name: p.stat().st_mtime_ns for p in run.directory.glob("0*.keras")} == before
    assert [s.key for s in again.manifest.steps] == [s.key for s in run.manifest.steps]


def test_a_changed_option_runs_that_step_and_those_after_it(workspace, tmp_path):
    two = recipe(workspace, {**PRUNE, "epochs": 1}, {"type": "finetune", "epochs": 1, "batch_size": 32})
    first = compress.run(two, tmp_path / "r")
    second = compress.run(two, tmp_path / "r", overrides=["passes.finetune.learning_rate=1e-5"])
    assert first.manifest.steps[0].file == second.manifest.steps[0].file
    assert first.manifest.steps[1].file.content != second.manifest.steps[1].file.content
    third = compress.run(two, tmp_path / "r", overrides=["passes.prune.sparsity=0.6"])
    assert third.manifest.steps[0].file.content != first.manifest.steps[0].file.content
    assert third.manifest.steps[1].statistics["sparsity"] == pytest.approx(0.6, abs=0.01)  # fine-tuning kept the zeros


def test_input_as_teacher_is_the_model_that_the_recipe_starts_from(workspace, tmp_path):
    passes = [{"type": "prune", "sparsity": 0.9, "epochs": 0}, {"type": "distill", "teacher": "input", "epochs": 1}]
    run = compress.run(recipe(workspace, *passes), tmp_path / "r")
    taught = run.manifest.steps[1]
    assert taught.options["teacher"]["path"] == str(workspace / "net.keras")
    assert taught.statistics["sparsity"] == pytest.approx(0.9, abs=0.01)  # zeros stay zero while it learns


def test_a_damaged_step_is_done_again(workspace, tmp_path):
    source = recipe(workspace, {**PRUNE, "epochs": 1})
    run = compress.run(source, tmp_path / "r")
    step = run.directory / "01-prune.keras"
    step.write_bytes(step.read_bytes()[:1000])
    again = compress.run(source, tmp_path / "r")
    assert again.manifest.steps[0].file.content == run.manifest.steps[0].file.content
    assert content_digest(step) == run.manifest.steps[0].file.content


def test_input_file_is_never_changed(workspace, finished):
    digest = content_digest(workspace / "net.keras")
    assert finished[1].manifest.input.content == digest


def test_max_drop(workspace, tmp_path):
    one_shot = {"type": "prune", "sparsity": 0.95, "epochs": 0, "max_drop": "1 pp"}
    data = everything(workspace)
    with pytest.raises(PassError, match=r"prune: accuracy fell by .* pp, allowed are 1 pp"):
        compress.run(recipe(workspace, one_shot, data=data), tmp_path / "stop")
    assert json.loads((tmp_path / "stop" / "manifest.json").read_text())["status"] == "failed"
    run = compress.run(recipe(workspace, {**one_shot, "on_fail": "revert"}, data=data), tmp_path / "revert")
    assert run.manifest.steps[0].reverted
    assert content_digest(run.model_path) == content_digest(workspace / "net.keras")
    run = compress.run(recipe(workspace, {**one_shot, "on_fail": "warn"}, data=data), tmp_path / "warn")
    assert run.manifest.steps[0].statistics["sparsity"] == pytest.approx(0.95, abs=0.01)


def test_broken_budget(workspace, tmp_path):
    source = recipe(workspace, budgets=[{"artifact": "keras", "file": "1 KiB"}])
    with pytest.raises(BudgetError, match="keras: file"):
        compress.run(source, tmp_path / "r")
    run = compress.run(source, tmp_path / "r", raise_on_broken_budget=False)
    assert [v.verdict for v in run.manifest.verdicts] == ["fail"]


def test_diverged_training_keeps_the_last_good_state(workspace, tmp_path):
    explode = {"type": "finetune", "epochs": 3, "learning_rate": 1e30, "batch_size": 32}
    with pytest.raises(PassError, match=r"loss became (NaN|infinite) in epoch 1") as caught:
        compress.run(recipe(workspace, explode), tmp_path / "r")
    kept = tmp_path / "r" / "01-finetune.last-good.keras"
    assert kept.name in caught.value.help
    weights = compress.load_model(kept).get_weights()
    assert all(np.isfinite(weight).all() for weight in weights)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": {"path": "/nowhere/m.keras"}}, ModelError, "does not exist|No such file|missing"),
        ({"model": {"path": "net", "sha256": "0" * 64}}, ModelError, "another file than the recipe pins"),
        ({"data": {}}, DataError, "needs a 'train' split"),
        ({"data": "npz:/nowhere.npz"}, DataError, "nowhere.npz"),
        ({"passes": [{**PRUNE, "max_drop": 0.01}]}, DataError, "`max_drop` of the pass 'prune' needs a 'test' split"),
        ({"budgets": [{"artifact": "keras", "accuracy": {"min": 0.5}}]}, DataError, "the budget of 'keras' needs"),
    ],
)
def test_bad_input_writes_no_result(workspace, tmp_path, change, error, message):
    if change.get("model", {}).get("path") == "net":
        change = {"model": {**change["model"], "path": str(workspace / "net.keras")}}
    with pytest.raises(error, match=message):
        compress.run({**recipe(workspace, PRUNE), **change}, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_directory_of_someone_else_is_left_alone(workspace, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="files that are not a run's"):
        compress.run(recipe(workspace), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_second_process_is_locked_out(workspace, tmp_path):
    (tmp_path / "r").mkdir()
    with open(tmp_path / "r" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="another process works in"):
            compress.run(recipe(workspace), tmp_path / "r")


KILLS = 10


def test_killed_at_random_moments_ends_with_the_same_model(workspace, tmp_path):
    source = recipe(
        workspace, PRUNE, {"type": "finetune", "epochs": 2, "batch_size": 32}, exports=[{"format": "onnx"}]
    )  # fmt: skip
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(source))
    command = [sys.executable, "-c", "from compress.cli import main; main()", "run", str(file), "-q", "-o"]
    root = Path(compress.__file__).parent.parent

    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, cwd=root)
    whole = time.monotonic() - began

    moments, killed = random.Random(0), 0
    for _ in range(3 * KILLS):
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert process.wait(timeout=moments.uniform(0.05, 0.95) * whole) == 0
            shutil.rmtree(tmp_path / "killed")  # it got through: start over
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        if killed == KILLS:
            break
    assert killed == KILLS
    done = subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("01-prune.keras", "02-finetune.keras", "model.keras"):
        assert content_digest(tmp_path / "whole" / name) == content_digest(tmp_path / "killed" / name), name
    assert (tmp_path / "whole" / "model.onnx").read_bytes() == (tmp_path / "killed" / "model.onnx").read_bytes()
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {p.name for p in (tmp_path / "killed").iterdir()}
