"""Fake quantization of activations with TensorFlow's own operations, in a fraction of the passes over the tensor.

They compile with XLA too. Ties are rounded upwards, not to even. Learned ranges: LSQ (Esser et al. 2020,
arXiv:1902.08153).
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from compress.quantization.arithmetic import integer_limits, nudged_range

_EMPTY = 1e-30


def fake_quantize(
    x: tf.Tensor, minimum: Any, maximum: Any, bits: int = 8, symmetric: bool = False, masked: bool = True
) -> tf.Tensor:
    """Return what `fake_quantize_activation` returns; arguments as there."""
    low, high = _ends(minimum, maximum, bits, symmetric)

    def quantize(x: tf.Tensor) -> tf.Tensor:
        return tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=bits)

    return quantize(x) if masked else tf.grad_pass_through(quantize)(x)


def learned_fake_quantize(
    x: tf.Tensor, minimum: Any, maximum: Any, damping: tf.Tensor, bits: int = 8, symmetric: bool = False
) -> tf.Tensor:
    """Return what `fake_quantize_activation` returns for a learned range, with one pass for all three gradients.

    Args:
        x: float32 tensor of any shape.
        minimum, maximum: scalars: the range.
        damping: what the gradients of both ends are multiplied with.
        bits: 2 to 8, or 16.
        symmetric: the zero point is 0.
    """
    low, high = _ends(minimum, maximum, bits, symmetric)
    lowest, highest = (float(limit) for limit in integer_limits(bits))

    @tf.custom_gradient
    def quantize(x: tf.Tensor, minimum: tf.Tensor, maximum: tf.Tensor) -> tuple[tf.Tensor, Any]:
        y = tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=bits)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            of_x, of_low, of_high = tf.quantization.fake_quant_with_min_max_vars_gradient(
                upstream, x, low, high, num_bits=bits
            )
            # Inside, d y / d scale is the rounding error in steps, and the scale is the range divided by the steps.
            stretch = tf.reduce_sum(of_x * (y - x)) / (high - low)
            of_low, of_high = of_low - stretch, of_high + stretch
            if symmetric:  # one end sets the scale, which moves both
                of_scale = of_low * lowest + of_high * highest
                from_low = minimum / lowest >= maximum / highest
                of_low = tf.where(from_low, of_scale / lowest, 0.0)
                of_high = tf.where(from_low, 0.0, of_scale / highest)
            return of_x, of_low * damping, of_high * damping

        return y, gradient

    return quantize(x, tf.convert_to_tensor(minimum), tf.convert_to_tensor(maximum))


def _ends(minimum: Any, maximum: Any, bits: int, symmetric: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the range that TensorFlow's operation is given, which nudges the ends of an asymmetric one itself."""
    if symmetric:
        low, high = nudged_range(tf.convert_to_tensor(minimum), tf.convert_to_tensor(maximum), bits, True)
    else:
        low, high = tf.minimum(minimum, 0.0), tf.maximum(maximum, 0.0)
        high = tf.where(high - low < _EMPTY, 1.0, high)
    return tf.stop_gradient(low), tf.stop_gradient(high)
