"""Scales and fake quantization: `keras.ops` on tensors, NumPy on arrays, the same lines of code for both.

Forward passes round, backward passes act as if they did not (the straight-through estimator, Bengio et al.
2013, arXiv:1308.3432); learned scales and ranges have the gradients of LSQ (Esser et al. 2020,
arXiv:1902.08153). All arithmetic is float32; rounding is half to even.

A weight scale holds 16 significant bits, so `integer * scale` is exact in float32. Files, Keras and a second
quantization of the same values therefore agree to the last bit, whatever a compiler does with the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from compress.errors import UsageError

Tensor = Any
"""A backend tensor, or a NumPy array, which gives a NumPy array back."""

_SMALLEST = 1e-30
"""Ranges narrower than this, such as those of a tensor of zeros, count as empty: products of scales stay normal."""

_WEAKEST = 2.0**-16
"""No scale is smaller than this part of the tensor's largest: the bias of a dead channel must fit in int32."""

_CELL = 0.49
"""The part of a step around a point of a grid in which float32 weights are sure to be rounded to it."""


def integer_limits(bits: int) -> tuple[int, int]:
    """Return the least and greatest signed integer of `bits` bits, the limits of activations."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def activation_scale(minimum: Tensor, maximum: Tensor, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Return `(scale, zero_point)` of the signed grid that covers a range; real 0 is always on the grid.

    The zero point is nudged as TensorFlow's fake-quantization operation does. An empty range (`minimum`
    and `maximum` both 0) gives the scale of the range [0, 1].

    Args:
        minimum, maximum: least and greatest real value, of any one shape; extended to include 0.
        bits: 2 to 8, or 16.
        symmetric: the zero point is 0.

    Returns:
        float32 scales, and zero points in `integer_limits(bits)` as whole float32 numbers, so that
        `real = (integer - zero_point) * scale`.
    """
    minimum, maximum = _with_zero(minimum, maximum)
    xp = _namespace(minimum, maximum)
    lowest, highest = integer_limits(bits)
    if symmetric:
        scale = xp.maximum(minimum / float(lowest), maximum / float(highest))
        return scale, xp.zeros_like(scale)
    scale = (maximum - minimum) / float(highest - lowest)
    steps = -minimum / scale
    whole = xp.floor(steps)
    nudged = xp.where(steps - whole >= 0.5, whole + 1.0, whole)  # half away from zero, as the operation rounds
    return scale, xp.clip(nudged, 0.0, float(highest - lowest)) + float(lowest)


def nudged_range(minimum: Tensor, maximum: Tensor, bits: int = 8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Return the least and greatest real value on the grid of `activation_scale`."""
    scale, zero_point = activation_scale(minimum, maximum, bits, symmetric)
    lowest, highest = integer_limits(bits)
    return (lowest - zero_point) * scale, (highest - zero_point) * scale


def fake_quantize_activation(
    x: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    bits: int = 8,
    symmetric: bool = False,
    learned: bool = False,
    fused: bool = False,
    masked: bool = True,
) -> Tensor:
    """Return `x` rounded to the grid of `activation_scale`, with a straight-through gradient.

    Args:
        x: float32 tensor of any shape.
        minimum, maximum: the range: scalars, or what broadcasts against `x` without `learned` and `fused`.
        bits: 2 to 8, or 16.
        symmetric: the zero point is 0.
        learned: `minimum` and `maximum` get gradients, scaled by `1 / sqrt(features)`; else they get none.
        fused: use TensorFlow's own operation where TensorFlow is the backend. It is faster in training, rounds
            ties upwards and differs in the last float32 bits.
        masked: the gradient to `x` is 0 outside the nudged range. Without it is 1 everywhere, for ranges that hold what
            `x` can be, as that of a softmax, or that follow it.

    Returns:
        float32 of the shape of `x`; NaN stays NaN.
    """
    if fused and keras.backend.backend() == "tensorflow":
        from compress.quantization import fused_operations  # imports TensorFlow

        if learned:
            return fused_operations.learned_fake_quantize(x, minimum, maximum, _damping(x), bits, symmetric)
        return fused_operations.fake_quantize(x, minimum, maximum, bits, symmetric, masked)
    if learned:
        return _learned_fake_quantize(x, minimum, maximum, bits, symmetric)
    scale, zero_point = activation_scale(minimum, maximum, bits, symmetric)
    lowest, highest = integer_limits(bits)
    steps = ops.clip(ops.round(x / scale), lowest - zero_point, highest - zero_point)
    if not masked:
        return _forward_as(steps * scale, x)
    inside = _is_inside(x, (lowest - zero_point) * scale, (highest - zero_point) * scale)
    return _forward_as(steps * scale, ops.where(inside, x, 0.0))


def weight_scale(
    kernel: Tensor,
    channel_axes: tuple[int, ...] = (),
    bits: int = 8,
    group_size: int | None = None,
    axis: int | None = None,
) -> Tensor:
    """Return the scales of a symmetric grid that just holds the largest magnitude of each channel or group.

    Args:
        kernel: float32 weights.
        channel_axes: axes that keep scales of their own; empty means one scale.
        bits: 2 to 8.
        group_size: weights along `axis` that share a scale, or `None`.
        axis: the grouped axis, not one of `channel_axes`.

    Returns:
        Positive float32 of 16 significant bits, of the rank of `kernel`: the size of `kernel` along
        `channel_axes`, `ceil(size / group_size)` along `axis`, and 1 elsewhere. A dead channel has a
        scale of 2**-16 times the largest; a tensor of zeros has that of the range [-1, 1].
    """
    xp = _namespace(kernel)
    largest = reduce_groups(xp.max, xp.abs(kernel), channel_axes, group_size, axis)
    strongest = xp.max(largest)
    largest = xp.where(strongest < _SMALLEST, xp.ones_like(largest), xp.maximum(largest, strongest * _WEAKEST))
    # XLA multiplies with the inverse where a constant divides: so does this, to get the same bits.
    return exact_scale(largest * (1.0 / (2 ** (bits - 1) - 1)))


def learned_scale(
    kernel: Tensor,
    channel_axes: tuple[int, ...] = (),
    bits: int = 8,
    group_size: int | None = None,
    axis: int | None = None,
) -> Tensor:
    """Return scales to start learning from: `2 * mean(abs(kernel)) / sqrt(greatest)` of LSQ, or `weight_scale` if less.

    Arguments and shape as of `weight_scale`.
    """
    xp = _namespace(kernel)
    grouping = (channel_axes, group_size, axis)
    mean = reduce_groups(xp.sum, xp.abs(kernel), *grouping) / reduce_groups(xp.sum, xp.ones_like(kernel), *grouping)
    largest = weight_scale(kernel, channel_axes, bits, group_size, axis)
    start = mean * (2.0 / float(2 ** (bits - 1) - 1) ** 0.5)
    floor = xp.max(largest) * _WEAKEST
    return exact_scale(xp.maximum(xp.minimum(start, largest), floor))


def exact_scale(scale: Tensor) -> Tensor:
    """Return positive float32 scales rounded to 16 significant bits; see the module's docstring."""
    xp = _namespace(scale)
    scale = xp.maximum(xp.abs(scale), _SMALLEST)
    return _to_float(xp.bitwise_and(_to_bits(scale) + 0x80, -0x100))


def fake_quantize_weight(
    kernel: Tensor,
    channel_axes: tuple[int, ...] = (),
    bits: int = 8,
    group_size: int | None = None,
    axis: int | None = None,
    scale: Tensor | None = None,
    learned: bool = False,
) -> Tensor:
    """Return `kernel` on its grid, with a straight-through gradient; zeros stay zero.

    Args:
        kernel: float32 weights.
        channel_axes, bits, group_size, axis: as for `weight_scale`.
        scale: scales of the shape of `weight_scale`, rounded to `exact_scale` here; default is `weight_scale(kernel)`.
        learned: `scale` gets gradients, scaled by `1 / sqrt(weights that share it * greatest integer)` (LSQ).
    """
    if scale is None:
        scale = weight_scale(kernel, channel_axes, bits, group_size, axis)
    else:
        scale = _learned(scale, kernel, bits) if learned else exact_scale(scale)
    scale = spread_scale(scale, kernel.shape, group_size, axis)
    if learned:
        return _lsq(kernel, scale, bits)
    return _replace_forward(kernel, lambda x: _round_to_grid(x, scale, bits) * scale)


def quantize_weight(
    kernel: np.ndarray,
    channel_axes: tuple[int, ...] = (),
    bits: int = 8,
    group_size: int | None = None,
    axis: int | None = None,
    scale: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return `(integers, scale)`: int8 of the shape of `kernel` and float32 scales; NumPy only.

    `integers * spread_scale(scale)` is bit for bit what `fake_quantize_weight` computes. Arguments as there.

    Raises:
        UsageError: a weight is NaN or infinite.
    """
    kernel = np.asarray(kernel, "float32")
    if not np.isfinite(kernel).all():
        raise UsageError(
            "expected finite weights. Received: NaN or infinity",
            "Training has diverged: lower the learning rate.",
        )
    if scale is None:
        scale = weight_scale(kernel, channel_axes, bits, group_size, axis)
    else:
        scale = exact_scale(np.asarray(scale, "float32"))
    integers = _round_to_grid(kernel, spread_scale(scale, kernel.shape, group_size, axis), bits)
    return integers.astype("int8"), scale


def spread_scale(
    scale: Tensor, shape: tuple[int, ...], group_size: int | None = None, axis: int | None = None
) -> Tensor:
    """Return scales that broadcast against weights of `shape`: one for each weight along a grouped axis."""
    if group_size is None:
        return scale
    xp = _namespace(scale)
    kept = [slice(None)] * len(shape)
    kept[axis] = slice(0, shape[axis])
    return xp.repeat(scale, group_size, axis=axis)[tuple(kept)]


def weights_that_round_to(
    values: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray,
    bits: int = 8,
    group_size: int | None = None,
    axis: int | None = None,
) -> np.ndarray:
    """Return the float32 nearest to `weights` that `quantize_weight` rounds to `values`, points of the grid of `scale`.

    What is clipped to an end of the grid stays as far beyond it as it is. NumPy only.
    """
    step = spread_scale(scale, values.shape, group_size, axis)
    end = (2 ** (bits - 1) - 1.25) * step
    low = np.where(values < -end, -np.inf, values - _CELL * step)
    high = np.where(values > end, np.inf, values + _CELL * step)
    return np.clip(weights, low, high).astype("float32")


def round_to_float(x: Tensor, dtype: str) -> Tensor:
    """Return float32 `x` rounded to what `"float16"` or `"bfloat16"` holds; straight-through on tensors.

    Done on the bits, because compilers may drop a cast and its inverse. Values beyond the largest finite number
    become that number.
    """
    xp = _namespace(x)
    dropped, largest = {"float16": (13, 65504.0), "bfloat16": (16, float.fromhex("0x1.fep127"))}[dtype]
    bits = _to_bits(x)
    odd = xp.bitwise_and(xp.right_shift(bits, dropped), 1)
    rounded = _to_float(xp.bitwise_and(bits + odd + (2 ** (dropped - 1) - 1), -(2**dropped)))
    if dtype == "float16":
        rounded = xp.where(
            xp.abs(x) < 2.0**-14, xp.round(xp.clip(x, -1.0, 1.0) * 2.0**24) * 2.0**-24, rounded
        )  # subnormal
    rounded = xp.where(xp.isnan(x), x, xp.clip(rounded, -largest, largest))
    return rounded if xp is np else _forward_as(rounded, x)


def _namespace(*values: Tensor) -> Any:
    return np if all(isinstance(value, (np.ndarray, np.generic, float, int)) for value in values) else ops


def _with_zero(minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range with 0 in it, as float32; [0, 1] where it is empty."""
    xp = _namespace(minimum, maximum)
    if xp is np:
        minimum, maximum = np.asarray(minimum, "float32"), np.asarray(maximum, "float32")
    minimum, maximum = xp.minimum(minimum, 0.0), xp.maximum(maximum, 0.0)
    empty = maximum - minimum < _SMALLEST
    return xp.where(empty, xp.zeros_like(minimum), minimum), xp.where(empty, xp.ones_like(maximum), maximum)


def _forward_as(value: Tensor, x: Tensor) -> Tensor:
    """Return exactly `value`, with the gradient of `x` (`x + (value - x)` would not be exact)."""
    return ops.stop_gradient(value) + (x - ops.stop_gradient(x))


def _replace_forward(x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `compute(x)` with the gradient of `x`, in fewer operations than `_forward_as`."""
    if _namespace(x) is np:
        return compute(x)

    @ops.custom_gradient
    def forward(x: Tensor) -> tuple[Tensor, Any]:
        return compute(x), lambda *args, upstream=None: args[-1] if upstream is None else upstream

    return forward(x)


def _is_inside(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return ops.logical_and(x >= low, x <= high)


def _damping(x: Tensor) -> Tensor:
    """Return what scales the gradients of a learned range: `1 / sqrt(features)`."""
    features = ops.cast(ops.prod(ops.shape(x)[1:]), "float32") if len(x.shape) > 1 else ops.ones((), "float32")
    return 1.0 / ops.sqrt(features)


def _learned_fake_quantize(x: Tensor, minimum: Tensor, maximum: Tensor, bits: int, symmetric: bool) -> Tensor:
    """LSQ with the ends of the range as parameters: d/d scale is `round(v) - v`, beyond an end d/d end is 1."""
    scale, zero_point = (ops.stop_gradient(each) for each in activation_scale(minimum, maximum, bits, symmetric))
    lowest, highest = integer_limits(bits)
    low, high = (lowest - zero_point) * scale, (highest - zero_point) * scale

    damping = _damping(x)
    low_end, high_end = _gradient_only(minimum * damping), _gradient_only(maximum * damping)
    if symmetric:
        from_low = minimum / float(lowest) >= maximum / float(highest)
        step = scale + ops.where(from_low, low_end / float(lowest), high_end / float(highest))
        low, high = step * float(lowest), step * float(highest)
    else:
        step = scale + (high_end - low_end) / float(highest - lowest)
        low, high = low + low_end, high + high_end

    inside = _is_inside(x, ops.stop_gradient(low), ops.stop_gradient(high))
    steps = ops.where(inside, x, 0.0) / step
    rounded = _forward_as(ops.round(steps), steps) * step
    rounded = ops.where(inside, rounded, ops.where(x > ops.stop_gradient(high), high, low))
    return ops.where(ops.isnan(x), x, rounded)


def _learned(scale: Tensor, kernel: Tensor, bits: int) -> Tensor:
    shared = float(np.prod(kernel.shape)) / float(np.prod(scale.shape))
    damping = 1.0 / (shared * (2 ** (bits - 1) - 1)) ** 0.5
    return ops.stop_gradient(exact_scale(scale)) + _gradient_only(ops.abs(scale) * damping)


def _gradient_only(x: Tensor) -> Tensor:
    """Return 0 with the gradient of `x`."""
    return x - ops.stop_gradient(x)


def _lsq(kernel: Tensor, scale: Tensor, bits: int) -> Tensor:
    greatest = float(2 ** (bits - 1) - 1)
    steps = kernel * (1.0 / scale)
    inside = ops.stop_gradient(ops.abs(steps)) <= greatest
    clipped = ops.where(inside, steps, ops.stop_gradient(ops.clip(steps, -greatest, greatest)))
    return _forward_as(ops.round(clipped), clipped) * scale


def _round_to_grid(kernel: Tensor, scale: Tensor, bits: int) -> Tensor:
    xp = _namespace(kernel)
    greatest = float(2 ** (bits - 1) - 1)
    return xp.clip(xp.round(kernel * (1.0 / scale)), -greatest, greatest)


def reduce_groups(
    reduce: Any, values: Tensor, channel_axes: tuple[int, ...], group_size: int | None, axis: int | None
) -> Tensor:
    """Reduce all axes but the channels, keeping the rank; along `axis` each group is reduced by itself."""
    xp = _namespace(values)
    shape = [int(size) for size in values.shape]
    kept = {each % len(shape) for each in channel_axes}
    if group_size is None:
        return reduce(values, axis=tuple(each for each in range(len(shape)) if each not in kept), keepdims=True)
    axis = axis % len(shape)
    groups = -(-shape[axis] // group_size)
    padding = [(0, 0)] * len(shape)
    padding[axis] = (0, groups * group_size - shape[axis])
    split = [*shape[:axis], groups, group_size, *shape[axis + 1 :]]
    values = xp.reshape(xp.pad(values, padding), split)
    kept = {each + (each > axis) for each in kept} | {axis}
    reduced = reduce(values, axis=tuple(each for each in range(len(split)) if each not in kept), keepdims=True)
    return xp.squeeze(reduced, axis=axis + 1)


def _to_bits(x: Tensor) -> Tensor:
    return x.view(np.int32) if _namespace(x) is np else ops.view(x, "int32")


def _to_float(bits: Tensor) -> Tensor:
    return bits.view(np.float32) if _namespace(bits) is np else ops.view(bits, "float32")
