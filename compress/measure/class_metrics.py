"""Metrics of classes beside accuracy: top-5, precision, recall, F1, intersection over union, area under the ROC curve.

Each is a smooth function of means over samples, so its interval comes from what every sample moves it by (the
infinitesimal jackknife: Efron 1982; for the area under the curve DeLong et al. 1988), and that of a drop against a
reference from the difference of the two on the same samples. Macro averages run over the classes that occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.measure import statistics
from compress.measure.results import Change, Metric

TOP = 5
_TOP_NEEDS_CLASSES = 10


@dataclass(frozen=True)
class Estimate:
    """A value over `n` samples, and by how much each sample moves it: `(n,)`, with mean 0.

    Args:
        value: the metric, or `None`.
        influence: of each sample, times `n`.
        reason: why there is no value.
    """

    value: float | None
    influence: np.ndarray
    reason: str = ""


def estimate_classes(
    scores: np.ndarray, decisions: np.ndarray, truth: np.ndarray, kind: str, valid: np.ndarray
) -> dict[str, Estimate]:
    """Return the metrics of an output by name.

    Args:
        scores: `(samples, ..., classes)` for classification, one score per decision otherwise.
        decisions: `(samples, ...)`: class numbers, or whether a score says yes.
        truth: like `decisions`.
        kind: `"classification"`, `"binary"` or `"multilabel"`.
        valid: `(samples, ...)`: whether a decision's scores are finite; others decide for no class.
    """
    counts = _count_classes(decisions, truth, kind, valid, scores)
    found = {
        "precision": _ratio_of_means(counts.right, counts.decided, counts.present),
        "recall": _ratio_of_means(counts.right, counts.true, counts.present),
        "f1": _ratio_of_means(2 * counts.right, counts.decided + counts.true, counts.present),
    }
    if decisions.ndim > 1 and decisions[0].size > 1 and kind != "multilabel":
        union = counts.decided + counts.true - counts.right
        found["iou"] = _ratio_of_means(counts.right, union, counts.present)
    if kind == "classification" and scores.shape[-1] >= _TOP_NEEDS_CLASSES:
        own = np.take_along_axis(scores, truth[..., None].astype(int), axis=-1)
        right = ((scores > own).sum(axis=-1) < TOP) & valid
        found[f"top_{TOP}"] = _mean(right.reshape(len(right), -1).mean(axis=1))
    found["roc_auc"] = _area(scores, truth, kind, valid)
    return found


def as_metric(own: Estimate, other: Estimate | None) -> Metric:
    """Return an estimate as a metric, with its drop against that of a reference on the same samples."""
    n = len(own.influence)
    if own.value is None:
        return Metric(value=None, n=n, ci95=None, higher_is_better=True, reasons={"value": own.reason})
    drop = None
    if other is not None and other.value is not None:
        change = _interval(other.value - own.value, other.influence - own.influence)
        drop = Change(value=other.value - own.value, ci95=change)
    interval = _interval(own.value, own.influence)
    interval = interval and (max(0.0, interval[0]), min(1.0, interval[1]))
    return Metric(value=own.value, n=n, ci95=interval, higher_is_better=True, drop=drop)


def divergence(output: np.ndarray, reference: np.ndarray, kind: str, from_logits: bool) -> np.ndarray:
    """Return the Kullback-Leibler divergence of `output` from `reference` of each sample, in nats.

    Args:
        output: scores `(samples, ...)`; logits become probabilities first.
        reference: those of the reference.
        kind: `"classification"`, `"binary"` or `"multilabel"`.
        from_logits: whether binary and multilabel scores are logits.
    """
    if kind == "classification":
        p, q = (_softmax(each.astype(np.float64)) for each in (reference, output))
        each = (p * (_log(p) - _log(q))).sum(axis=-1)
    else:
        p, q = (_probability(each.astype(np.float64), from_logits) for each in (reference, output))
        each = p * (_log(p) - _log(q)) + (1 - p) * (_log(1 - p) - _log(1 - q))
    return np.maximum(each.reshape(len(output), -1).mean(axis=1), 0.0)


@dataclass(frozen=True)
class _Counts:
    """Decisions of each sample by class, `(samples, classes)`, and which classes are averaged over."""

    right: np.ndarray
    decided: np.ndarray
    true: np.ndarray
    present: np.ndarray


def _count_classes(
    decisions: np.ndarray, truth: np.ndarray, kind: str, valid: np.ndarray, scores: np.ndarray
) -> _Counts:
    samples = len(decisions)
    if kind != "classification":
        labels = decisions.shape[-1] if kind == "multilabel" and decisions.ndim > 1 else 1
        shape = (samples, -1, labels)
        decided, true = (each.reshape(shape).astype(bool) for each in (decisions & valid, truth))
        sums = [each.sum(axis=1).astype(float) for each in (decided & true, decided, true)]
        return _Counts(*sums, np.ones(labels, bool))
    classes = scores.shape[-1]
    flat, known = decisions.reshape(samples, -1), valid.reshape(samples, -1)
    labels = truth.reshape(samples, -1).astype(int)
    rows = np.broadcast_to(np.arange(samples)[:, None], flat.shape)

    def count(mask: np.ndarray, which: np.ndarray) -> np.ndarray:
        found = np.bincount(rows[mask] * classes + which[mask], minlength=samples * classes)
        return found.reshape(samples, classes).astype(float)

    true, decided = count(np.ones_like(known), labels), count(known, flat)
    return _Counts(count(known & (flat == labels), labels), decided, true, (true + decided).sum(axis=0) > 0)


def _ratio_of_means(top: np.ndarray, bottom: np.ndarray, present: np.ndarray) -> Estimate:
    """Return the mean over the classes `present` of sums of `top` by sums of `bottom`; 0 where there is nothing."""
    top, bottom = top[:, present], bottom[:, present]
    means = bottom.mean(axis=0)
    ratios = np.divide(top.mean(axis=0), means, out=np.zeros_like(means), where=means > 0)
    moves = np.divide(top - ratios * bottom, means, out=np.zeros_like(top), where=means > 0)
    return Estimate(float(ratios.mean()), moves.mean(axis=1))


def _mean(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), values - values.mean())


def _area(scores: np.ndarray, truth: np.ndarray, kind: str, valid: np.ndarray) -> Estimate:
    """Return the area under the ROC curve: of the positive class, or the mean over classes of one against the rest."""
    samples = len(scores)
    nothing = np.zeros(samples)
    if not valid.all():
        return Estimate(None, nothing, "some scores are not finite")
    if kind == "classification":
        if truth.size != samples:
            return Estimate(None, nothing, "there are several decisions for each sample")
        columns = scores.reshape(samples, -1)
        labels = truth.reshape(samples, 1) == np.arange(columns.shape[1])
    else:
        columns, labels = scores.reshape(samples, -1), truth.reshape(samples, -1).astype(bool)
        if kind == "binary" and columns.shape[1] > 1:
            return Estimate(None, nothing, "there are several decisions for each sample")
    both = labels.any(axis=0) & ~labels.all(axis=0)
    if not both.any():
        return Estimate(None, nothing, "the labels hold one class alone")
    areas, moves = [], nothing.copy()
    for column, label in zip(columns.T[both], labels.T[both], strict=True):
        area, move = _area_of(column, label)
        areas.append(area)
        moves += move / both.sum()
    return Estimate(float(np.mean(areas)), moves)


def _area_of(scores: np.ndarray, label: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the area of one class, and by how much each sample moves it: its placement among the others."""
    positive, negative = int(label.sum()), int((~label).sum())
    ranks = _ranks(scores)
    below = np.empty(len(scores))
    below[label] = (ranks[label] - _ranks(scores[label])) / negative  # share of negatives below a positive
    below[~label] = 1 - (ranks[~label] - _ranks(scores[~label])) / positive
    area = float(below[label].mean())
    n = len(scores)
    return area, np.where(label, (below - area) * n / positive, (below - area) * n / negative)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 1, the mean of their ranks for equal ones.

    As `scipy.stats.rankdata` does, whose import takes longer than all other work of a small check.
    """
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _interval(value: float, influence: np.ndarray) -> tuple[float, float] | None:
    n = len(influence)
    if n < 2:
        return None
    half = statistics.student_quantile(0.975, n - 1) * float(np.std(influence, ddof=1)) / n**0.5
    return value - half, value + half


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Return probabilities: the scores themselves where they are some."""
    if (scores >= 0).all() and np.allclose(scores.sum(axis=-1), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _probability(scores: np.ndarray, from_logits: bool) -> np.ndarray:
    return 1 / (1 + np.exp(-scores)) if from_logits else np.clip(scores, 0.0, 1.0)


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, 1e-12))
