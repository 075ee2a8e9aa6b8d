"""Counting weights: what a file's constant tensors hold, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class WeightCount:
    """Totals over tensors; kernels are those of rank 2 and up that are no bias, folded norm or state.

    `distinct` adds up the distinct values of each kernel, which is where clustering shows; `None` if unknown.
    """

    parameters: int = 0
    nonzero_parameters: int = 0
    kernel_weights: int = 0
    nonzero_kernel_weights: int = 0
    distinct: int | None = 0

    def add(self, values: np.ndarray, zero_point: np.ndarray | int = 0, *, kernel: bool = True) -> None:
        """Count one tensor.

        Args:
            values: its elements.
            zero_point: the integer that stands for 0, broadcastable to `values`.
            kernel: whether it is more than a bias, a folded norm or a state, whatever its rank.
        """
        nonzero = int(np.count_nonzero(values != zero_point))
        self.parameters += values.size
        self.nonzero_parameters += nonzero
        if kernel and values.ndim >= 2:
            self.kernel_weights += values.size
            self.nonzero_kernel_weights += nonzero
            self.distinct = (self.distinct or 0) + len(np.unique(values))


@dataclass
class Contents:
    """Weights and work of a file.

    `unread` names weights that could not be counted, and `uncounted` operators whose work `macs` leaves out.
    """

    weights: WeightCount = field(default_factory=WeightCount)
    macs: int = 0
    uncounted: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
