"""Scales and fake quantization, against literals worked out by hand, NumPy twins and TensorFlow's operation."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from compress.errors import UsageError
from compress.quantization.arithmetic import (
    activation_scale,
    exact_scale,
    fake_quantize_activation,
    fake_quantize_weight,
    learned_scale,
    nudged_range,
    quantize_weight,
    round_to_float,
    spread_scale,
    weight_scale,
)

RANGES = [
    (-1.0, 2.0, 8, False),
    (0.0, 3.0, 8, False),
    (-0.3, 0.0, 4, False),
    (-2.0, 1.0, 8, True),
    (0.0, 1.0, 2, False),
]


def dequantize(integers, scale, group_size=None, axis=None):
    return integers.astype("float32") * spread_scale(scale, integers.shape, group_size, axis)


def gradients(function, *values):
    tensors = [tf.constant(np.asarray(value, "float32")) for value in values]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        total = tf.reduce_sum(function(*tensors))
    return [None if g is None else g.numpy() for g in tape.gradient(total, tensors)]


@pytest.mark.parametrize(
    ("minimum", "maximum", "bits", "symmetric", "scale", "zero_point"),
    [
        (0.0, 255.0, 8, False, 1.0, -128),
        (-255.0, 0.0, 8, False, 1.0, 127),
        (-127.5, 127.5, 8, False, 1.0, 0),  # 127.5 steps below 0: rounded away from zero, to 128
        (-1.0, 14.0, 4, False, 1.0, -7),
        (5.0, 255.0, 8, False, 1.0, -128),  # 0 is included
        (-255.0, -5.0, 8, False, 1.0, 127),
        (0.0, 0.0, 8, False, 1 / 255, -128),  # nothing but zeros
        (0.0, 255 / 256, 8, False, 1 / 256, -128),  # softmax
        (-1.0, 127 / 128, 8, False, 1 / 128, 0),  # tanh
        (-1.0, 32767 / 32768, 16, True, 1 / 32768, 0),
        (-1.0, 32767.0, 16, True, 1.0, 0),
        (-32768.0, 5.0, 16, True, 1.0, 0),
    ],
)
def test_activation_scale(minimum, maximum, bits, symmetric, scale, zero_point):
    found = activation_scale(minimum, maximum, bits, symmetric)
    assert found == (np.float32(scale), zero_point)
    tensors = activation_scale(ops.convert_to_tensor(minimum), ops.convert_to_tensor(maximum), bits, symmetric)
    assert [float(each) for each in tensors] == [float(each) for each in found]


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32), st.sampled_from([2, 4, 8, 16]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_activation_scale_holds_zero_and_the_range(a, b, bits, symmetric):
    low, high = min(a, b), max(a, b)
    scale, zero_point = activation_scale(low, high, bits, symmetric)
    assert scale > 0
    assert np.isfinite(scale)
    assert zero_point == np.round(zero_point)
    start, end = nudged_range(low, high, bits, symmetric)
    assert start <= 0 <= end
    if high - low > 1e-20:
        assert start <= low + 0.51 * scale
        assert end >= high - 0.51 * scale


def test_activation_rounds_to_even_and_clips():
    x = np.array([-0.6, -0.5, 0.4, 0.5, 1.5, 2.5, 255.5, 300.0, np.inf, -np.inf, np.nan], "float32")
    y = ops.convert_to_numpy(fake_quantize_activation(ops.convert_to_tensor(x), 0.0, 255.0))
    np.testing.assert_array_equal(y, [0, 0, 0, 0, 2, 2, 255, 255, 255, 0, np.nan])


def test_activation_of_a_constant_or_of_zeros_keeps_it():
    for value in (3.0, -0.25, 0.0):
        x = ops.full((4,), value)
        y = fake_quantize_activation(x, ops.min(x), ops.max(x))
        np.testing.assert_allclose(ops.convert_to_numpy(y), value, rtol=1e-6)


@pytest.mark.parametrize(("minimum", "maximum", "bits", "symmetric"), RANGES)
def test_activation_as_tensorflows_operation(minimum, maximum, bits, symmetric):
    x = np.random.default_rng(0).normal(0, 1.5, 5000).astype("float32")
    low, high = nudged_range(minimum, maximum, bits, symmetric)
    expected = tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=bits).numpy()
    for fused in (False, True):
        y = fake_quantize_activation(ops.convert_to_tensor(x), minimum, maximum, bits, symmetric, fused=fused)
        np.testing.assert_allclose(ops.convert_to_numpy(y), expected, atol=1e-6)
    assert np.abs(expected - x)[(x > low) & (x < high)].max() <= 0.5 * float(high - low) / (2**bits - 1) + 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_activation_gradient_is_that_of_the_clipped_identity(fused):
    x = [-1.01, -1.0, -0.3, 0.0, 13.9, 14.0, 14.01]
    function = lambda x, low, high: fake_quantize_activation(x, low, high, 4, fused=fused)  # noqa: E731
    of_x, of_low, of_high = gradients(function, x, -1.0, 14.0)
    np.testing.assert_array_equal(of_x, [0, 1, 1, 1, 1, 1, 0])
    assert of_low is None or of_low == 0
    assert of_high is None or of_high == 0


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_without_mask_is_one_everywhere(fused):
    function = lambda x: fake_quantize_activation(x, -1.0, 14.0, 4, fused=fused, masked=False)  # noqa: E731
    (of_x,) = gradients(function, [-9.0, 0.3, 99.0])
    np.testing.assert_array_equal(of_x, [1, 1, 1])
    np.testing.assert_array_equal(function(ops.convert_to_tensor([-9.0, 0.3, 99.0])), [-1, 0, 14])


@pytest.mark.parametrize(("minimum", "maximum", "bits", "symmetric"), RANGES)
@pytest.mark.parametrize("jit", [False, True])
def test_fused_learned_range_has_the_same_gradients(minimum, maximum, bits, symmetric, jit):
    x = np.random.default_rng(0).normal(0, 1.5, (8, 50)).astype("float32")
    upstream = np.random.default_rng(1).normal(size=x.shape).astype("float32")

    def function(fused):
        return lambda x, low, high: (
            upstream * fake_quantize_activation(x, low, high, bits, symmetric, learned=True, fused=fused)
        )

    def of(*values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            total = tf.reduce_sum(function(True)(*values))
        return tape.gradient(total, values)

    plain = gradients(function(False), x, minimum, maximum)
    fused = tf.function(of, jit_compile=jit)(*(tf.constant(each, tf.float32) for each in (x, minimum, maximum)))
    assert np.mean(np.abs(plain[0] - fused[0]) > 1e-5) < 0.01  # ends of the range may fall on either side
    for of_end, expected in zip(fused[1:], plain[1:], strict=True):
        np.testing.assert_allclose(of_end, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_learned_range_has_lsq_gradients(fused):
    # Range [0, 15] of 4 bits: steps of 1. d/d scale is round(v) - v inside, and the end itself beyond it.
    function = lambda x, low, high: fake_quantize_activation(x, low, high, 4, learned=True, fused=fused)  # noqa: E731
    x = np.array([[3.25, 7.5, 20.0, -2.0]], "float32")
    of_x, of_low, of_high = gradients(function, x, 0.0, 15.0)
    np.testing.assert_array_equal(of_x, [[1, 1, 0, 0]])
    slope = (3 - 3.25) + (8 - 7.5)
    damping = 1 / np.sqrt(4)
    np.testing.assert_allclose(of_high, (slope / 15 + 1) * damping, rtol=1e-6)  # 20.0 lies above the range
    np.testing.assert_allclose(of_low, (-slope / 15 + 1) * damping, rtol=1e-6)  # -2.0 below
    y = fake_quantize_activation(ops.convert_to_tensor(x), 0.0, 15.0, bits=4, learned=True)
    np.testing.assert_array_equal(ops.convert_to_numpy(y), [[3, 8, 15, 0]])


@pytest.mark.parametrize("fused", [False, True])
def test_learned_symmetric_range_moves_the_end_that_counts(fused):
    function = lambda x, low, high: fake_quantize_activation(x, low, high, 4, True, True, fused)  # noqa: E731
    _, of_low, of_high = gradients(function, [[3.25, 20.0]], -4.0, 7.0)  # steps of 1, up to 7
    np.testing.assert_allclose(of_high, (-0.25 / 7 + 1) / np.sqrt(2), rtol=1e-6)
    assert of_low == 0


def test_weight_scale_by_hand():
    kernel = np.array([[127.0, 0.0, -2.54], [-63.5, 0.0, 1.0]], "float32")
    integers, scale = quantize_weight(kernel, (1,))
    np.testing.assert_allclose(scale, [[1.0, 2.0**-16, 0.02]], rtol=2.0**-15)
    np.testing.assert_array_equal(integers, [[127, 0, -127], [-64, 0, 50]])
    assert scale[0, 0] == 1.0
    assert weight_scale(kernel).shape == (1, 1)
    assert weight_scale(kernel, (0, 1)).shape == (2, 3)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_of_zeros_is_zeros(bits):
    integers, scale = quantize_weight(np.zeros((3, 2), "float32"), (1,), bits)
    assert not integers.any()
    np.testing.assert_allclose(scale, 1 / (2 ** (bits - 1) - 1), rtol=1e-4)


def test_groups_share_scales_and_the_last_may_be_short():
    kernel = np.array([[7.0], [3.5], [0.7], [0.36], [70.0]], "float32")
    integers, scale = quantize_weight(kernel, (1,), 4, 2, 0)
    np.testing.assert_allclose(scale, [[1.0], [0.1], [10.0]], rtol=1e-4)
    np.testing.assert_array_equal(integers[:, 0], [7, 4, 7, 4, 7])
    assert weight_scale(np.ones((3, 3, 5, 4), "float32"), (3,), 8, 2, 2).shape == (1, 1, 3, 4)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("grouping", [(None, None), (5, 0), (4, 1)])
def test_arrays_and_tensors_agree_to_the_last_bit_and_twice_is_once(bits, grouping):
    rng = np.random.default_rng(bits)
    magnitudes = 10.0 ** rng.integers(-9, 4, (1, 9))
    kernel = (rng.normal(size=(17, 9)) * magnitudes).astype("float32")
    axes = (1,) if grouping[1] != 1 else (0,)
    integers, scale = quantize_weight(kernel, axes, bits, *grouping)
    snapped = dequantize(integers, scale, *grouping)
    tensor = ops.convert_to_tensor(kernel)
    np.testing.assert_array_equal(fake_quantize_weight(tensor, axes, bits, *grouping), snapped)
    compiled = tf.function(lambda k: fake_quantize_weight(k, axes, bits, *grouping), jit_compile=True)
    np.testing.assert_array_equal(compiled(tensor), snapped)

    again, scale_again = quantize_weight(snapped, axes, bits, *grouping)
    np.testing.assert_array_equal(again, integers)
    np.testing.assert_array_equal(scale_again, scale)
    error = np.abs(snapped - kernel) / spread_scale(scale, kernel.shape, *grouping)
    assert error.max() <= 0.5 + 2e-3  # the 16 bits of a scale may cut off a thousandth of a step


def test_weight_gradient_passes_unchanged():
    (gradient,) = gradients(
        lambda k: 3 * fake_quantize_weight(k, (1,), 3), np.random.default_rng(0).normal(size=(4, 3))
    )
    np.testing.assert_array_equal(gradient, np.full((4, 3), 3.0))


def test_weight_with_known_scales_is_the_same():
    kernel = np.random.default_rng(0).normal(size=(17, 9)).astype("float32")
    snapped = ops.convert_to_numpy(fake_quantize_weight(ops.convert_to_tensor(kernel), (1,), 4))
    scale = weight_scale(kernel, (1,), 4)
    np.testing.assert_array_equal(fake_quantize_weight(ops.convert_to_tensor(kernel), (1,), 4, scale=scale), snapped)


def test_learned_weight_scale_has_lsq_gradients():
    kernel, scale = [[0.5, 1.25], [9.0, -9.0], [2.75, 0.0]], [[1.0, 1.0]]
    function = lambda k, s: fake_quantize_weight(k, (1,), 3, scale=s, learned=True)  # noqa: E731
    of_kernel, of_scale = gradients(function, kernel, scale)
    np.testing.assert_array_equal(of_kernel, [[1, 1], [0, 0], [1, 1]])
    expected = np.array([[(0 - 0.5) + 3 + (3 - 2.75), (1 - 1.25) - 3 + 0]]) / np.sqrt(3 * 3)
    np.testing.assert_allclose(of_scale, expected, rtol=1e-6)
    y = fake_quantize_weight(ops.convert_to_tensor(kernel), (1,), 3, scale=ops.convert_to_tensor(scale), learned=True)
    np.testing.assert_array_equal(y, [[0, 1], [3, -3], [3, 0]])


def test_learned_scale_starts_at_most_at_the_largest_weight():
    kernel = np.random.default_rng(0).normal(size=(500, 4)).astype("float32")
    np.testing.assert_array_equal(learned_scale(kernel, (1,), 8), weight_scale(kernel, (1,), 8))
    two = learned_scale(kernel, (1,), 2)
    np.testing.assert_allclose(two[0], 2 * np.abs(kernel).mean(0), rtol=1e-4)
    assert (learned_scale(np.zeros((3, 2), "float32")) > 0).all()


@given(st.floats(2.0**-90, 2.0**90, width=32))
@settings(max_examples=100, deadline=None)
def test_exact_scale_makes_products_exact(scale):
    exact = exact_scale(np.array([scale], "float32"))[0]
    assert exact == pytest.approx(scale, rel=2.0**-16)
    for integer in (1, 3, 89, 127):
        assert float(np.float32(integer) * exact) == integer * float(exact)


def test_weights_that_are_not_numbers_are_refused():
    with pytest.raises(UsageError, match="NaN"):
        quantize_weight(np.array([[1.0, np.nan]], "float32"))
    assert np.isnan(ops.convert_to_numpy(fake_quantize_weight(ops.convert_to_tensor([[1.0, np.nan]])))).any()


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 3.3895314e38)])
def test_float_types_round_as_casts_do(dtype, largest):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=5000) * 10.0 ** rng.integers(-9, 4, 5000)).astype("float32")
    x = np.append(x, np.array([0.0, -0.0, 2.0**-24, 2.0**-25, 65503.0], "float32"))
    expected = ops.convert_to_numpy(ops.cast(ops.cast(ops.convert_to_tensor(x), dtype), "float32"))
    np.testing.assert_array_equal(round_to_float(x, dtype), expected)
    np.testing.assert_array_equal(round_to_float(ops.convert_to_tensor(x), dtype), expected)
    assert round_to_float(np.array([3.4e38], "float32"), dtype)[0] == np.float32(largest)
    assert np.isnan(round_to_float(np.array([np.nan], "float32"), dtype)[0])
    (gradient,) = gradients(lambda t: round_to_float(t, dtype), [0.1, 2.0])
    np.testing.assert_array_equal(gradient, [1, 1])


def test_scales_know_negative_axes():
    kernel = keras.random.normal((3, 4, 5), seed=0)
    np.testing.assert_array_equal(weight_scale(kernel, (-1,)), weight_scale(kernel, (2,)))
    assert spread_scale(weight_scale(kernel, (-1,), 4, 2, -2), (3, 4, 5), 2, -2).shape == (1, 4, 5)
