"""Agreement of two files over a data set: which decisions change, and whether for better or worse."""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.data.split import Arrays
from compress.measure.comparison import ClassFlips, OutputComparison
from compress.measure.quality import as_output_kind, decide_outputs, evaluate_outputs, true_decisions
from compress.models.fit_check import pair_labels
from compress.models.task import infer_output_tasks

_EXAMPLES = 20


def compare_decisions(names: list[str], a: list[np.ndarray], b: list[np.ndarray], y: Arrays) -> list[OutputComparison]:
    """Return what two files say through each output.

    Args:
        names: of the outputs.
        a: what the first file gives, one array `(samples, ...)` per output.
        b: what the second file gives.
        y: labels in the structure that `fit` takes, or `None`.

    Raises:
        DataError: labels or outputs do not fit each other.
    """
    tasks = infer_output_tasks(names, a, y)
    labels = pair_labels(names, y)
    return [
        _compare_output(name, first, second, labels[name], task)
        for name, first, second, task in zip(names, a, b, tasks, strict=True)
    ]


def _compare_output(name: str, a: np.ndarray, b: np.ndarray, label: np.ndarray | None, task: Any) -> OutputComparison:
    b = b.reshape(a.shape)
    labels = None if label is None else [label]
    found = {
        "output": name,
        "kind": task.kind,
        "metrics_a": evaluate_outputs([a], labels, [task]).metrics,
        "metrics_b": evaluate_outputs([b], labels, [task], [a]).metrics,
    }
    if task.kind == "regression":
        unknown = "the output has no classes" if label is not None else "without labels no classes are known"
        reasons = dict.fromkeys(("decisions", "flips", "right_to_wrong", "wrong_to_right"), unknown)
        none = dict.fromkeys(reasons)
        return OutputComparison(**found, **none, by_class=[], examples=[], reasons=reasons)
    kind = as_output_kind(task)
    said_a, valid_a = decide_outputs(a, kind)
    said_b, valid_b = decide_outputs(b, kind)
    flipped = ~((said_a == said_b) & valid_a & valid_b)
    truth = None if label is None else true_decisions(label, a, said_a.shape, kind)
    lost = gained = None
    if truth is not None:
        right_a, right_b = (said_a == truth) & valid_a, (said_b == truth) & valid_b
        lost, gained = right_a & ~right_b, right_b & ~right_a
    return OutputComparison(
        **found,
        decisions=flipped.size,
        flips=_number(flipped),
        right_to_wrong=_number(lost),
        wrong_to_right=_number(gained),
        by_class=_by_class(said_a if truth is None else truth, flipped, lost, gained),
        examples=np.flatnonzero(flipped.reshape(len(a), -1).any(axis=1))[:_EXAMPLES].tolist(),
        reasons={} if truth is not None else dict.fromkeys(("right_to_wrong", "wrong_to_right"), "there are no labels"),
    )


def _by_class(
    classes: np.ndarray, flipped: np.ndarray, lost: np.ndarray | None, gained: np.ndarray | None
) -> list[ClassFlips]:
    found = []
    for label in np.unique(classes):
        here = classes == label
        counts = [None if mask is None else _number(mask & here) for mask in (flipped, lost, gained)]
        found.append(
            ClassFlips(
                label=int(label),
                decisions=_number(here),
                flips=counts[0],
                right_to_wrong=counts[1],
                wrong_to_right=counts[2],
            )
        )
    return found


def _number(mask: np.ndarray | None) -> int | None:
    return None if mask is None else int(np.count_nonzero(mask))
