"""How many weights each kernel loses: one small function per distribution, and one row in `DISTRIBUTIONS`.

ERK: Evci et al. 2020, arXiv:1911.11134. LAMP: Lee et al. 2021, arXiv:2010.07611. What is counted are units: weights,
or the blocks of a pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compress.errors import UsageError
from compress.models.patterns import matches, require_matches
from compress.pruning.patterns import lowest_mask

DistributionName = Literal["uniform", "global", "erk", "lamp", "sensitivity"]
DistributionLike = DistributionName | Mapping[str, float]
"""A name, or sparsities by shell pattern over kernel paths; the first that fits counts."""


@dataclass(frozen=True)
class ScoredKernel:
    """What a distribution sees of a kernel.

    Args:
        path: path of the kernel.
        shape: shape of the kernel.
        scores: importance of each unit, any shape; already pruned units have `-inf`.
    """

    path: str
    shape: tuple[int, ...]
    scores: np.ndarray

    @property
    def size(self) -> int:
        """Number of units."""
        return self.scores.size


def uniform(kernels: Sequence[ScoredKernel], sparsity: float) -> list[int]:
    """Every kernel has the same sparsity."""
    return [round(sparsity * kernel.size) for kernel in kernels]


def erk(kernels: Sequence[ScoredKernel], sparsity: float) -> list[int]:
    """Erdos-Renyi-Kernel: the density is proportional to the sum of a kernel's dimensions over their product."""
    sizes = np.array([kernel.size for kernel in kernels], np.int64)
    density = np.array([sum(kernel.shape) / max(1, math.prod(kernel.shape)) for kernel in kernels])
    total = round(sparsity * int(sizes.sum()))
    dense = np.zeros(len(kernels), bool)  # kernels that would need more weights than they have
    while not dense.all():
        kept = sizes.sum() - total - sizes[dense].sum()
        scale = kept / (density * sizes)[~dense].sum()
        too_many = ~dense & (density * scale > 1)
        if not too_many.any():
            break
        dense |= too_many
    pruned = np.where(dense, 0, sizes * (1 - density * scale))
    return round_to_total(pruned, total, most_prunable(sizes, total))


def ranked_together(kernels: Sequence[ScoredKernel], sparsity: float) -> list[int]:
    """All kernels are ranked together; ties go by kernel, then index. Each keeps its best unit as long as it can."""
    return _rank([kernel.scores.ravel() for kernel in kernels], sparsity)


def lamp(kernels: Sequence[ScoredKernel], sparsity: float) -> list[int]:
    """All kernels are ranked together by the share of a squared score in those of the kernel that are no less."""
    for kernel in kernels:
        if np.any((kernel.scores < 0) & np.isfinite(kernel.scores)):
            raise UsageError(
                f"distribution lamp needs scores of at least 0. Received: a negative one in {kernel.path}",
                "Use the distribution global or uniform with this score.",
            )
    return _rank([_lamp_scores(kernel.scores.ravel()) for kernel in kernels], sparsity)


def _lamp_scores(scores: np.ndarray) -> np.ndarray:
    """Return the scores of one kernel in rising order; those of zeros are 0."""
    result = np.zeros(scores.size)
    positive = np.sort(np.compress(scores > 0, scores)).astype(np.float64)
    if positive.size:
        greatest = positive[-1]  # scaled by it, squares neither overflow nor vanish
        squares = (positive / greatest) ** 2 if np.isfinite(greatest) else np.isinf(positive).astype(np.float64)
        result[-positive.size :] = squares / np.cumsum(squares[::-1])[::-1]
    return result


def _rank(scores: Sequence[np.ndarray], sparsity: float) -> list[int]:
    sizes = [each.size for each in scores]
    count = round(sparsity * sum(sizes))
    counts = _lowest_counts(scores, count)
    emptied = any(0 < size == pruned for pruned, size in zip(counts, sizes, strict=True))
    if emptied and count <= sum(sizes) - len(sizes):
        counts = _lowest_counts([np.delete(each, each.argmax()) if each.size else each for each in scores], count)
    return counts


def _lowest_counts(scores: Sequence[np.ndarray], count: int) -> list[int]:
    kept = lowest_mask(np.concatenate(scores), count)
    parts = np.split(kept, np.cumsum([each.size for each in scores])[:-1])
    return [int(part.size - np.count_nonzero(part)) for part in parts]


def most_prunable(sizes: np.ndarray, total: int) -> np.ndarray:
    """Return how many units each kernel may lose: all but one, unless the total asks for more."""
    all_but_one = np.maximum(sizes - 1, 0)
    return all_but_one if total <= all_but_one.sum() else sizes


def round_to_total(counts: np.ndarray, total: int, limits: np.ndarray) -> list[int]:
    """Return whole numbers near `counts`, at most `limits`, whose sum is `total`; the greatest remainder rounds up."""
    whole = np.minimum(np.floor(counts).astype(np.int64), limits)
    order = np.argsort(whole - counts, kind="stable")
    missing = total - int(whole.sum())
    while missing > 0:
        for index in order:
            if missing > 0 and whole[index] < limits[index]:
                whole[index] += 1
                missing -= 1
    return [int(count) for count in whole]


@dataclass(frozen=True)
class Distribution:
    """A distribution.

    Args:
        function: returns how many units each kernel loses at a sparsity of all.
        reads_scores: the counts depend on the scores, so they are not known before training.
    """

    function: Callable[[Sequence[ScoredKernel], float], list[int]]
    reads_scores: bool = False


DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": Distribution(uniform),
    "global": Distribution(ranked_together, reads_scores=True),
    "erk": Distribution(erk),
    "lamp": Distribution(lamp, reads_scores=True),
}


MEASURED = "sensitivity"
"""The name of sparsities that are measured first; `PruningSensitivity.distribution` makes a mapping of them."""


def find_distribution(
    distribution: DistributionLike, paths: Sequence[str], sparsity: float, final: float
) -> Distribution:
    """Return the distribution of this name, or make one of sparsities by pattern.

    Args:
        distribution: a name, or a mapping from shell patterns to sparsities.
        paths: paths of the kernels.
        sparsity: the sparsity that masks are wanted for.
        final: the sparsity at the end of training; a mapping's sparsities grow in proportion to `sparsity / final`.

    Raises:
        UsageError: unknown name, a sparsity outside [0, 1), or a pattern that matches nothing.
    """
    if isinstance(distribution, Mapping):
        return _by_pattern(distribution, paths, sparsity, final)
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        raise UsageError(
            f"expected distribution to be one of {[*DISTRIBUTIONS, MEASURED]}, or sparsities by pattern. "
            f"Received: {distribution!r}"
        )
    return DISTRIBUTIONS[distribution]


def _by_pattern(table: Mapping[str, float], paths: Sequence[str], sparsity: float, final: float) -> Distribution:
    require_matches(paths, list(table), "distribution")
    for pattern, value in table.items():
        require_sparsity(value, f"the sparsity of {pattern!r}")
    if final == 0 and any(table.values()):
        raise UsageError(
            "sparsities by pattern grow along with that of all. Received: sparsity=0",
            "Give the sparsity of the kernels that fit no pattern, or leave these out with exclude.",
        )
    chosen = [next((pattern for pattern in table if matches(path, [pattern])), None) for path in paths]
    if unused := [pattern for pattern in table if pattern not in chosen]:
        raise UsageError(
            f"distribution: an earlier pattern takes every kernel of this one. Received: {unused[0]!r}",
            "Put the narrower pattern first.",
        )
    grown = sparsity / final if final else 0.0
    targets = dict(zip(paths, (final if pattern is None else table[pattern] for pattern in chosen), strict=True))

    def count(kernels: Sequence[ScoredKernel], sparsity: float) -> list[int]:
        return [round(targets[kernel.path] * grown * kernel.size) for kernel in kernels]

    return Distribution(count)


def require_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raise UsageError unless `sparsity` is a number in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.number)) or not 0 <= sparsity < 1:
        raise UsageError(f"expected {name} at least 0 and less than 1. Received: {_brief(name)}={sparsity!r}")


def _brief(name: str) -> str:
    return "sparsity" if " " in name else name
