"""GPTQ: rounding that makes up for its own errors with the weights that are not rounded yet.

Frantar et al. 2022, arXiv:2210.17323. Inputs are rounded one after the other; the error of each is spread over the
rest along the inverse Hessian, so that the layer's outputs on the calibration data change least.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_triangular

from compress.errors import DataError, UsageError
from compress.quantization.arithmetic import exact_scale
from compress.quantization.hessian import Hessian, output_error
from compress.quantization.matrix import (
    check_matrix,
    group_starts,
    largest_integer,
    matrix_scale,
    round_matrix,
    spread_over_rows,
)

_BLOCK = 128
_DAMPING_LIMIT = 1e6


def round_by_gptq(
    kernel: np.ndarray,
    hessian: Hessian,
    bits: int = 4,
    group_size: int | None = None,
    *,
    scale: np.ndarray | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    keep_zeros: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel `(in, out)` on its grid, float32, and the scales `(groups, out)` of that grid.

    Store the scales: the largest weight of a group may have been rounded down, so scales derived anew from the
    returned kernel can differ from its grid. No output has a larger error on the calibration data than with
    nearest rounding; where GPTQ would be worse, as it may be for a clipped output, nearest rounding is kept.

    Args:
        kernel: `(in, out)`; reshape others, such as EinsumDense's, so that contracted axes come first.
        hessian: what the kernel's inputs look like; it must have seen data.
        bits: 2 to 8.
        group_size: inputs that share a scale, or `None` for one scale per output.
        scale: `(groups, out)`, such as from `search_clipping`; by default each group's largest weight sets it.
            Scales are fixed before rounding, which `act_order` needs.
        damping: added to the Hessian's diagonal, as a fraction of its mean; raised where the Hessian stays singular.
        act_order: round the inputs with the largest activations first, while all others can still make up for it.
        keep_zeros: weights that are exactly zero stay zero, as after pruning.

    Raises:
        DataError: the Hessian saw no data or only zeros.
        UsageError: sizes do not fit, or an option is out of range.
    """
    kernel = check_matrix(kernel, bits, group_size)
    if hessian.features != len(kernel):
        raise UsageError(f"the Hessian must have {len(kernel)} features, as the kernel. Received: {hessian.features}")
    if not 0 < damping < float("inf"):
        raise UsageError(f"damping must be above 0. Received: {damping}")
    products = hessian.mean_products()
    scale = matrix_scale(kernel, bits, group_size) if scale is None else exact_scale(np.asarray(scale, "float32"))
    nearest = round_matrix(kernel, scale, bits, group_size)
    order = _rounding_order(products, act_order)
    steps = spread_over_rows(scale, len(kernel), group_size)
    factor = _inverse_factor(products[np.ix_(order, order)], damping)
    rounded = np.empty_like(kernel)
    rounded[order] = _round_rows(kernel[order], steps[order], factor, largest_integer(bits), keep_zeros)
    worse = output_error(kernel - rounded, products) > output_error(kernel - nearest, products)
    return np.where(worse, nearest, rounded), scale


def _rounding_order(products: np.ndarray, act_order: bool) -> np.ndarray:
    if not act_order:
        return np.arange(len(products))
    return np.argsort(-np.diag(products), kind="stable")


def _inverse_factor(products: np.ndarray, damping: float) -> np.ndarray:
    """Return the upper triangular U with `inverse(H) = U^T U`, H being the damped Hessian; changes `products`.

    With the order of the inputs reversed, H = R R^T has an upper triangular R, and U is R's inverse: one Cholesky
    instead of the paper's inverse and second Cholesky.
    """
    diagonal = np.einsum("ii->i", products)
    mean = diagonal.mean()
    # An input that is always zero says nothing: uncoupled, its weights are rounded to nearest. (The original sets
    # them to zero, which hurts if the input is not zero later.)
    diagonal[diagonal == 0] = mean
    added = 0.0
    while damping <= _DAMPING_LIMIT:
        diagonal += (damping - added) * mean
        added = damping
        try:
            factor = np.linalg.cholesky(products[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        inverse = solve_triangular(factor, np.eye(len(factor), dtype=factor.dtype), lower=False, check_finite=False)
        if np.isfinite(inverse).all():
            return inverse
        damping *= 10
    raise DataError("the Hessian of a layer must be invertible. Received: one that no damping makes so")


def _round_rows(kernel: np.ndarray, steps: np.ndarray, factor: np.ndarray, top: int, keep_zeros: bool) -> np.ndarray:
    """Return `kernel` rounded row by row, each error spread over the rows after it."""
    work = kernel.astype(factor.dtype)
    rounded = np.empty_like(kernel)
    for begin in group_starts(len(kernel), _BLOCK):
        end = min(begin + _BLOCK, len(kernel))
        errors = np.empty((end - begin, kernel.shape[1]), factor.dtype)
        for row in range(begin, end):
            values = np.clip(np.rint(work[row] / steps[row]), -top, top).astype("float32") * steps[row]
            if keep_zeros:
                values[kernel[row] == 0] = 0
            rounded[row] = values
            error = errors[row - begin] = (work[row] - values) / factor[row, row]
            work[row + 1 : end] -= np.outer(factor[row, row + 1 : end], error)
        work[end:] -= factor[begin:end, end:].T @ errors  # the rows of later blocks wait for the whole block
    return rounded
