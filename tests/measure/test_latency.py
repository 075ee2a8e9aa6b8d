"""Summaries of known times, and one real pair of files whose difference no noise can hide."""

from __future__ import annotations

import numpy as np
import pytest

from compress.errors import UsageError
from compress.measure.inputs import read_inputs, take_batches, write_inputs
from compress.measure.latency import explain_noise, measure_latency, summarize_times


def _times(runs, candidate=None, control=1.0):
    reference = np.linspace(1, 2, runs)
    samples = {"reference": reference, "control": reference * control}
    return samples if candidate is None else {**samples, "candidate": reference * candidate}


def test_summary_of_known_times():
    found = summarize_times([_times(400, 3.0)] * 3, "base.onnx", threads=2, batch=4)
    assert (found.n, found.processes, found.threads, found.batch, found.reference) == (
        1200,
        3,
        2,
        4,
        "base.onnx",
    )
    assert found.p50_ms == pytest.approx(4.5)
    assert found.p90_ms == pytest.approx(5.7, abs=0.01)
    assert found.p99_ms == pytest.approx(5.97, abs=0.01)
    assert found.p50_ci95_ms[0] < 4.5 < found.p50_ci95_ms[1]
    assert (found.mean_ms, found.min_ms) == (pytest.approx(4.5), 3)
    assert found.throughput_samples_s == pytest.approx(4 * 1000 / 4.5)
    assert found.reference_p50_ms == pytest.approx(1.5)
    assert (found.ratio, *found.ratio_ci95) == pytest.approx((3, 3, 3))
    assert (found.control_ratio, *found.control_ci95) == pytest.approx((1, 1, 1))
    assert not found.noisy


def test_percentiles_without_support_are_null_with_a_reason():
    found = summarize_times([_times(33)] * 3, "base.onnx", threads=1, batch=1)
    assert found.p50_ms == pytest.approx(1.5)
    assert (found.p90_ms, found.p99_ms) == (None, None)
    assert found.reasons == {"p90_ms": "needs 100 runs, has 99", "p99_ms": "needs 1000 runs, has 99"}


def test_the_reference_itself_has_the_control_alone():
    found = summarize_times([_times(50, control=1.2)] * 3, "base.onnx", threads=1, batch=1)
    assert (found.ratio, found.ratio_ci95) == (1, (1, 1))
    assert found.control_ratio == pytest.approx(1.2)
    assert found.noisy
    assert "excludes 1" in found.noise_reason


@pytest.mark.parametrize(
    ("interval", "word"),
    [((0.99, 1.02), None), ((1.002, 1.004), None), ((0.95, 0.98), "excludes"), ((0.9, 1.1), "wider")],
)
def test_noise_is_explained(interval, word):
    reason = explain_noise(interval)
    assert reason is None if word is None else word in reason


def test_batches_start_over_where_samples_run_out():
    x = [np.arange(5), np.arange(5) * 10]
    assert [a.tolist() for a in take_batches(x, 4, 8)[0]] == [[0, 1, 2, 3], [0, 10, 20, 30]]
    assert take_batches(x, 7, 8)[0][0].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert [batch[0].tolist() for batch in take_batches(x, 1, 3)] == [[0], [1], [2]]


def test_inputs_keep_names_and_order(tmp_path):
    write_inputs(tmp_path / "list", [np.arange(3), np.ones((3, 2))])
    assert [a.tolist() for a in read_inputs(tmp_path / "list")] == [[0, 1, 2], [[1, 1]] * 3]
    write_inputs(tmp_path / "dict", {"b": np.arange(3), "a": np.array(["p", "q", "r"], object)})
    found = read_inputs(tmp_path / "dict")
    assert {name: a.tolist() for name, a in found.items()} == {"b": [0, 1, 2], "a": ["p", "q", "r"]}


def test_counts_below_one_are_refused(tmp_path):
    with pytest.raises(UsageError, match="batch=0"):
        measure_latency("a.onnx", "b.onnx", tmp_path, batch=0)


def test_a_much_larger_file_is_slower(make_dense_onnx, tmp_path):
    rng = np.random.default_rng(0)
    small = make_dense_onnx("small", rng.normal(size=(8, 4)))
    large = make_dense_onnx("large", rng.normal(size=(8, 3000)), rng.normal(size=(3000, 1500)))
    write_inputs(tmp_path / "inputs", [rng.normal(size=(10, 8)).astype("f")])
    done = []
    found = measure_latency(
        small,
        large,
        tmp_path / "inputs",
        processes=5,  # two processes would leave an interval so wide that a busy machine carries it below 1
        pairs=40,
        min_s=0,
        max_s=2,
        advance=lambda: done.append(1),
    )
    assert len(done) == found.processes == 5
    assert found.n == 200
    assert found.ratio > 1.5
    assert found.ratio_ci95[0] > 1
    assert 0.2 < found.control_ratio < 5
    assert found.min_ms <= found.p50_ms
