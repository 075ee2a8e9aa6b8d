"""Regrowing pruned weights: now and then some of the smallest make room for those with the greatest gradients.

Source: Evci et al. 2020 (RigL), arXiv:1911.11134. The arithmetic is NumPy only.
"""

from __future__ import annotations

import numpy as np

from compress.models.kernel_layout import KernelLayout
from compress.pruning.patterns import Pattern, lowest_mask


def regrow_mask(
    weights: np.ndarray, gradient: np.ndarray, mask: np.ndarray, share: float, pattern: Pattern, layout: KernelLayout
) -> np.ndarray:
    """Return a mask with as many `False` as `mask`, in which a share of the kept weights has moved.

    The smallest are dropped. What was pruned or is dropped now competes by gradient for their places.

    Args:
        weights: the kernel; pruned weights are zero.
        gradient: gradient of the loss, of the same shape.
        mask: the mask now, of the same shape; `True` is kept.
        share: share of the kept weights to drop, from 0 to 1.
        pattern: what is pruned together.
        layout: which axes of the kernel run over inputs and outputs.
    """
    sizes, slopes = (np.abs(np.asarray(each, np.float32)) for each in (weights, gradient))
    units = pattern.pool(np.where(mask, sizes, np.float32(-1)), layout)
    pruned = units.size - int(np.count_nonzero(pattern.pool(mask, layout)))
    moving = round(share * (units.size - pruned))
    staying = lowest_mask(units, pruned + moving)
    scores = np.where(staying, np.float32(np.inf), pattern.pool(slopes, layout))
    return pattern.mask(scores, pruned, layout, mask.shape)
