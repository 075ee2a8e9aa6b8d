"""Which kernels of a model are pruned, how their axes lie, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

from compress.models.kernel_layout import KernelLayout, find_layouts
from compress.models.selection import select_trainable
from compress.models.walking import Kernel, Skipped
from compress.pruning.scores import require_numbers


def select_kernels(
    model: keras.Model, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), *, allow_quantized: bool = False
) -> tuple[list[Kernel], list[KernelLayout], list[Skipped]]:
    """Return the kernels to prune, the layout of each, and what is left alone; see `select_trainable`."""
    kernels, skipped = select_trainable(model, include, exclude, allow_quantized=allow_quantized, verb="prune")
    return kernels, find_layouts(model, [kernel.variable for kernel in kernels]), skipped


def kernel_values(kernels: Sequence[Kernel]) -> list[np.ndarray]:
    """Return the weights of `kernels` as arrays.

    Raises:
        PassError: a weight is NaN.
    """
    values = [keras.ops.convert_to_numpy(kernel.variable) for kernel in kernels]
    for kernel, value in zip(kernels, values, strict=True):
        require_numbers(value, kernel.path)
    return values
