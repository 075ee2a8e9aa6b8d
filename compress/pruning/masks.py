"""Which weights are pruned: scores say how important each weight is, a distribution how many each kernel
loses, a mask function which ones. Masks hit the requested number exactly, also where scores tie. NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from compress.errors import UsageError

DistributionName = Literal["uniform", "global"]


def magnitude_mask(weights: np.ndarray, sparsity: float) -> np.ndarray:
    """Return a bool mask of `weights`' shape, `False` for the `round(sparsity * size)` smallest magnitudes.

    Among equal magnitudes the one with the lower index (row-major) is pruned first; zeros before all else.

    Raises:
        UsageError: sparsity outside [0, 1), or a weight is NaN.
    """
    return magnitude_masks([weights], sparsity)[0]


def magnitude_masks(
    weights: Sequence[np.ndarray], sparsity: float, distribution: DistributionName = "uniform"
) -> list[np.ndarray]:
    """Return one bool mask per array of `weights`, `False` where the magnitude is among the smallest.

    Args:
        weights: float arrays of any shape.
        sparsity: fraction of zeros, at least 0 and less than 1.
        distribution: `"uniform"`: every array has this sparsity; `"global"`: all of them together have.

    Raises:
        UsageError: sparsity outside [0, 1), unknown distribution, or a weight is NaN.
    """
    require_sparsity(sparsity)
    if distribution not in _COUNTS:
        raise UsageError(f"expected distribution to be one of {sorted(_COUNTS)}. Received: {distribution!r}")
    scores = [magnitude_scores(each) for each in weights]
    return [
        lowest_mask(each, count) for each, count in zip(scores, _COUNTS[distribution](scores, sparsity), strict=True)
    ]


def require_sparsity(sparsity: float) -> None:
    """Raise UsageError unless `sparsity` is a number in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.number)) or not 0 <= sparsity < 1:
        raise UsageError(f"expected sparsity at least 0 and less than 1. Received: sparsity={sparsity!r}")


def magnitude_scores(weights: np.ndarray) -> np.ndarray:
    """Return the importance of each weight: its absolute value, as float32 or float64.

    Raises:
        UsageError: a weight is NaN.
    """
    weights = np.asarray(weights)
    scores = np.abs(weights if weights.dtype in (np.float32, np.float64) else weights.astype(np.float32))
    if np.isnan(scores).any():
        raise UsageError(
            "expected weights that are numbers. Received: NaN",
            "Training has diverged: lower the learning rate.",
        )
    return scores


def lowest_mask(scores: np.ndarray, count: int) -> np.ndarray:
    """Return a bool mask of `scores`' shape, `False` for exactly the `count` lowest; ties go by index."""
    if count <= 0:
        return np.ones(scores.shape, bool)
    flat = scores.ravel()
    threshold = _nth_lowest(flat, count - 1)
    mask = flat >= threshold
    missing = count - (mask.size - np.count_nonzero(mask))
    mask[np.flatnonzero(flat == threshold)[:missing]] = False
    return mask.reshape(scores.shape)


def _nth_lowest(values: np.ndarray, n: int) -> float:
    # Partitioning is 20 times slower where most values are equal, as the zeros of a half-pruned kernel are.
    lowest = values.min()
    others = np.compress(values > lowest, values)
    n -= values.size - others.size
    return lowest if n < 0 else np.partition(others, n)[n]


def uniform_counts(scores: Sequence[np.ndarray], sparsity: float) -> list[int]:
    """Return how many weights each kernel loses if every kernel has the same sparsity."""
    return [round(sparsity * each.size) for each in scores]


def global_counts(scores: Sequence[np.ndarray], sparsity: float) -> list[int]:
    """Return how many weights each kernel loses if all are ranked together; ties go by kernel, then index."""
    together = np.concatenate([each.ravel() for each in scores])
    kept = lowest_mask(together, round(sparsity * together.size))
    parts = np.split(kept, np.cumsum([each.size for each in scores])[:-1])
    return [int(part.size - np.count_nonzero(part)) for part in parts]


_COUNTS: dict[str, Callable[[Sequence[np.ndarray], float], list[int]]] = {
    "uniform": uniform_counts,
    "global": global_counts,
}
