"""AWQ: weights that meet large activations get a finer grid, by scaling inputs up in the kernel and down before it.

Lin et al. 2023, arXiv:2306.00978. A kernel's rows are multiplied by `s` and the layer before divides its outputs by
`s`: the float model stays the same, the rounding errors move to where activations are small.
"""

from __future__ import annotations

import numpy as np

from compress.errors import UsageError
from compress.quantization.arithmetic import exact_scale
from compress.quantization.hessian import Hessian, output_error
from compress.quantization.matrix import (
    check_matrix,
    group_starts,
    matrix_scale,
    round_matrix,
)

_ALPHAS = 20
_SHRINKS = tuple(np.linspace(1.0, 0.5, 21))


def awq_scales(
    kernel: np.ndarray, hessian: Hessian, bits: int = 4, group_size: int | None = None
) -> tuple[np.ndarray, float]:
    """Return factors `s` `(in,)`, float32, and the alpha they come from; `s = 1`, alpha 0, if no factors help.

    `s` is the mean magnitude of each input to the power of alpha, the alpha in [0, 1] being the one with the
    smallest output error on the calibration data after nearest rounding.

    Args:
        kernel: `(in, out)`; kernels that read the same tensor, such as query, key and value, side by side along `out`,
            because what comes before them can be divided only once.
        hessian: what the kernel's inputs look like; it must have seen data.
        bits: 2 to 8.
        group_size: inputs that share a scale, or `None` for one scale per output.

    Raises:
        DataError: the Hessian saw no data or only zeros.
        UsageError: sizes do not fit, or an option is out of range.
    """
    kernel = check_matrix(kernel, bits, group_size)
    products = _products(kernel, hessian)
    magnitudes = hessian.mean_magnitudes()
    # An input that is always zero gets the factor of the weakest live one: it must not set the others' range.
    magnitudes = np.maximum(magnitudes, magnitudes[magnitudes > 0].min())
    best, best_alpha, least = np.ones(len(kernel), "float32"), 0.0, np.inf
    for alpha in np.arange(_ALPHAS + 1) / _ALPHAS:
        factors = magnitudes**alpha
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype("float32")[:, None]
        scaled = kernel * factors
        rounded = round_matrix(scaled, matrix_scale(scaled, bits, group_size), bits, group_size) / factors
        error = output_error(kernel - rounded, products).sum()
        if error < least:
            best, best_alpha, least = factors[:, 0], float(alpha), error
    return best, best_alpha


def search_clipping(kernel: np.ndarray, hessian: Hessian, bits: int = 4, group_size: int | None = None) -> np.ndarray:
    """Return scales `(groups, out)` between half and all of those that the largest weight sets.

    Clipping the largest weight of a group makes the grid finer for the others. Each group takes the scale with the
    smallest output error of that group alone. Leave out kernels of query and key: their outputs are multiplied with
    each other, and the error of one says little.

    Args, Raises: as `awq_scales`. After AWQ give the scaled kernel and `hessian.divided_by(factors)`.
    """
    kernel = check_matrix(kernel, bits, group_size)
    products = _products(kernel, hessian)
    largest = matrix_scale(kernel, bits, group_size)
    best, least = largest.copy(), np.full(largest.shape, np.inf)
    for shrink in _SHRINKS:
        scale = exact_scale(largest * np.float32(shrink))
        error = _group_errors(kernel - round_matrix(kernel, scale, bits, group_size), products, group_size)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best


def _group_errors(difference: np.ndarray, products: np.ndarray, group_size: int | None) -> np.ndarray:
    """Return the mean squared change of each group's part of each output, `(groups, out)`."""
    starts = group_starts(len(difference), group_size)
    parts = [slice(begin, begin + (group_size or len(difference))) for begin in starts]
    return np.stack([output_error(difference[part], products[part, part]) for part in parts])


def _products(kernel: np.ndarray, hessian: Hessian) -> np.ndarray:
    if hessian.features != len(kernel):
        raise UsageError(f"the Hessian must have {len(kernel)} features, as the kernel. Received: {hessian.features}")
    return hessian.mean_products().astype("float32")  # exact enough to compare errors, and twice as fast
