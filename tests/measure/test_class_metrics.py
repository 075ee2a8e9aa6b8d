"""Metrics of classes: the values of scikit-learn, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from compress.measure.class_metrics import as_metric, estimate_classes
from compress.measure.quality import evaluate_outputs


def draw(rng, n: int, classes: int, skill: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    truth = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    return rng.normal(size=(n, classes)) + skill * np.eye(classes)[truth], truth


def test_values_of_classes_are_those_of_scikit_learn():
    scores, truth = draw(np.random.default_rng(0), 400, 12)
    found = evaluate_outputs([scores], [truth], ["classification"]).metrics
    decided = scores.argmax(1)
    precision, recall, f1, _ = reference.precision_recall_fscore_support(
        truth, decided, average="macro", zero_division=0
    )
    assert found["precision"].value == pytest.approx(precision)
    assert found["recall"].value == pytest.approx(recall)
    assert found["f1"].value == pytest.approx(f1)
    assert found["top_5"].value == pytest.approx(reference.top_k_accuracy_score(truth, scores, k=5))
    areas = [reference.roc_auc_score(truth == each, scores[:, each]) for each in range(12)]
    assert found["roc_auc"].value == pytest.approx(np.mean(areas))
    assert "iou" not in found  # one decision for each sample


def test_values_of_yes_and_no_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, (300, 1))
    scores = np.clip(0.5 + 0.3 * (truth - 0.5) + rng.normal(0, 0.3, truth.shape), 0, 1).round(2)  # with ties
    found = evaluate_outputs([scores], [truth], ["binary"]).metrics
    flat, said = truth.ravel(), scores.ravel() > 0.5
    assert found["precision"].value == pytest.approx(reference.precision_score(flat, said))
    assert found["recall"].value == pytest.approx(reference.recall_score(flat, said))
    assert found["f1"].value == pytest.approx(reference.f1_score(flat, said))
    assert found["roc_auc"].value == pytest.approx(reference.roc_auc_score(flat, scores.ravel()))


def test_values_of_several_labels_are_those_of_scikit_learn():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 2, (200, 4))
    scores = truth + rng.normal(0, 1, truth.shape)
    found = evaluate_outputs([scores], [truth], ["multilabel"]).metrics
    assert found["f1"].value == pytest.approx(reference.f1_score(truth, scores > 0.5, average="macro"))
    assert found["roc_auc"].value == pytest.approx(reference.roc_auc_score(truth, scores))


def test_intersection_over_union_of_maps():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, (20, 5, 6))
    scores = rng.normal(size=(20, 5, 6, 3)) + np.eye(3)[truth]
    found = evaluate_outputs([scores], [truth], ["classification"]).metrics
    wanted = reference.jaccard_score(truth.ravel(), scores.argmax(-1).ravel(), average="macro")
    assert found["iou"].value == pytest.approx(wanted)
    assert found["roc_auc"].value is None
    assert "several decisions" in found["roc_auc"].reasons["value"]


@pytest.mark.parametrize("name", ["precision", "recall", "f1", "roc_auc"])
def test_intervals_cover_the_truth(name):
    rng = np.random.default_rng(4)
    scores, truth = draw(rng, 400_000, 4)
    exact = estimate_classes(scores, scores.argmax(1), truth, "classification", np.ones(len(truth), bool))[name].value
    hits = 0
    for _ in range(1500):
        scores, truth = draw(rng, 400, 4)
        own = estimate_classes(scores, scores.argmax(1), truth, "classification", np.ones(400, bool))[name]
        low, high = as_metric(own, None).ci95
        hits += low <= exact <= high
    assert hits / 1500 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("name", ["f1", "roc_auc"])
def test_intervals_of_drops_cover_the_truth_and_are_narrower_than_two_apart(name):
    rng = np.random.default_rng(5)

    def both(n):
        scores, truth = draw(rng, n, 4)
        worse, valid = scores + rng.normal(0, 0.5, scores.shape), np.ones(n, bool)
        return [estimate_classes(s, s.argmax(1), truth, "classification", valid)[name] for s in (worse, scores)]

    own, other = both(400_000)
    exact, hits, widths = other.value - own.value, 0, []
    for _ in range(1000):
        own, other = both(400)
        metric = as_metric(own, other)
        low, high = metric.drop.ci95
        hits += low <= exact <= high
        widths.append((high - low) / (metric.ci95[1] - metric.ci95[0]))
    assert hits / 1000 == pytest.approx(0.95, abs=0.02)
    assert np.mean(widths) < 1


def test_distance_to_the_reference_in_nats():
    p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    wanted = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    found = evaluate_outputs([q], None, ["classification"], [p]).metrics
    assert found["kl"].value == pytest.approx(wanted)
    logits = evaluate_outputs([np.log(q) + 3], None, ["classification"], [np.log(p) - 1]).metrics
    assert logits["kl"].value == pytest.approx(wanted)
    yes = evaluate_outputs([q[:, :1]], None, ["binary"], [p[:, :1]]).metrics
    assert yes["kl"].value == pytest.approx(wanted)


def test_what_cannot_be_told_is_none_with_a_reason():
    scores = np.array([[0.2, 0.8], [0.7, 0.3]])
    found = evaluate_outputs([scores], [np.array([1, 1])], ["classification"]).metrics
    assert found["roc_auc"].value is None
    assert found["roc_auc"].reasons["value"] == "the labels hold one class alone"
    broken = evaluate_outputs([scores * [[np.nan], [1]]], [np.array([1, 0])], ["classification"]).metrics
    assert broken["roc_auc"].reasons["value"] == "some scores are not finite"
    assert broken["recall"].value == pytest.approx(0.5)
