"""Biases of integer kernels: integers on the grid of the accumulator, which is the product of two scales."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compress.deploy.tflite_weights import FileWeight

_LIMITS = {False: 2.0**30, True: 2.0**38}  # of biases; accumulators have 32 and (at least) 40 bits, and sums are to fit


def fit_weight(weight: FileWeight, bias: np.ndarray, input_scale: float, wide: bool) -> FileWeight:
    """Return the weight with coarser scales in those channels whose bias would overflow the accumulator.

    That happens in channels that are dead or nearly so: next to such a bias their weights count for nothing.

    Args:
        bias: float32 `(channels,)`.
        input_scale: scale of the activations.
        wide: whether the kernel has 64-bit biases (int16 activations).
    """
    needed = np.abs(bias.astype("float64")) / (float(np.float32(input_scale)) * _LIMITS[wide])
    if weight.scale.size == 1:
        needed = needed.max(initial=0.0, keepdims=True)
    scale = np.maximum(weight.scale, needed.astype("float32") * np.float32(1 + 1e-6))
    if np.array_equal(scale, weight.scale):
        return weight
    shape = [1] * weight.values.ndim
    shape[weight.axis] = scale.size
    ratio = (weight.scale.astype("float64") / scale).reshape(shape)
    return replace(weight, values=np.rint(weight.values * ratio).astype("int8"), scale=scale)


def quantize_bias(
    bias: np.ndarray, input_scale: float, weight_scale: np.ndarray, wide: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bias as int32 (int64 if `wide`) and its scales, `input_scale * weight_scale`."""
    scale = np.float32(input_scale) * weight_scale.astype("float32")
    values = np.rint(bias.astype("float64") / scale.astype("float64"))
    return values.astype("int64" if wide else "int32"), scale
