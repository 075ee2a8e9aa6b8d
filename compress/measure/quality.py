"""Quality of a file from its outputs: right or wrong per sample, and how far it is from a reference.

Works on arrays alone. Against a reference the same samples are compared in pairs, which shows a drop several
times smaller than two separate accuracies can (Agresti and Min 2005). An output that is not finite is wrong
and agrees with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress.errors import DataError, UsageError
from compress.measure import statistics
from compress.measure.class_metrics import as_metric, divergence, estimate_classes
from compress.measure.results import Change, Metric

KINDS = ("classification", "binary", "multilabel", "regression")


@dataclass(frozen=True)
class OutputKind:
    """What one output is for.

    Args:
        kind: `"classification"` (scores over the last axis), `"binary"` and `"multilabel"` (one score per
            decision) or `"regression"`.
        from_logits: whether binary and multilabel scores are logits, decided at 0 instead of 0.5.
        name: of the output; prefixes its metrics when there are several.
    """

    kind: str
    from_logits: bool = False
    name: str = ""


@dataclass(frozen=True)
class Quality:
    """Metrics by name, and what they were computed from.

    Args:
        metrics: by name.
        per_sample: the value of each `accuracy`, `mse` and `mae` per sample, `(samples,)`.
        decisions: what each output of classes says, `(samples, ...)`, under `decisions`.
    """

    metrics: dict[str, Metric]
    per_sample: dict[str, np.ndarray]
    decisions: dict[str, np.ndarray] = field(default_factory=dict)


def evaluate_outputs(
    outputs: Sequence[np.ndarray],
    labels: Sequence[np.ndarray | None] | None,
    tasks: Sequence[Any] | None,
    reference: Sequence[np.ndarray] | None = None,
) -> Quality:
    """Return the quality of `outputs`, and its drop against `reference` where that is given.

    Args:
        outputs: one array per output, each `(samples, ...)`.
        labels: one array per output, or `None` for none: class numbers or one-hot rows for classification, 0
            and 1 for binary and multilabel, targets for regression.
        tasks: one per output: a kind, or an object with `kind` and optionally `from_logits` and `name`;
            `None` where what the outputs are for is not known, which leaves the distances to the reference.
        reference: outputs of the reference on the same samples.

    Raises:
        UsageError: a kind is unknown, or there is not one task per output.
        DataError: shapes of labels or of the reference do not fit the outputs.
    """
    if tasks is None:
        tasks, labels = ["regression"] * len(outputs), None
    tasks = [as_output_kind(task) for task in tasks]
    if len(tasks) != len(outputs):
        raise UsageError(f"there must be one task per output. Received: {len(tasks)} tasks for {len(outputs)} outputs")
    for what, arrays in (("labels", labels), ("the reference", reference)):
        if arrays is not None and len(arrays) != len(outputs):
            raise DataError(
                f"{what} must have one array per output. Received: {len(arrays)} for {len(outputs)} outputs"
            )
    metrics, per_sample, decisions = {}, {}, {}
    for index, (output, task) in enumerate(zip(outputs, tasks, strict=True)):
        prefix = f"{task.name or f'output_{index}'}." if len(outputs) > 1 else ""
        label = None if labels is None else labels[index]
        other = None if reference is None else np.asarray(reference[index])
        found = _evaluate_output(np.asarray(output), label, task, other)
        metrics |= {prefix + name: metric for name, metric in found.metrics.items()}
        per_sample |= {prefix + name: values for name, values in found.per_sample.items()}
        decisions |= {prefix + name: values for name, values in found.decisions.items()}
    return Quality(metrics, per_sample, decisions)


def as_output_kind(task: Any) -> OutputKind:
    """Return an `OutputKind` from a kind, or from an object with a `kind`, as in `compress.models.task`."""
    kind = task if isinstance(task, str) else getattr(task, "kind", None)
    if kind not in KINDS:
        raise UsageError(f"the kind of an output must be one of {', '.join(KINDS)}. Received: {task!r}")
    # A sigmoid's probabilities are decided at 0.5 whatever its loss was told.
    logits = bool(getattr(task, "from_logits", False)) and getattr(task, "head", "logits") != "sigmoid"
    return OutputKind(kind, logits, getattr(task, "name", "") or "")


def _evaluate_output(output: np.ndarray, label: Any, task: OutputKind, reference: np.ndarray | None) -> Quality:
    if len(output) == 0:
        raise DataError("there are no samples to measure quality on. Received: 0 samples")
    if reference is not None and reference.size != output.size:
        raise DataError(
            f"outputs must have the shape of the reference's. Received: {output.shape} and {reference.shape}"
        )
    if task.kind == "regression":
        found = _regression(output, label, reference)
    else:
        found = _decisions(output, label, task, reference)
    if reference is not None:
        found.metrics.update(_distances(output, reference))
    return found


def _decisions(output: np.ndarray, label: Any, task: OutputKind, reference: np.ndarray | None) -> Quality:
    metrics, per_sample = {}, {}
    decisions, valid = decide_outputs(output, task)
    if reference is not None:
        other, other_valid = decide_outputs(reference.reshape(output.shape), task)
        agree = ((decisions == other) & valid & other_valid).reshape(len(output), -1).mean(axis=1)
        metrics["agreement"] = _share_metric(agree)
        kl = divergence(output, reference.reshape(output.shape), task.kind, task.from_logits)
        metrics["kl"] = _error_metric(kl, None)
    if label is not None:
        truth = true_decisions(np.asarray(label), output, decisions.shape, task)
        right = (decisions == truth) & valid
        drop = None if reference is None else _accuracy_drop(right, (other == truth) & other_valid)
        per_sample["accuracy"] = right.reshape(len(output), -1).mean(axis=1)
        metrics = {"accuracy": _share_metric(per_sample["accuracy"], drop), **metrics}
        own = estimate_classes(output, decisions, truth, task.kind, valid)
        others = {}
        if reference is not None:
            others = estimate_classes(reference.reshape(output.shape), other, truth, task.kind, other_valid)
        metrics |= {name: as_metric(estimate, others.get(name)) for name, estimate in own.items()}
    return Quality(metrics, per_sample, {"decisions": np.where(valid, decisions, -1)})


def decide_outputs(output: np.ndarray, task: OutputKind) -> tuple[np.ndarray, np.ndarray]:
    """Return what each position says and whether its scores are finite."""
    finite = np.isfinite(output)
    if task.kind == "classification":
        if output.ndim < 2 or output.shape[-1] < 2:
            raise DataError(
                f"a classification output needs at least two classes in its last axis. Received: shape {output.shape}",
                "An output with one score per sample is binary or regression.",
            )
        return np.argmax(output, axis=-1), finite.all(axis=-1)
    return output > (0.0 if task.from_logits else 0.5), finite


def true_decisions(label: np.ndarray, output: np.ndarray, shape: tuple[int, ...], task: OutputKind) -> np.ndarray:
    """Return labels in the shape of the decisions, whatever form they came in."""
    if task.kind == "classification" and label.shape == output.shape:
        return np.argmax(label, axis=-1)
    if label.shape in (shape, (*shape, 1)) or (*label.shape, 1) == shape:
        label = label.reshape(shape)
        return label if task.kind == "classification" else label > 0.5
    raise DataError(
        f"labels do not fit the {task.kind} output. Received: {label.shape} for {output.shape}",
        "Give class numbers or one-hot rows for classification, and one 0 or 1 per score otherwise.",
    )


def _accuracy_drop(right: np.ndarray, reference_right: np.ndarray) -> Change:
    """Return the drop from `reference_right` to `right`; its unit is the sample, whatever its positions."""
    samples = len(right)
    lost = int(np.count_nonzero(reference_right & ~right))
    gained = int(np.count_nonzero(right & ~reference_right))
    if right.size == samples:
        low, high = statistics.paired_difference_interval(lost, gained, samples)
        p = statistics.mcnemar_p(lost, gained)
        return Change(value=(lost - gained) / samples, ci95=(-high, -low), lost=lost, gained=gained, mcnemar_p=p)
    losses = (reference_right.astype(float) - right).reshape(samples, -1).mean(axis=1)
    return Change(value=losses.mean(), ci95=statistics.mean_interval(losses), lost=lost, gained=gained)


def _regression(output: np.ndarray, label: Any, reference: np.ndarray | None) -> Quality:
    if label is None:
        return Quality({}, {})
    label = np.asarray(label)
    if label.size != output.size:
        raise DataError(f"labels do not fit the regression output. Received: {label.shape} for {output.shape}")
    errors = _flat(output) - _flat(label)
    other = None if reference is None else _flat(reference) - _flat(label)
    squared, absolute = (errors**2).mean(axis=1), np.abs(errors).mean(axis=1)
    metrics = {
        "mse": _error_metric(squared, None if other is None else (other**2).mean(axis=1)),
        "mae": _error_metric(absolute, None if other is None else np.abs(other).mean(axis=1)),
    }
    return Quality(metrics, {"mse": squared, "mae": absolute})


def _distances(output: np.ndarray, reference: np.ndarray) -> dict[str, Metric]:
    difference = np.abs(_flat(output) - _flat(reference))
    mean = _error_metric(difference.mean(axis=1), None)
    worst = mean if mean.value is None else mean.model_copy(update={"value": float(difference.max()), "ci95": None})
    return {"max_abs_diff": worst, "mean_abs_diff": mean}


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1).astype(np.float64)


def _share_metric(per_sample: np.ndarray, drop: Change | None = None) -> Metric:
    interval = statistics.share_interval(per_sample)
    return Metric(value=per_sample.mean(), n=len(per_sample), ci95=interval, higher_is_better=True, drop=drop)


def _error_metric(per_sample: np.ndarray, reference: np.ndarray | None) -> Metric:
    samples, broken = len(per_sample), int(np.count_nonzero(~np.isfinite(per_sample)))
    if broken:
        reasons = {"value": f"{broken} of {samples} samples are not finite"}
        return Metric(value=None, n=samples, ci95=None, higher_is_better=False, reasons=reasons)
    drop = None
    if reference is not None and np.isfinite(reference).all():
        rise = per_sample - reference
        drop = Change(value=rise.mean(), ci95=statistics.mean_interval(rise))
    interval = statistics.mean_interval(per_sample)
    return Metric(value=per_sample.mean(), n=samples, ci95=interval, higher_is_better=False, drop=drop)
