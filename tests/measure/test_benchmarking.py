"""Whole benchmarks of tiny files, from samples to a report that matches its schema."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from onnx import helper

from compress.data.split import Split, array_split
from compress.errors import DataError, ModelError, UsageError
from compress.measure.benchmarking import benchmark_files
from compress.measure.results import BenchmarkReport
from compress.progress import show_progress

KERNEL = np.array([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [0, 0, 0]])


class _Recorder:
    """A progress sink that adds up what is announced and what is done."""

    def __init__(self):
        self.total = self.done = 0

    def start(self, description, total):
        self.total += total
        return self

    def advance(self, task, amount, note):
        self.done += amount

    def finish(self, task):
        pass


@pytest.fixture
def split():
    x = np.tile(np.eye(3, 4, dtype=np.float32), (10, 1))
    return array_split("test", x, np.tile([0, 1, 2], 10))


def test_whole_benchmark(make_dense_onnx, make_dense_tflite, split):
    worse = KERNEL.copy()
    worse[2] = [5, 0, 0]
    files = [
        make_dense_onnx("base", KERNEL),
        make_dense_onnx("worse", worse),
        make_dense_tflite("lite", KERNEL.T),
    ]
    recorder = _Recorder()
    with show_progress(recorder):
        report = benchmark_files(files, split, tasks=["classification"], processes=1, pairs=30)
    assert recorder.done == recorder.total == 3 + 3 + 2 + 3 + 3
    base, other, lite = report.results
    assert base.quality.keys() == {"accuracy", "precision", "recall", "f1", "roc_auc"}
    assert base.quality["accuracy"].value == 1
    assert (other.quality["accuracy"].drop.lost, other.quality["accuracy"].drop.gained) == (10, 0)
    assert other.quality["agreement"].value == pytest.approx(2 / 3)
    assert lite.quality["agreement"].value == 1
    assert lite.quality["max_abs_diff"].value == pytest.approx(0, abs=1e-6)
    assert (base.size.kernel_weights, base.size.nonzero_kernel_weights, base.size.macs) == (12, 3, 12)
    assert lite.size.nonzero_kernel_weights == 3
    assert [result.latency[0].reference for result in report.results] == [
        str(files[0]),
        str(files[0]),
        str(files[0]),  # no other file of its runtime
    ]
    assert base.latency[0].ratio == 1
    assert lite.runtime.split()[0] == "ai-edge-litert"
    assert other.memory.peak_rss_bytes > 0
    assert report.reference == str(files[0])
    assert report.data.samples == 30
    data = json.loads(report.to_json(), parse_constant=pytest.fail)
    jsonschema.validate(data, BenchmarkReport.model_json_schema())


def test_without_data_latency_runs_on_random_inputs(make_dense_onnx):
    path = make_dense_onnx("base", KERNEL)
    report = benchmark_files([path], processes=1, pairs=30, batch=[1, 4], memory=False)
    result = report.results[0]
    assert (report.data, result.quality) == (None, None)
    assert result.reasons.keys() == {"quality", "startup", "memory", "energy"}
    assert [times.batch for times in result.latency] == [1, 4]
    assert len(report.rows()[1]) == 2


def test_unlabelled_stream_of_named_outputs(make_onnx):
    """Two outputs in another order than the tasks, inputs by name, batches that are read once per look."""

    def net(name, order):
        nodes = [
            helper.make_node("MatMul", ["left", "kernel"], ["scores"]),
            helper.make_node("Add", ["left", "right"], ["sums"]),
        ]
        shapes = {"scores": ["n", 3], "sums": ["n", 4]}
        inputs = {"left": ["n", 4], "right": ["n", 4]}
        return make_onnx(name, nodes, inputs, {key: shapes[key] for key in order}, {"kernel": KERNEL.astype("f")})

    class Task:
        def __init__(self, name, kind):
            self.name, self.kind = name, kind

    x = np.eye(3, 4, dtype=np.float32)
    split = Split("test", stream=[{"right": x, "left": x}] * 2)
    files = [net("one", ["sums", "scores"]), net("two", ["scores", "sums"])]
    tasks = [Task("scores", "classification"), Task("sums", "regression")]
    report = benchmark_files(files, split, tasks=tasks, latency=False, memory=False)
    quality = report.results[1].quality
    assert quality["scores.agreement"].value == 1
    assert quality["sums.max_abs_diff"].value == 0
    assert "scores.accuracy" not in quality
    assert report.results[0].quality == {}
    assert report.results[1].reasons["latency"] == "not asked for"
    assert not report.data.labelled


def test_a_stream_that_shuffles_keeps_its_labels(make_dense_onnx, split):
    class Shuffled:
        """Gives other samples first each time that it is read."""

        def __init__(self):
            self.turn = 0

        def __iter__(self):
            self.turn += 1
            for start in range(3):
                rows = (np.arange(start, 30, 3) + self.turn) % 30
                yield split.x[rows], split.y[rows]

    data = Split("test", stream=Shuffled())
    path = make_dense_onnx("base", KERNEL)
    report = benchmark_files([path], data, tasks=["classification"], latency=False, memory=False)
    assert report.results[0].quality["accuracy"].value == 1
    assert report.data.samples == 30


def test_tasks_are_inferred_from_outputs_and_labels(make_dense_onnx, split):
    path = make_dense_onnx("base", KERNEL)
    report = benchmark_files([path], split, latency=False, memory=False)
    assert report.results[0].quality["accuracy"].value == 1


def test_a_reference_outside_the_files(make_dense_onnx, split):
    base, file = make_dense_onnx("base", KERNEL), make_dense_onnx("file", -KERNEL)
    report = benchmark_files([file], split, reference=base, tasks=["classification"], latency=False, memory=False)
    assert len(report.results) == 1
    assert report.results[0].quality["accuracy"].drop.lost == 30
    assert report.reference == str(base)


def test_what_cannot_be_measured_is_an_error(make_dense_onnx, split, tmp_path):
    path = make_dense_onnx("base", KERNEL)
    with pytest.raises(UsageError, match="at least one file"):
        benchmark_files([], split)
    with pytest.raises(UsageError, match=r"references must name.*other\.onnx"):
        benchmark_files([path], references={"other.onnx": path})
    with pytest.raises(ModelError, match="does not exist"):
        benchmark_files([path, tmp_path / "none.onnx"], split)
    with pytest.raises(DataError, match=r"input 'x' takes arrays"):
        benchmark_files([path], array_split("test", np.ones((4, 9), np.float32)), tasks=["classification"])
    with pytest.raises(UsageError, match="one task per output"):
        benchmark_files([path], split, tasks=["classification", "binary"], latency=False, memory=False)
