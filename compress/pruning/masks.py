"""Which weights are pruned: a score says how important each is, a distribution how many each kernel loses, a
pattern which go together. Masks hit the requested number exactly, also where scores tie. Arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.errors import UsageError
from compress.models.kernel_layout import KernelLayout, default_layout
from compress.models.walking import Kernel
from compress.pruning.distributions import (
    DISTRIBUTIONS,
    MEASURED,
    Distribution,
    DistributionLike,
    ScoredKernel,
    find_distribution,
    require_sparsity,
)
from compress.pruning.patterns import NM, Pattern, parse_pattern
from compress.pruning.scores import Score, ScoreInput, ScoreLike, find_score, score_weights

_ROUNDING = 1e-6  # how far a sparsity such as 0.666667 may be from that of a pattern


def make_masks(
    weights: Sequence[np.ndarray],
    sparsity: float,
    *,
    final: float | None = None,
    paths: Sequence[str] | None = None,
    layouts: Sequence[KernelLayout] | None = None,
    score: ScoreLike = "magnitude",
    distribution: DistributionLike = "uniform",
    pattern: str | Pattern = "unstructured",
    gradients: Sequence[np.ndarray] | None = None,
    movement: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Return one bool mask per array of `weights`, `False` where it is pruned.

    Weights that are zero are pruned before all others; among equal scores the lower index (row-major) goes first.
    An all-zero array is like any other. The number of `False` is exact: `round(sparsity * size)` for each kernel
    (uniform) or all together (global, ERK, LAMP), in whole blocks for a pattern of blocks.

    Args:
        weights: float arrays of rank 2 or more (any rank if the pattern is unstructured).
        sparsity: fraction of zeros now, at least 0 and less than 1.
        final: the sparsity at the end of training; by default `sparsity`.
        paths: what messages and a distribution by pattern call the arrays.
        layouts: which axes run over inputs and outputs; by default the last two.
        score: importance of the weights; the lowest are pruned.
        distribution: how many weights each array loses.
        pattern: which weights go together.
        gradients: mean gradients of the loss, for scores that need them.
        movement: what `Movement.read` returned, for the score `movement`.
        seed: seed of the score `random`.

    Raises:
        UsageError: an option that makes no sense, or gradients or movement missing.
        PassError: a weight, gradient or score is NaN.
    """
    require_sparsity(sparsity)
    pattern, score = parse_pattern(pattern), find_score(score)
    weights = [np.asarray(each) for each in weights]
    names = [str(i) for i in range(len(weights))] if paths is None else list(paths)
    layouts = [default_layout(each.ndim) for each in weights] if layouts is None else list(layouts)
    chosen = find_distribution(distribution, names, sparsity, sparsity if final is None else final)
    _require_compatible(pattern, distribution, score, sparsity)
    kernels = []
    for index, (path, value, layout) in enumerate(zip(names, weights, layouts, strict=True)):
        given = ScoreInput(
            value,
            None if gradients is None else gradients[index],
            None if movement is None else movement[index],
            (seed, index),
        )
        pattern.require_fit(path, value.shape, layout)
        units = _score_units(pattern, layout, value, score_weights(score, given, path))
        kernels.append(ScoredKernel(path, value.shape, units))
    return [
        pattern.mask(kernel.scores, count, layout, kernel.shape)
        for kernel, count, layout in zip(kernels, chosen.function(kernels, sparsity), layouts, strict=True)
    ]


def _score_units(pattern: Pattern, layout: KernelLayout, weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the scores of the pattern's units; those without a weight other than zero come before all others."""
    units = pattern.pool(scores, layout)
    alive = pattern.pool(weights != 0, layout)
    return np.where(alive, units, -np.inf).astype(units.dtype, copy=False)


def resolve_sparsity(sparsity: float | None, pattern: str | Pattern) -> float:
    """Return the final sparsity: the one asked for, or the one that an N:M pattern implies.

    Raises:
        UsageError: outside [0, 1), missing, or other than the pattern's.
    """
    pattern = parse_pattern(pattern)
    if sparsity is not None:
        require_sparsity(sparsity)
    if isinstance(pattern, NM):
        if sparsity is not None and abs(sparsity - pattern.sparsity) > _ROUNDING:
            raise UsageError(
                f"pattern {pattern} has sparsity {pattern.sparsity:.6g}. Received: sparsity={sparsity!r}",
                "Leave the sparsity out, or choose another pattern.",
            )
        return pattern.sparsity
    if sparsity is None:
        raise UsageError(f"expected a sparsity for the pattern {pattern}. Received: sparsity=None")
    return float(sparsity)


def require_plan(
    kernels: Sequence[Kernel],
    layouts: Sequence[KernelLayout],
    sparsity: float,
    distribution: DistributionLike = "uniform",
    pattern: str | Pattern = "unstructured",
    score: ScoreLike = "magnitude",
) -> None:
    """Raise UsageError for all that can be refused before training; the message names the kernel and the numbers.

    That is: a sparsity out of range or other than the pattern's, an unknown name, a pattern that does not fit a
    kernel, a distribution that a score or a pattern rules out, and a kernel that would lose all of its weights.
    """
    pattern, score = parse_pattern(pattern), find_score(score)
    sparsity = resolve_sparsity(sparsity, pattern)
    if distribution == MEASURED:  # not known yet; like others, it leaves each kernel a weight where it can
        chosen = DISTRIBUTIONS["global"]
    else:
        chosen = find_distribution(distribution, [kernel.path for kernel in kernels], sparsity, sparsity)
    _require_compatible(pattern, distribution, score, sparsity)
    planned = []
    for kernel, layout in zip(kernels, layouts, strict=True):
        shape = tuple(kernel.variable.shape)
        pattern.require_fit(kernel.path, shape, layout)
        units = pattern.pool(np.broadcast_to(np.float32(0), shape), layout)
        planned.append(ScoredKernel(kernel.path, shape, units))
    _require_some_left(planned, chosen, sparsity)


def _require_compatible(pattern: Pattern, distribution: DistributionLike, score: Score, sparsity: float) -> None:
    if isinstance(pattern, NM) and distribution != "uniform":
        raise UsageError(
            f"pattern {pattern} has the same sparsity in every kernel. Received: distribution={distribution!r}",
            "Use the distribution uniform.",
        )
    if isinstance(pattern, NM) and sparsity > pattern.sparsity + _ROUNDING:
        raise UsageError(f"pattern {pattern} has sparsity {pattern.sparsity:.6g}. Received: sparsity={sparsity!r}")
    if distribution == "lamp" and score.signed:
        raise UsageError(
            f"distribution lamp needs scores of at least 0. Received: the score {score.function.__name__}",
            "Use the distribution global or uniform with this score.",
        )


def _require_some_left(kernels: Sequence[ScoredKernel], distribution: Distribution, sparsity: float) -> None:
    if distribution.reads_scores:
        total = sum(kernel.size for kernel in kernels)
        if round(sparsity * total) > total - len(kernels):
            raise UsageError(
                f"expected each of {len(kernels)} kernels to keep a weight. "
                f"Received: sparsity={sparsity}, which leaves {total - round(sparsity * total)} of {total}",
                "Lower the sparsity.",
            )
        return
    for kernel, count in zip(kernels, distribution.function(kernels, sparsity), strict=True):
        if 0 < kernel.size <= count:
            raise UsageError(
                f"expected {kernel.path} to keep a weight. "
                f"Received: sparsity={sparsity}, which prunes {count} of {kernel.size}",
                f"Lower the sparsity, or leave it out with exclude={[kernel.path]}.",
            )
