"""Weights that the converter has multiplied by constants: found again, with what they were multiplied by.

It moves a product with a constant, such as the scale of a normalization or of attention, into the weights beside it.
Along the channels of the scales that only changes the scales; along another axis the product stays a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from compress.deploy.tflite_flatbuffer import TfliteFile, Type
from compress.deploy.tflite_weights import FileWeight, axis_orders, lay_out
from compress.quantization.stored import StoredWeight

_ROUNDING = 4e-7  # relative: two products of float32 numbers in another order


def find_rescaled(
    file: TfliteFile, missing: Sequence[StoredWeight], found: dict[tuple[int, int], FileWeight]
) -> list[StoredWeight]:
    """Add to `found` the constants that are one of `missing` times a factor along one axis, and return the rest."""
    rest = []
    for weight in missing:
        real, matches = weight.dequantize(), {}
        for i, graph in enumerate(file.graphs):
            for j, tensor in enumerate(graph.tensors):
                if tensor.type != Type.FLOAT32 or (i, j) in found:
                    continue
                constant = file.constant(graph, j)
                if constant is not None and constant.size == real.size and (held := _match(weight, real, constant)):
                    matches[i, j] = held
        found |= matches
        if not matches:
            rest.append(weight)
    return rest


def _match(weight: StoredWeight, real: np.ndarray, constant: np.ndarray) -> FileWeight | None:
    if constant.ndim == 0 or not np.any(real) or not np.any(constant):
        return None
    for order in axis_orders(real.shape, constant.shape):
        turned = real.transpose(order).reshape(constant.shape)
        if np.any(constant[turned == 0]):
            continue
        laid = lay_out(weight, order, constant.shape)
        for axis in sorted(range(constant.ndim), key=lambda axis, first=laid.axis: axis != first):
            factor = _factor(turned, constant, axis)
            if factor is not None:
                return _rescale(laid, factor, axis, constant)
    return None


def _factor(turned: np.ndarray, constant: np.ndarray, axis: int) -> np.ndarray | None:
    """Return the float64 factors along `axis` that make `turned` the constant, or `None`."""
    others = tuple(i for i in range(turned.ndim) if i != axis)
    wide = turned.astype("float64")
    power = (wide * wide).sum(others)
    factor = (wide * constant).sum(others) / np.where(power, power, 1)
    factor = np.where(power, factor, 1)
    shape = [1] * turned.ndim
    shape[axis] = -1
    product = wide * factor.reshape(shape)
    return factor if np.all(np.abs(product - constant) <= _ROUNDING * np.abs(product)) else None


def _rescale(laid: FileWeight, factor: np.ndarray, axis: int, constant: np.ndarray) -> FileWeight:
    if laid.source.dtype == "float16":
        return replace(laid, values=constant.astype("float16"))
    if laid.source.dtype == "bfloat16":
        return replace(laid, values=_round_to_bfloat16(constant))
    if np.ptp(factor) <= _ROUNDING * np.abs(factor).max():
        factor = factor[:1]
    shape = [1] * constant.ndim
    shape[axis] = factor.size
    if laid.scale is None or (factor.size > 1 and laid.scale.size > 1 and laid.axis != axis):
        return replace(laid, scale=None, factor=factor.astype("float32").reshape(shape))
    values = laid.values * np.sign(factor).astype("int8").reshape(shape)
    kept = laid.axis if laid.scale.size > 1 else axis
    sizes = np.where(factor, np.abs(factor), 1)  # channels that were multiplied by zero keep their scale
    return replace(laid, values=values, scale=(laid.scale * sizes).astype("float32"), axis=kept)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, "float32").view("uint32").astype("uint64")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype("uint32").view("float32")
