"""How important each unit of a group is, from all weights that it takes with it.

L1: Li et al. 2016, arXiv:1608.08710. Batch-norm scale: Liu et al. 2017, arXiv:1708.06519. FPGM: He et al. 2018,
arXiv:1811.00250. Taylor: Molchanov et al. 2019, arXiv:1906.10771. The Hessian of the outputs instead of the loss's
needs no labels; its diagonal is estimated with random signs (Hutchinson 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compress.channels.atoms import WeightAxis

Gradients = Sequence[np.ndarray]
"""Gradients `(places, others)` of one weight: one, or one for each draw."""
ChannelScore = Callable[[WeightAxis, np.ndarray, Gradients], np.ndarray | None]
"""`score(weight, rows, gradients)`: importance of each place along the axis, or `None` where it says nothing of this
weight. `rows` `(places, others)` are the weights by place, `gradients` those in the same form, where there are any."""


def l1(weight: WeightAxis, rows: np.ndarray, gradients: Gradients) -> np.ndarray | None:
    """Sum of the sizes."""
    return np.abs(rows).sum(axis=1) if _is_kernel(weight) else None


def l2(weight: WeightAxis, rows: np.ndarray, gradients: Gradients) -> np.ndarray | None:
    """Euclidean length."""
    return np.sqrt(np.square(rows, dtype="float64").sum(axis=1)) if _is_kernel(weight) else None


def bn_scale(weight: WeightAxis, rows: np.ndarray, gradients: Gradients) -> np.ndarray | None:
    """Size of the factor that batch normalisation gives the channel."""
    return np.abs(rows[:, 0]) if weight.variable.name == "gamma" else None


def fpgm(weight: WeightAxis, rows: np.ndarray, gradients: Gradients) -> np.ndarray | None:
    """Distance to all others: who is near their geometric median can be replaced by them."""
    if not _is_kernel(weight) or weight.role != "makes":
        return None
    squares = np.square(rows, dtype="float64").sum(axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * rows.astype("float64") @ rows.T.astype("float64")
    return np.sqrt(np.maximum(distances, 0)).sum(axis=1)


def taylor(weight: WeightAxis, rows: np.ndarray, gradients: Gradients) -> np.ndarray | None:
    """Square of what the loss, or a draw of the outputs, would change by, to first order."""
    if not gradients or weight.role == "reads":
        return None
    return np.mean([np.square((rows * each).sum(axis=1, dtype="float64")) for each in gradients], axis=0)


SCORES: dict[str, ChannelScore] = {
    "l1": l1, "l2": l2, "bn_scale": bn_scale, "fpgm": fpgm, "taylor": taylor, "hessian": taylor
}  # fmt: skip


def score_units(
    weights: list[WeightAxis],
    units_of: Callable[[np.ndarray], np.ndarray],
    score: ChannelScore,
    values: Mapping[int, np.ndarray],
    gradients: Mapping[int, Gradients],
    *,
    normalize: bool = True,
) -> dict[int, float]:
    """Return the importance of every unit: the mean over its weights.

    Args:
        weights: all that gets shorter.
        units_of: returns the unit of each atom.
        score: importance of the places along one axis of one weight.
        values: weights by `id` of their variable.
        gradients: gradients by `id` of their variable, where there are.
        normalize: whether each weight counts in units of its own mean, so that wide and narrow layers can be compared.
    """
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for weight in weights:
        rows = _rows(values[id(weight.variable)], weight.axis)
        own = [_rows(each, weight.axis) for each in gradients.get(id(weight.variable), ())]
        found = score(weight, rows, own)
        if found is None:
            continue
        mean = float(np.mean(found)) if normalize else 1.0
        found = found / mean if mean > 0 else np.zeros(len(found))
        for unit, value in zip(units_of(weight.atoms).tolist(), found.tolist(), strict=True):
            sums[unit] = sums.get(unit, 0.0) + value
            counts[unit] = counts.get(unit, 0) + 1
    return {unit: total / counts[unit] for unit, total in sums.items()}


def _rows(values: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _is_kernel(weight: WeightAxis) -> bool:
    return len(weight.variable.shape) > 1
