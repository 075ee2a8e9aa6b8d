"""Metrics that users bring: numbers, values for each sample, drops, and what they may not do."""

from __future__ import annotations

import numpy as np
import pytest

from compress.errors import DataError
from compress.measure.benchmarking import benchmark_files
from compress.measure.own_metrics import evaluate_function


def correlation(labels, outputs):
    return np.corrcoef(labels[0].ravel(), outputs[0].ravel())[0, 1]


def error(labels, outputs):
    return np.abs(labels[0] - outputs[0]).mean(axis=1)


error.higher_is_better = False


def data(n=400, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(n, 1))
    return truth, truth + rng.normal(size=(n, 1)), truth + rng.normal(size=(n, 1)) * 0.9


def test_a_number_and_its_drop():
    truth, own, other = data()
    found = evaluate_function("r", correlation, truth, [own], [other])
    assert found.value == pytest.approx(correlation([truth], [own]))
    assert found.drop.value == pytest.approx(correlation([truth], [other]) - found.value)
    assert found.ci95[0] < found.value < found.ci95[1]
    assert found.higher_is_better


def test_values_of_samples_where_lower_is_better():
    truth, own, other = data()
    found = evaluate_function("error", error, truth, [own], [other])
    assert found.value == pytest.approx(np.abs(truth - own).mean())
    assert not found.higher_is_better
    assert found.drop.value == pytest.approx(found.value - np.abs(truth - other).mean())  # a rise is worse
    assert found.drop.ci95[0] < found.drop.value < found.drop.ci95[1]


def test_the_interval_of_a_number_covers_the_truth():
    hits = 0
    for seed in range(300):
        truth, own, _ = data(seed=seed)
        low, high = evaluate_function("r", correlation, truth, [own]).ci95
        hits += low <= 0.5**0.5 <= high
    assert hits / 300 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda labels, outputs: 1 / 0, "failed. Received: ZeroDivisionError"),
        (lambda labels, outputs: np.zeros(3), r"one number, or one for each sample. Received: \(3,\)"),
    ],
)
def test_functions_that_do_something_else(function, message):
    truth, own, _ = data()
    with pytest.raises(DataError, match=message):
        evaluate_function("mine", function, truth, [own])


def test_what_is_not_finite_is_none():
    truth, own, _ = data()
    found = evaluate_function("mine", lambda labels, outputs: np.nan, truth, [own])
    assert (found.value, found.reasons) == (None, {"value": "it is not finite"})


def test_in_a_benchmark(make_dense_onnx):
    from compress.data.split import Split

    path = make_dense_onnx("base", np.eye(4, 3))
    x = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
    split = Split("test", x, x[:, :3].argmax(1))
    share = lambda labels, outputs: (outputs[0].argmax(1) == labels[0].ravel()).mean()  # noqa: E731
    report = benchmark_files([path], split, latency=False, memory=False, metrics={"share": share})
    quality = report.results[0].quality
    assert quality["share"].value == quality["accuracy"].value == 1.0
    header, rows = report.metric_rows()
    assert len(header) == len(rows[0])
    assert {"share", "accuracy", "f1"} <= {row[1] for row in rows}
