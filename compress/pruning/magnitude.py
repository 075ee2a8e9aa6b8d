"""Pruning at once, without training: the smallest weights of a copy of the model become zero."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

from compress.errors import PassError
from compress.models.copying import copy_model
from compress.models.walking import Kernel, find_kernels, list_kernels
from compress.pruning.masks import DistributionName, magnitude_masks, require_sparsity


def prune_weights(
    model: keras.Model,
    sparsity: float,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    distribution: DistributionName = "uniform",
) -> keras.Model:
    """Return a copy of `model` in which the smallest weights of each selected kernel are zero.

    Args:
        model: a built model; it is not changed.
        sparsity: fraction of zeros, at least 0 and less than 1, met exactly: `round(sparsity * size)`.
        include: shell patterns over layer or kernel paths (`"encoder/conv*"`).
        exclude: shell patterns over layers or kernels to leave alone.
        distribution: `"uniform"`: each kernel has this sparsity; `"global"`: all selected kernels together.

    Raises:
        UsageError: sparsity out of range, a pattern that matches nothing, no kernel selected.
        ModelError: the model cannot be copied.
        PassError: a weight is NaN.
    """
    require_sparsity(sparsity)
    find_kernels(model, include, exclude)  # complain before the copy is made
    copy = copy_model(model)
    kernels, _ = find_kernels(copy, include, exclude)
    values = kernel_values(kernels)
    for kernel, value, mask in zip(kernels, values, magnitude_masks(values, sparsity, distribution), strict=True):
        kernel.variable.assign(np.where(mask, value, np.zeros((), value.dtype)))
    return copy


def kernel_values(kernels: Sequence[Kernel]) -> list[np.ndarray]:
    """Return the weights of `kernels` as arrays.

    Raises:
        PassError: a weight is NaN.
    """
    values = [keras.ops.convert_to_numpy(kernel.variable) for kernel in kernels]
    for kernel, value in zip(kernels, values, strict=True):
        if np.isnan(value).any():
            raise PassError(
                f"expected weights that are numbers. Received: NaN in {kernel.path}",
                "Training has diverged: lower the learning rate, or start from an earlier checkpoint.",
            )
    return values


def has_pruned_kernels(model: keras.Model) -> bool:
    """Return whether a kernel of `model` holds zeros; one that is all zeros is new, not pruned."""
    weights = (keras.ops.convert_to_numpy(kernel.variable) for kernel in list_kernels(model))
    return any(0 < np.count_nonzero(weight) < weight.size for weight in weights)
