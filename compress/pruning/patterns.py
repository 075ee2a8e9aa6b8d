"""Which weights are pruned together: one by one, some of every m neighbours, or whole blocks.

A pattern pools the scores of weights into units, and makes masks from the number of units to prune. N:M sparsity:
Zhou et al. 2021, arXiv:2102.04010; blocks: Narang et al. 2017, arXiv:1711.02782. One more pattern is one more class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.errors import UsageError
from compress.models.kernel_layout import KernelLayout, from_matrices, to_matrices


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
    # Partitioning is 20 times slower where most values are equal, as those of a half-pruned kernel are.
    lowest = values.min()
    others = np.compress(values > lowest, values)
    n -= values.size - others.size
    return lowest if n < 0 else np.partition(others, n)[n]


@dataclass(frozen=True)
class Unstructured:
    """Weights are pruned one by one, wherever they are."""

    def __str__(self) -> str:
        return "unstructured"

    def require_fit(self, path: str, shape: Sequence[int], layout: KernelLayout) -> None:
        """Accept every kernel."""

    def pool(self, scores: np.ndarray, layout: KernelLayout) -> np.ndarray:
        """Return the score of each unit: here of each weight."""
        return scores

    def mask(self, scores: np.ndarray, count: int, layout: KernelLayout, shape: Sequence[int]) -> np.ndarray:
        """Return a bool mask of `shape`, `False` for the `count` units of the lowest pooled `scores`."""
        return lowest_mask(scores, count)


@dataclass(frozen=True)
class NM:
    """At most `n` of each `m` neighbours along the inputs stay, such as 2:4; so the sparsity is `1 - n / m`.

    At a lower sparsity, on the way there, the weights that go first are the least of those that will go.

    Raises:
        UsageError: not 0 < n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UsageError(f"expected a pattern n:m with 0 < n < m, such as 2:4. Received: {self}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The only final sparsity that this pattern has."""
        return 1 - self.n / self.m

    def require_fit(self, path: str, shape: Sequence[int], layout: KernelLayout) -> None:
        """Raise UsageError unless `m` divides the number of inputs of the kernel at `path`."""
        _require_multiple(self, path, "inputs", layout.matrix_shape(shape)[1], self.m)

    def pool(self, scores: np.ndarray, layout: KernelLayout) -> np.ndarray:
        """Return the score of each unit: here of each weight."""
        return scores

    def mask(self, scores: np.ndarray, count: int, layout: KernelLayout, shape: Sequence[int]) -> np.ndarray:
        """Return a bool mask of `shape`, `False` for `count` weights, at most `m - n` of each group."""
        matrices = to_matrices(scores, layout)
        positions, inputs, outputs = matrices.shape
        groups = matrices.reshape(positions, inputs // self.m, self.m, outputs)
        mask = self._highest_of_each(groups)
        pruned = ~mask
        if count < np.count_nonzero(pruned):
            mask[pruned] = lowest_mask(groups[pruned], count)
        return from_matrices(mask, layout, shape)

    def _highest_of_each(self, groups: np.ndarray) -> np.ndarray:
        # Ranks by comparing all pairs: 5 times faster than sorting groups of 4. Of two equals the later ranks higher.
        members = [np.ascontiguousarray(groups[:, :, i]) for i in range(self.m)]
        ranks = np.zeros((self.m, *members[0].shape), np.uint8 if self.m < 256 else np.uint32)
        for i in range(self.m):
            for j in range(i + 1, self.m):
                later_is_less = members[j] < members[i]
                ranks[i] += later_is_less
                ranks[j] += ~later_is_less
        return np.moveaxis(ranks >= self.m - self.n, 0, 2).copy()


@dataclass(frozen=True)
class Block:
    """Blocks of `inputs` x `outputs` weights are pruned whole, such as 4x1: 4 along the inputs of one output.

    Raises:
        UsageError: not both at least 1.
    """

    inputs: int
    outputs: int

    def __post_init__(self) -> None:
        if self.inputs < 1 or self.outputs < 1:
            raise UsageError(f"expected blocks of at least 1x1 weights. Received: {self}")

    def __str__(self) -> str:
        return f"{self.inputs}x{self.outputs}"

    def require_fit(self, path: str, shape: Sequence[int], layout: KernelLayout) -> None:
        """Raise UsageError unless the blocks fill the kernel at `path`."""
        _, inputs, outputs = layout.matrix_shape(shape)
        _require_multiple(self, path, "inputs", inputs, self.inputs)
        _require_multiple(self, path, "outputs", outputs, self.outputs)

    def pool(self, scores: np.ndarray, layout: KernelLayout) -> np.ndarray:
        """Return the mean score of each block, `(positions, inputs / block, outputs / block)`."""
        matrices = to_matrices(scores, layout)
        positions, inputs, outputs = matrices.shape
        blocks = matrices.reshape(positions, inputs // self.inputs, self.inputs, outputs // self.outputs, self.outputs)
        return blocks.mean(axis=(2, 4))

    def mask(self, scores: np.ndarray, count: int, layout: KernelLayout, shape: Sequence[int]) -> np.ndarray:
        """Return a bool mask of `shape`, `False` for the `count` blocks of the lowest pooled `scores`."""
        blocks = lowest_mask(scores, count)
        return from_matrices(blocks.repeat(self.inputs, axis=1).repeat(self.outputs, axis=2), layout, shape)


Pattern = Unstructured | NM | Block


def parse_pattern(value: str | Pattern) -> Pattern:
    """Return the pattern that `"unstructured"`, `"2:4"` (n:m) or `"4x1"` (inputs x outputs) stands for.

    Raises:
        UsageError: anything else, or impossible numbers.
    """
    if isinstance(value, Pattern):
        return value
    text = value.strip().lower() if isinstance(value, str) else ""
    if text == "unstructured":
        return Unstructured()
    for expression, kind in ((r"(\d{1,5}):(\d{1,5})", NM), (r"(\d{1,5})x(\d{1,5})", Block)):
        if found := re.fullmatch(expression, text, re.ASCII):
            return kind(int(found[1]), int(found[2]))
    raise UsageError(
        f"expected a pattern. Received: {value!r}",
        "Use unstructured, n:m such as 2:4, or blocks of inputs x outputs such as 4x1.",
    )


def _require_multiple(pattern: Pattern, path: str, axis: str, length: int, divisor: int) -> None:
    if length % divisor:
        raise UsageError(
            f"pattern {pattern} needs a multiple of {divisor} {axis}. Received: {path} with {length}",
            f"Leave it out with exclude={[path]}, or choose another pattern.",
        )
