"""Kernels as products of smaller ones, in NumPy: by singular values, by space, and by Tucker-2.

Spatial: Jaderberg et al. 2014, arXiv:1405.3866. Tucker-2: Kim et al. 2016, arXiv:1511.06530. Dense kernels `(inputs,
outputs)` are convolutions without space, so every kernel here is `(*size, inputs, outputs)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Method = Literal["svd", "spatial", "tucker"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a kernel as one method sees it, from which ranks follow.

    Args:
        method: which method.
        values: singular values, one array for each rank, each sorted from the largest.
    """

    method: Method
    values: tuple[np.ndarray, ...]

    @property
    def full(self) -> tuple[int, ...]:
        """The ranks that lose nothing."""
        return tuple(len(each) for each in self.values)

    def ranks(self, energy: float) -> tuple[int, ...]:
        """Return the smallest ranks that keep this share of the squared singular values."""
        lost = (1 - energy) / len(self.values)  # each mode may lose its part
        return tuple(_rank(each, 1 - lost) for each in self.values)


def spectrum_of(kernel: np.ndarray, method: Method) -> Spectrum | None:
    """Return the spectrum of a kernel, or `None` where the method makes nothing of it."""
    size = kernel.shape[:-2]
    if method == "svd":
        return Spectrum(method, (_singular_values(_by_outputs(kernel)),))
    if method == "spatial":
        return Spectrum(method, (_singular_values(_by_space(kernel)),)) if len(size) == 2 and min(size) > 1 else None
    if math.prod(size) == 1:
        return None
    return Spectrum(method, tuple(_singular_values(_unfold(kernel, axis)) for axis in (-2, -1)))


def factors_of(kernel: np.ndarray, method: Method, ranks: tuple[int, ...]) -> list[np.ndarray]:
    """Return the kernels of the layers that stand for one, in the order in which they are called.

    Args:
        kernel: `(*size, inputs, outputs)`.
        method: `"svd"`: `(*size, inputs, r)` and `(1, .., r, outputs)`; `"spatial"`: `(height, 1, inputs, r)` and `(1,
            width, r, outputs)`; `"tucker"`: `(1, .., inputs, r)`, `(*size, r, s)` and `(1, .., s, outputs)`.
        ranks: one, or two for Tucker-2.
    """
    size, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    ones = (1,) * len(size)
    if method == "svd":
        left, right = _split(_by_outputs(kernel), ranks[0])
        return [left.reshape(*size, inputs, -1), right.reshape(*ones, -1, outputs)]
    if method == "spatial":
        height, width = size
        left, right = _split(_by_space(kernel), ranks[0])
        return [
            left.reshape(height, 1, inputs, -1),
            np.moveaxis(right.reshape(-1, width, outputs), 0, 1).reshape(1, width, -1, outputs),
        ]
    first, last = (_basis(_unfold(kernel, axis), rank) for axis, rank in zip((-2, -1), ranks, strict=True))
    core = np.einsum("...io,ir,os->...rs", kernel, first, last)
    return [first.reshape(*ones, inputs, -1), core, last.T.reshape(*ones, -1, outputs)]


def rebuild(factors: list[np.ndarray], method: Method) -> np.ndarray:
    """Return the kernel that the factors stand for."""
    if method == "spatial":
        return np.einsum("hir,wro->hwio", factors[0][:, 0], factors[1][0])
    if method == "svd":
        return np.einsum("...ir,ro->...io", factors[0], factors[1].reshape(factors[1].shape[-2:]))
    first, core, last = (
        factors[0].reshape(factors[0].shape[-2:]),
        factors[1],
        factors[2].reshape(-1, *factors[2].shape[-1:]),
    )
    return np.einsum("ir,...rs,so->...io", first, core, last)


def _by_outputs(kernel: np.ndarray) -> np.ndarray:
    return kernel.reshape(-1, kernel.shape[-1])


def _by_space(kernel: np.ndarray) -> np.ndarray:
    height, width, inputs, outputs = kernel.shape
    return kernel.transpose(0, 2, 1, 3).reshape(height * inputs, width * outputs)


def _unfold(kernel: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)


def _singular_values(matrix: np.ndarray) -> np.ndarray:
    """Return the singular values from the smaller Gram matrix, which is much faster for long matrices."""
    small = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return np.sqrt(np.maximum(np.linalg.eigvalsh(small.astype("float64"))[::-1], 0))


def _split(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two factors of equal size, so that neither over- nor underflows in half precision."""
    left, values, right = np.linalg.svd(matrix.astype("float64"), full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _basis(matrix: np.ndarray, rank: int) -> np.ndarray:
    _, vectors = np.linalg.eigh((matrix @ matrix.T).astype("float64"))
    return vectors[:, ::-1][:, :rank]


def _rank(values: np.ndarray, energy: float) -> int:
    squares = np.square(values)
    total = squares.sum()
    if total == 0:
        return 1
    return min(len(values), int(np.searchsorted(np.cumsum(squares) / total, energy - 1e-12)) + 1)
