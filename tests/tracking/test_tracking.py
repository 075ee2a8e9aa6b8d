"""Runs and curves in trackers: what arrives there, and that a tracker which is down harms nothing."""

from __future__ import annotations

import json
import logging
import threading
import time

import numpy as np
import pytest

import compress
from compress.errors import SetupError, UsageError
from compress.tracking import tracker as trackers
from compress.tracking.recorder import Recorder
from compress.tracking.tracker import flatten, open_tracker, plain_name


class Listener:
    """A tracker that remembers, and may fail or hang at a call."""

    def __init__(self, failing: str = "", hanging: str = ""):
        self.calls, self._failing, self._hanging = [], failing, hanging

    def __getattr__(self, name):
        def call(*arguments):
            if name == self._hanging:
                threading.Event().wait(60)
            if name == self._failing:
                raise ConnectionError("no route\nto host")
            self.calls.append((name, *arguments))

        return call


def recipe(workspace, **more):
    return {
        "schema": "bmcompress/recipe/v1", "name": "tracked", "model": str(workspace / "net.keras"),
        "data": f"npz:{workspace / 'data.npz'}",
        "passes": [{"type": "prune", "sparsity": 0.5, "epochs": 2}, {"type": "finetune", "epochs": 1}],
        "benchmark": {"enabled": False}, "exports": [{"format": "tflite"}], **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tracked(workspace, tmp_path_factory):
    """A run that was shown in all three at once."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"file:{folder / 'mlruns'}")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        compress.run(recipe(workspace, tracking=["tensorboard", "mlflow", "wandb"]), folder / "run")
    return folder


EXPECTED = {
    "prune/loss": [1, 2], "prune/accuracy": [1, 2], "finetune/loss": [1], "passes/accuracy": [0, 1, 2],
    "files/model.tflite/file_bytes": [0], "files/model.tflite/accuracy": [0],
}  # fmt: skip


def test_tensorboard_has_the_curves(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "run" / "tensorboard")).Reload()
    for name, steps in EXPECTED.items():
        assert [point.step for point in events.Tensors(name)] == steps, name
    manifest = json.loads((tracked / "run" / "manifest.json").read_text())
    last = events.Tensors("passes/accuracy")[-1].tensor_proto.float_val[0]
    assert last == pytest.approx(manifest["steps"][-1]["metrics"]["accuracy"])


def test_mlflow_has_curves_options_and_files(tracked, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(f"file:{tracked / 'mlruns'}")
    experiment = client.get_experiment_by_name("bmcompress").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("tracked", "FINISHED")
    assert run.data.params["passes.prune.sparsity"] == "0.5"
    for name, steps in EXPECTED.items():
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == steps, name
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"recipe.yaml", "manifest.json", "model.tflite"} <= files


def test_wandb_writes_a_run(tracked):
    (folder,) = (tracked / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    content = file.read_bytes()
    for name in ("prune/loss", "passes/accuracy", "passes.prune.sparsity"):
        assert name.encode() in content, name


@pytest.mark.parametrize("broken", [{"failing": "start"}, {"failing": "log"}, {"hanging": "start"}], ids=str)
def test_a_tracker_that_is_down_is_one_warning(broken, workspace, tmp_path, monkeypatch, caplog):
    listener = Listener(**broken)
    monkeypatch.setattr("compress.tracking.recorder.open_tracker", lambda name, folder: listener)
    monkeypatch.setattr(Recorder.__init__, "__defaults__", (0.2,))
    with caplog.at_level(logging.WARNING, "compress"):
        run = compress.run(recipe(workspace, tracking="mlflow", passes=[]), tmp_path / "run")
    assert run.manifest.status == "done"
    warnings = [r.message for r in caplog.records if "tracking by" in r.message]
    assert len(warnings) == 1
    assert ("still busy" if "hanging" in broken else "ConnectionError: no route to host; the run goes on") in warnings[
        0
    ]


def test_a_failed_run_ends_as_failed(workspace, tmp_path, monkeypatch):
    listener = Listener()
    monkeypatch.setattr("compress.tracking.recorder.open_tracker", lambda name, folder: listener)
    bad = [{"type": "prune", "sparsity": 0.9, "epochs": 1, "learning_rate": 1e-9, "max_drop": 0}]
    with pytest.raises(compress.BmcompressError, match="fell by"):
        compress.run(recipe(workspace, tracking=["mlflow"], passes=bad), tmp_path / "run")
    assert listener.calls[-1] == ("end", False)
    assert ("artifact", tmp_path / "run" / "manifest.json") in listener.calls


def test_the_callback_in_an_own_fit(cnn_factory, blobs, monkeypatch):
    listener = Listener()
    monkeypatch.setattr("compress.tracking.recorder.open_tracker", lambda name, folder: listener)
    (x, y), _ = blobs
    tracking = compress.Tracking("mlflow", name="mine")
    model = cnn_factory()
    model.fit(x, y, epochs=2, verbose=0, callbacks=[tracking])
    model.fit(x, y, epochs=1, verbose=0, callbacks=[tracking])  # another run
    names = [call[0] for call in listener.calls]
    assert names == ["start", "log", "log", "end", "start", "log", "end"]
    assert listener.calls[0][1] == "mine" and listener.calls[0][2]["epochs"] == 2
    assert set(listener.calls[1][1]) == {"loss", "accuracy"} and listener.calls[2][2] == 2


def test_training_does_not_wait():
    slow = {str(number): Listener(hanging="log") for number in range(5)}
    recorder = Recorder(slow, flush_s=1.0)
    began = time.monotonic()
    recorder.start("x", {})
    for step in range(1000):
        recorder.log({"loss": 1.0}, step)
    recorder.end(True)
    assert time.monotonic() - began < 30  # each call would have taken 60; they wait together


def test_what_is_logged():
    listener = Listener()
    recorder = Recorder({"x": listener})
    recorder.log({"a": float("nan"), "b": np.float32(1), "c": None, "e::f<b>": 2}, 3)
    recorder.log({"a": float("inf")}, 4)
    recorder.end(True)
    assert listener.calls == [("log", {"b": 1.0, "e__f_b_": 2.0}, 3), ("end", True)]
    assert plain_name("x\n" * 300) == ("x_" * 300)[:200]
    nested = {"a": {"b": 1, "c": None}, "passes": [{"id": "p", "x": [1, 2]}, {"x": 3}]}
    assert flatten(nested) == {"a.b": 1, "passes.p.id": "p", "passes.p.x": [1, 2], "passes.1.x": 3}


def test_names_and_packages(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="expected a tracker of tensorboard, mlflow, wandb. Received: 'aim'"):
        open_tracker("aim", tmp_path)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install 'bmcompress\\[mlflow\\]'"):
        open_tracker("mlflow", tmp_path)
