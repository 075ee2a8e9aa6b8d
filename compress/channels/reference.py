"""What the reference for the check of a narrow model computes in place of calls that look at channels together.

A norm over channels divides by their number, so no weight silences some of them: here its statistics run over those
that are left, written out from the formulas (Ba et al. 2016, arXiv:1607.06450; Wu and He 2018, arXiv:1803.08494;
Zhang and Sennrich 2019, arXiv:1910.07467).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops


def mask_axis(x: Any, axis: int, mask: np.ndarray) -> Any:
    """Return `x` with zeros where `mask` (length of the axis,) is false."""
    kept = mask.reshape([-1 if each == axis else 1 for each in range(len(x.shape))])
    return ops.where(kept, x, ops.zeros((), x.dtype))  # a product with an array would count as sparse


def norm_over_kept(
    layer: keras.Layer,
    x: Any,
    axes: Sequence[int],
    masks: Mapping[int, np.ndarray],
    groups: tuple[int, int] | None = None,
) -> Any:
    """Return what a norm gives whose statistics leave out some channels.

    Args:
        layer: LayerNormalization, RMSNormalization or GroupNormalization.
        x: its input.
        axes: what the statistics run over, from 0.
        masks: by axis, which places count.
        groups: number of groups, and the axis that is divided into them; each is normed by itself.

    Returns:
        A tensor like `x`; what it holds for channels that do not count has no meaning.
    """
    rank = len(x.shape)
    mask = math.prod((_along(each, axis, rank) for axis, each in masks.items()), start=np.ones([1] * rank, "float32"))
    y = ops.cast(x, "float32")
    count = _sum(ops.ones_like(y) * mask, axes, groups)
    if type(layer).__name__ != "RMSNormalization":
        y = y - _sum(y * mask, axes, groups) / count
    y = y * ops.rsqrt(_sum(ops.square(y) * mask, axes, groups) / count + layer.epsilon)
    along = axes if groups is None else [groups[1]]
    shape = [x.shape[axis] if axis in along else 1 for axis in range(rank)]
    scale, shift = _weights(layer)
    if scale is not None:
        y = y * ops.reshape(ops.cast(scale, "float32"), shape)
    if shift is not None:
        y = y + ops.reshape(ops.cast(shift, "float32"), shape)
    return ops.cast(y, layer.compute_dtype)


def _sum(y: Any, axes: Sequence[int], groups: tuple[int, int] | None) -> Any:
    """Return the sum over `axes`, which stay with length 1; each channel gets that of its group."""
    if groups is None:
        return ops.sum(y, axis=tuple(axes), keepdims=True)
    number, channels = groups
    share = y.shape[channels] // number
    y = ops.sum(y, axis=tuple(axis for axis in axes if axis != channels), keepdims=True)
    together = np.kron(np.eye(number), np.ones((share, share))).astype("float32")
    return ops.moveaxis(ops.matmul(ops.moveaxis(y, channels, -1), together), -1, channels)


def _weights(layer: keras.Layer) -> tuple[Any, Any]:
    """Return the factor and the summand of each channel, or `None` where there is none."""
    if type(layer).__name__ == "RMSNormalization":
        return layer.scale, None
    return layer.gamma, layer.beta


def _along(mask: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return mask.astype("float32").reshape([-1 if each == axis else 1 for each in range(rank)])
