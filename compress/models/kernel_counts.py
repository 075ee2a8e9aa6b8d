"""What one kernel holds: its zeros and its distinct values, which is where pruning and clustering show.

Counted alike in models and in files of every format. NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

ZeroPoint = np.ndarray | int
"""The number that stands for 0, broadcastable to the values."""


@dataclass(frozen=True)
class KernelCount:
    """What one kernel holds.

    Args:
        name: path of the variable in a model, or name of the tensor in a file.
        shape: its shape there.
        zeros: how many of its values are 0.
        distinct: how many different values it has.
        distinct_in_channel: the most different values in one output channel. Where batch norm is folded into a kernel,
            each channel has a factor of its own, and clusters show only here.
        bits: that one value takes where it is stored.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    distinct: int
    distinct_in_channel: int
    bits: int = 32

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


def count_kernel(
    name: str,
    values: np.ndarray,
    zero_point: ZeroPoint = 0,
    channel_axes: tuple[int, ...] = (-1,),
    bits: int | None = None,
) -> KernelCount:
    """Return what a kernel holds.

    Args:
        name: what it is called.
        values: its values, floats or integers.
        zero_point: the number that stands for 0, broadcastable to `values`.
        channel_axes: the axes of its output channels.
        bits: that one value takes where it is stored; those of its type by default.
    """
    bits = 8 * values.dtype.itemsize if bits is None else bits
    zeros = values.size - int(np.count_nonzero(values != zero_point))
    in_channel = _most_distinct(_by_channel(values, channel_axes))
    return KernelCount(name, values.shape, zeros, len(np.unique(values)), in_channel, bits)


def output_axes(kind: str, name: str) -> tuple[int, ...]:
    """Return the axes of the output channels of a Keras kernel.

    Args:
        kind: class name of the layer that owns it.
        name: name of the variable, such as `"kernel"`.
    """
    if name == "depthwise_kernel" or kind.startswith("DepthwiseConv"):
        return (-2, -1)
    return (-2,) if kind.startswith("Conv") and kind.endswith("Transpose") else (-1,)


def _by_channel(values: np.ndarray, channel_axes: tuple[int, ...]) -> np.ndarray:
    """Return `values` as a matrix with a row for each output channel."""
    axes = sorted({axis % values.ndim for axis in channel_axes})
    rows = np.moveaxis(values, axes, range(len(axes)))
    return rows.reshape(prod(rows.shape[: len(axes)]), prod(rows.shape[len(axes) :]))


def _most_distinct(rows: np.ndarray) -> int:
    if not rows.size:
        return 0
    ordered = np.sort(rows, axis=1)  # -0.0 and 0.0 are one value
    return 1 + int(np.count_nonzero(ordered[:, 1:] != ordered[:, :-1], axis=1).max(initial=0))
