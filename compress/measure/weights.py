"""Counting weights: what a file's constant tensors hold, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from compress.models.kernel_counts import KernelCount, ZeroPoint, count_kernel


@dataclass
class WeightCount:
    """Totals over tensors; kernels are those of rank 2 and up that are no bias, folded norm or state."""

    parameters: int = 0
    nonzero_parameters: int = 0
    kernels: list[KernelCount] = field(default_factory=list)

    @property
    def kernel_weights(self) -> int:
        """Values in all kernels."""
        return sum(kernel.size for kernel in self.kernels)

    @property
    def nonzero_kernel_weights(self) -> int:
        """Those that are not 0."""
        return sum(kernel.size - kernel.zeros for kernel in self.kernels)

    @property
    def distinct(self) -> int:
        """Distinct values of each kernel, summed over kernels."""
        return sum(kernel.distinct for kernel in self.kernels)

    def add(
        self,
        values: np.ndarray,
        zero_point: ZeroPoint = 0,
        *,
        kernel: bool = True,
        name: str = "",
        channel_axes: tuple[int, ...] = (-1,),
        bits: int | None = None,
    ) -> None:
        """Count one tensor.

        Args:
            values: its elements.
            zero_point: the integer that stands for 0, broadcastable to `values`.
            kernel: whether it is more than a bias, a folded norm or a state, whatever its rank.
            name: what the tensor is called.
            channel_axes: the axes of its output channels.
            bits: that one value takes in the file; those of its type by default.
        """
        self.parameters += values.size
        self.nonzero_parameters += int(np.count_nonzero(values != zero_point))
        if kernel and values.ndim >= 2:
            self.kernels.append(count_kernel(name, values, zero_point, channel_axes, bits))


@dataclass
class Contents:
    """Weights and work of a file.

    `unread` names weights that could not be counted, and `uncounted` operators whose work `macs` leaves out.
    """

    weights: WeightCount = field(default_factory=WeightCount)
    macs: int = 0
    uncounted: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
