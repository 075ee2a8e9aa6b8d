"""Kernels as matrices `(in, out)` on a symmetric grid: one scale per output channel, or per group of inputs.

The second-order methods (GPTQ, AWQ) and the searches that they share work on these; the grid is that of
`arithmetic`, NumPy throughout.
"""

from __future__ import annotations

import numpy as np

from compress.errors import UsageError
from compress.quantization.arithmetic import integer_limits, quantize_weight, spread_scale, weight_scale

_OUTPUTS = (1,)
_INPUTS = 0


def largest_integer(bits: int) -> int:
    """Return the end of the narrow symmetric range of `bits`: 127 for 8, 7 for 4, 1 for 2.

    Raises:
        UsageError: `bits` is not an integer from 2 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 2 <= bits <= 8:
        raise UsageError(f"bits must be an integer from 2 to 8. Received: {bits!r}")
    return integer_limits(int(bits))[1]


def check_matrix(kernel: np.ndarray, bits: int, group_size: int | None) -> np.ndarray:
    """Return `kernel` as float32 after checking that it is a finite matrix, and that `bits` and `group_size` fit.

    Raises:
        UsageError: they do not.
    """
    largest_integer(bits)
    kernel = np.asarray(kernel, "float32")
    if kernel.ndim != 2 or 0 in kernel.shape:
        raise UsageError(f"a kernel must be a matrix (inputs, outputs). Received: shape {kernel.shape}")
    if group_size is not None and (isinstance(group_size, bool) or group_size < 1):
        raise UsageError(f"group_size must be at least 1, or None for one scale per output. Received: {group_size}")
    if not np.isfinite(kernel).all():
        raise UsageError("weights must be finite. Received: NaN or infinity")
    return kernel


def group_starts(rows: int, group_size: int | None) -> np.ndarray:
    """Return the first row of each group; the last group may be short."""
    return np.arange(0, rows, group_size or rows)


def matrix_scale(kernel: np.ndarray, bits: int, group_size: int | None = None) -> np.ndarray:
    """Return the float32 scales `(groups, out)` that map each group's largest weight to the end of the grid."""
    return weight_scale(kernel, _OUTPUTS, bits, group_size, _INPUTS)


def spread_over_rows(scale: np.ndarray, rows: int, group_size: int | None) -> np.ndarray:
    """Return one scale for each weight, `(rows, out)`, from one for each group, `(groups, out)`.

    Raises:
        UsageError: the number of groups is wrong.
    """
    groups = len(group_starts(rows, group_size))
    if np.ndim(scale) != 2 or len(scale) != groups:
        raise UsageError(f"scales must have the shape ({groups}, outputs). Received: {np.shape(scale)}")
    shape = (rows, scale.shape[1])
    return np.broadcast_to(spread_scale(scale, shape, group_size, _INPUTS), shape)


def round_matrix(kernel: np.ndarray, scale: np.ndarray, bits: int, group_size: int | None = None) -> np.ndarray:
    """Return `kernel` on the grid of `scale` `(groups, out)`: each weight at the nearest point, half to even."""
    integers, scale = quantize_weight(kernel, _OUTPUTS, bits, group_size, _INPUTS, scale)
    return integers * spread_over_rows(scale, len(kernel), group_size)
