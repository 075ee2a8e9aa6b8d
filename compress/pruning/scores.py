"""How important each weight is: one small function per score, and one row for it in `SCORES`. NumPy only.

Taylor: Molchanov et al. 2019, arXiv:1906.10771. Movement: Sanh et al. 2020, arXiv:2005.07683.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compress.errors import PassError, UsageError

ScoreName = Literal["magnitude", "random", "taylor", "movement"]


@dataclass(frozen=True)
class ScoreInput:
    """What a score can be made from, for one kernel; all arrays have its shape.

    Args:
        weights: the kernel, float32 or float64.
        gradient: mean gradient of the loss, or `None` unless the score needs it.
        movement: what `Movement.read` returned for the kernel, or `None` unless the score needs it.
        seed: seeds of a random generator; the same for the kernel whenever the masks are made.
    """

    weights: np.ndarray
    gradient: np.ndarray | None
    movement: np.ndarray | None
    seed: Sequence[int]


@dataclass(frozen=True)
class Score:
    """A score: `function` returns the importance of each weight; the lowest are pruned first.

    Zero weights are pruned before all others whatever their score, so that what is pruned stays pruned.

    Args:
        function: returns an array of the kernel's shape, without NaN.
        needs_gradients: `ScoreInput.gradient` must be there.
        needs_movement: `ScoreInput.movement` must be there; it exists during training only.
        signed: scores may be negative, so that the distribution LAMP, which squares them, cannot be used.
    """

    function: Callable[[ScoreInput], np.ndarray]
    needs_gradients: bool = False
    needs_movement: bool = False
    signed: bool = False


def magnitude(given: ScoreInput) -> np.ndarray:
    """Return `|w|`."""
    return np.abs(given.weights)


def random(given: ScoreInput) -> np.ndarray:
    """Return uniform random numbers: the baseline that every other score has to beat."""
    return np.random.default_rng(list(given.seed)).random(given.weights.shape, np.float32)


def taylor(given: ScoreInput) -> np.ndarray:
    """Return `|w * gradient|`: how much the loss changes, to first order, if the weight goes."""
    return np.abs(given.weights * given.gradient)


def movement(given: ScoreInput) -> np.ndarray:
    """Return how far each weight has moved away from zero in training; one that moved towards it goes first."""
    return given.movement


SCORES: dict[str, Score] = {
    "magnitude": Score(magnitude),
    "random": Score(random),
    "taylor": Score(taylor, needs_gradients=True),
    "movement": Score(movement, needs_movement=True, signed=True),
}

ScoreLike = ScoreName | Score | Callable[[ScoreInput], np.ndarray]
"""A name, a score, or the function of one that needs neither gradients nor movement."""


def find_score(score: ScoreLike) -> Score:
    """Return the score of this name, or make one of a function.

    Raises:
        UsageError: unknown name.
    """
    if isinstance(score, Score):
        return score
    if callable(score):
        return Score(score)
    if score not in SCORES:
        raise UsageError(f"expected score to be one of {list(SCORES)} or a function. Received: {score!r}")
    return SCORES[score]


class Movement:
    """Sums `w * (w_now - w)` over the times that it sees the weights: the movement score of any training loop.

    Under SGD it is the paper's sum of `-w * gradient`, times the learning rate; it asks nothing of the optimizer.

    Args:
        weights: the kernels when training starts.
    """

    def __init__(self, weights: Sequence[np.ndarray]):
        self._last = [_as_float(each).copy() for each in weights]
        self._sums = [np.zeros_like(each) for each in self._last]

    def update(self, weights: Sequence[np.ndarray]) -> None:
        """Take the kernels as they are now, before they are pruned."""
        pairs = zip(self._last, weights, strict=True)
        self._sums = [
            total + last * (_as_float(now) - last) for total, (last, now) in zip(self._sums, pairs, strict=True)
        ]

    def restart(self, weights: Sequence[np.ndarray]) -> None:
        """Go on from the kernels as they are now, after they were pruned; this step is no movement."""
        self._last = [_as_float(each).copy() for each in weights]

    def read(self) -> list[np.ndarray]:
        """Return the sums, one array per kernel."""
        return self._sums


def score_weights(score: Score, given: ScoreInput, path: str) -> np.ndarray:
    """Return the scores of the kernel at `path`.

    Raises:
        PassError: a weight, gradient or score is NaN.
        UsageError: what the score needs is missing, or its result has the wrong shape.
    """
    if score.needs_gradients and given.gradient is None:
        raise UsageError("expected data to compute gradients from. Received: data=None", "Pass data=(x, y).")
    if score.needs_movement and given.movement is None:
        raise UsageError(
            "the score movement needs a training. Received: pruning at once",
            "Use magnitude or taylor, or prune while training.",
        )
    weights = _as_float(given.weights)
    require_numbers(weights, path)
    if given.gradient is not None:
        require_numbers(given.gradient, f"the gradient of {path}")
    scores = np.asarray(score.function(ScoreInput(weights, given.gradient, given.movement, given.seed)))
    if scores.shape != weights.shape:
        raise UsageError(f"expected scores of shape {weights.shape} for {path}. Received: {scores.shape}")
    scores = _as_float(scores)
    if score.function is not magnitude and np.isnan(scores).any():
        raise PassError(f"expected scores that are numbers. Received: NaN for {path}")
    return scores


def require_numbers(values: np.ndarray, name: str) -> None:
    """Raise PassError if one of `values` is NaN."""
    if np.isnan(values).any():
        raise PassError(
            f"expected weights that are numbers. Received: NaN in {name}",
            "Training has diverged: lower the learning rate, or start from an earlier checkpoint.",
        )


def _as_float(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)
