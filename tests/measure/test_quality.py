"""Metrics by hand: every task kind, label form and drop, and outputs that are broken."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from compress.errors import DataError, UsageError
from compress.measure.quality import evaluate_outputs
from compress.measure.statistics import mcnemar_p, paired_difference_interval, wilson_interval

SCORES = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])


@pytest.mark.parametrize("labels", [[0, 1, 1, 1], [[0], [1], [1], [1]], [[1, 0], [0, 1], [0, 1], [0, 1]]])
def test_accuracy_takes_class_numbers_and_one_hot(labels):
    found = evaluate_outputs([SCORES], [np.array(labels)], ["classification"])
    metric = found.metrics["accuracy"]
    assert (metric.value, metric.n, metric.higher_is_better, metric.drop) == (0.75, 4, True, None)
    assert metric.ci95 == wilson_interval(3, 4)
    assert found.per_sample["accuracy"].tolist() == [1, 1, 0, 1]
    assert set(found.metrics) == {"accuracy", "precision", "recall", "f1", "roc_auc"}


def test_drop_counts_discordant_samples():
    reference = SCORES[[0, 1, 3, 3]]
    metrics = evaluate_outputs([SCORES], [np.array([0, 0, 1, 1])], ["classification"], [reference]).metrics
    drop = metrics["accuracy"].drop
    assert (drop.lost, drop.gained, drop.value) == (1, 0, 0.25)
    low, high = paired_difference_interval(1, 0, 4)
    assert drop.ci95 == (-high, -low)
    assert drop.mcnemar_p == mcnemar_p(1, 0)
    assert metrics["agreement"].value == 0.75
    assert metrics["max_abs_diff"].value == pytest.approx(0.3)
    assert metrics["mean_abs_diff"].value == pytest.approx(0.3 / 4)
    assert not metrics["max_abs_diff"].higher_is_better


def test_a_gain_is_a_negative_drop():
    metrics = evaluate_outputs([SCORES], [np.array([0, 1, 0, 1])], ["classification"], [SCORES[[0, 0, 2, 3]]]).metrics
    assert metrics["accuracy"].drop.value == -0.25


def test_without_labels_there_is_agreement_only():
    found = evaluate_outputs([SCORES], None, ["classification"], [SCORES])
    assert set(found.metrics) == {"agreement", "kl", "max_abs_diff", "mean_abs_diff"}
    assert found.metrics["agreement"].value == 1
    assert found.metrics["max_abs_diff"].value == 0
    assert found.per_sample == {}


def test_without_tasks_there_are_distances_only():
    found = evaluate_outputs([SCORES], [np.array([0, 1, 1, 1])], None, [SCORES])
    assert set(found.metrics) == {"max_abs_diff", "mean_abs_diff"}


@pytest.mark.parametrize(
    ("task", "outputs"),
    [
        ("binary", [0.2, 0.7, 0.6, 0.4]),
        (SimpleNamespace(kind="binary", from_logits=True), [-1.0, 0.3, 0.1, -0.1]),
        (SimpleNamespace(kind="binary", from_logits=True, head="sigmoid"), [0.2, 0.7, 0.6, 0.4]),
    ],
)
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_binary_is_decided_at_half_or_at_zero(task, outputs, shape):
    found = evaluate_outputs([np.reshape(outputs, (4, 1))], [np.reshape([0, 1, 0, 0], shape)], [task])
    assert found.metrics["accuracy"].value == 0.75


def test_multilabel_is_the_share_of_right_labels():
    outputs = np.array([[0.9, 0.1, 0.8], [0.2, 0.2, 0.9]])
    metric = evaluate_outputs([outputs], [np.array([[1, 0, 0], [0, 0, 1]])], ["multilabel"]).metrics["accuracy"]
    assert metric.value == pytest.approx(5 / 6)
    assert metric.n == 2


def test_sequences_count_all_positions_but_samples_carry_the_interval():
    outputs = np.zeros((40, 5, 3))
    outputs[..., 0] = 1
    labels = np.zeros((40, 5), int)
    labels[:, 0] = 1
    labels[::2, 1] = 1
    reference = outputs[..., [1, 0, 2]]
    metric = evaluate_outputs([outputs], [labels], ["classification"], [reference]).metrics["accuracy"]
    assert metric.value == pytest.approx(0.7)
    assert metric.n == 40
    assert metric.ci95[0] < 0.69
    assert metric.ci95[1] > 0.71
    assert (metric.drop.lost, metric.drop.gained) == (60, 140)
    assert metric.drop.value == pytest.approx(-0.4)
    assert metric.drop.mcnemar_p is None


def test_regression_errors_and_their_rise():
    labels = np.array([1.0, 2.0, 3.0])
    metrics = evaluate_outputs([np.array([[1.0], [2.0], [5.0]])], [labels], ["regression"], [labels[:, None]]).metrics
    assert metrics["mse"].value == pytest.approx(4 / 3)
    assert metrics["mae"].value == pytest.approx(2 / 3)
    assert metrics["mse"].drop.value == pytest.approx(4 / 3)
    assert metrics["mse"].drop.ci95[0] < 4 / 3 < metrics["mse"].drop.ci95[1]
    assert "agreement" not in metrics


def test_several_outputs_are_named():
    tasks = [SimpleNamespace(kind="classification", name="kind"), "regression"]
    metrics = evaluate_outputs([SCORES, np.ones((4, 1))], [np.array([0, 1, 1, 1]), None], tasks).metrics
    assert set(metrics) == {f"kind.{name}" for name in ("accuracy", "precision", "recall", "f1", "roc_auc")}
    metrics = evaluate_outputs([SCORES, np.ones((4, 1))], [None, np.ones(4)], tasks).metrics
    assert set(metrics) == {"output_1.mse", "output_1.mae"}


def test_outputs_that_are_not_finite_are_wrong_and_agree_with_nothing():
    broken = SCORES.copy()
    broken[0, 1] = np.nan
    metrics = evaluate_outputs([broken], [np.array([1, 1, 0, 1])], ["classification"], [broken]).metrics
    assert metrics["accuracy"].value == 0.75
    assert metrics["agreement"].value == 0.75
    assert metrics["max_abs_diff"].value is None
    assert "1 of 4" in metrics["max_abs_diff"].reasons["value"]
    metrics = evaluate_outputs([np.full((2, 1), np.inf)], [np.zeros(2)], ["binary"]).metrics
    assert metrics["accuracy"].value == 0


def test_what_does_not_fit_is_refused():
    labels = np.array([0, 1, 1, 1])
    with pytest.raises(UsageError, match="kind of an output"):
        evaluate_outputs([SCORES], [labels], ["ranking"])
    with pytest.raises(UsageError, match="one task per output"):
        evaluate_outputs([SCORES], [labels], ["classification", "binary"])
    with pytest.raises(DataError, match=r"labels do not fit.*\(3,\)"):
        evaluate_outputs([SCORES], [labels[:3]], ["classification"])
    with pytest.raises(DataError, match="at least two classes"):
        evaluate_outputs([SCORES[:, :1]], [labels], ["classification"])
    with pytest.raises(DataError, match="shape of the reference"):
        evaluate_outputs([SCORES], [labels], ["classification"], [SCORES[:2]])
    with pytest.raises(DataError, match="no samples"):
        evaluate_outputs([SCORES[:0]], [labels[:0]], ["classification"])
