"""GPTQ: numbers worked out by hand, and the laws that it must keep on correlated inputs."""

from __future__ import annotations

import numpy as np
import pytest

from compress.errors import DataError, UsageError
from compress.quantization.arithmetic import spread_scale
from compress.quantization.gptq import round_by_gptq
from compress.quantization.hessian import Hessian, output_error
from compress.quantization.matrix import matrix_scale, round_matrix


def seen(inputs: np.ndarray, dtype: str = "float64") -> Hessian:
    hessian = Hessian(inputs.shape[-1], dtype=dtype)
    hessian.update(inputs)
    return hessian


def correlated(rows: int, features: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, 6)) @ rng.normal(size=(6, features))
    return (mixed + 0.3 * rng.normal(size=(rows, features))).astype("float32")


def test_hessian_is_the_mean_of_outer_products():
    hessian = Hessian(2)
    hessian.update(np.array([[1.0, 2.0]]))
    hessian.update(np.array([[[3.0, 0.0]]]))  # a sequence of one position
    assert hessian.rows == 2
    np.testing.assert_allclose(hessian.mean_products(), [[5.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(hessian.mean_magnitudes(), [2.0, 1.0])


def test_hessian_of_divided_inputs():
    x, factors = correlated(50, 4), np.array([0.5, 1.0, 2.0, 4.0])
    divided, direct = seen(x).divided_by(factors), seen(x / factors)
    np.testing.assert_allclose(divided.mean_products(), direct.mean_products(), rtol=1e-5)
    np.testing.assert_allclose(divided.mean_magnitudes(), direct.mean_magnitudes(), rtol=1e-5)


def test_no_data_is_an_error():
    kernel = np.ones((3, 2))
    with pytest.raises(DataError, match=r"'dense' must see calibration data. Received: no inputs"):
        round_by_gptq(kernel, Hessian(3, "dense"))
    hessian = Hessian(3, "dense")
    hessian.update(np.zeros((7, 3)))
    with pytest.raises(DataError, match=r"Received: 7 inputs, all of them zero"):
        hessian.require_data()
    with pytest.raises(DataError, match="finite"):
        hessian.update(np.array([[np.nan, 0, 0]]))
    with pytest.raises(DataError, match=r"\(samples, 3\). Received: \(2, 4\)"):
        hessian.update(np.zeros((2, 4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"damping": 0.0}, "damping"), ({"group_size": 0}, "group_size"),
        ({"group_size": 2, "scale": np.ones((3, 2), "float32")}, r"\(2, outputs\)"),
    ],
)  # fmt: skip
def test_bad_options(arguments, message):
    with pytest.raises(UsageError, match=message):
        round_by_gptq(np.ones((3, 2)), seen(np.eye(3)), **arguments)


def test_misfits():
    with pytest.raises(UsageError, match="4 features"):
        round_by_gptq(np.ones((4, 2)), seen(np.eye(3)))
    with pytest.raises(UsageError, match="matrix"):
        round_by_gptq(np.ones((4, 2, 2)), seen(np.eye(3)))
    with pytest.raises(UsageError, match="finite"):
        round_by_gptq(np.full((3, 2), np.nan), seen(np.eye(3)))


def test_two_equal_inputs_make_up_for_each_other():
    """Both inputs are the same, so only the sum 0.4 + 0.4 + 1 matters: nearest gives 1, GPTQ 0 + 1 + 1 = 2."""
    x = np.repeat(np.linspace(-1, 1, 20), 3).reshape(20, 3)
    kernel = np.array([[0.4], [0.4], [1.0]], "float32")
    hessian = seen(x)
    assert round_matrix(kernel, matrix_scale(kernel, 2), 2).sum() == 1.0
    rounded, scale = round_by_gptq(kernel, hessian, bits=2)
    assert rounded.ravel().tolist() == [0.0, 1.0, 1.0]
    assert scale.tolist() == [[1.0]]


def test_uncorrelated_inputs_are_rounded_to_nearest():
    kernel = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    rounded, scale = round_by_gptq(kernel, seen(np.eye(6)), bits=4)
    np.testing.assert_array_equal(rounded, round_matrix(kernel, scale, 4))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 32, 50])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_error_falls_and_result_is_on_the_grid(bits, group_size, act_order):
    x = correlated(600, 160)
    kernel = np.random.default_rng(1).normal(size=(160, 24)).astype("float32")
    hessian = seen(x)
    rounded, scale = round_by_gptq(kernel, hessian, bits, group_size, act_order=act_order)
    products = hessian.mean_products()
    nearest = round_matrix(kernel, matrix_scale(kernel, bits, group_size), bits, group_size)
    error, nearest_error = output_error(kernel - rounded, products), output_error(kernel - nearest, products)
    assert (error <= nearest_error).all()
    assert error.sum() < 0.6 * nearest_error.sum()
    assert scale.shape == ((1 if group_size is None else -(-160 // group_size)), 24)
    steps = rounded / np.broadcast_to(spread_scale(scale, rounded.shape, group_size, 0), rounded.shape)
    np.testing.assert_array_equal(steps, np.rint(steps))
    assert np.abs(steps).max() <= 2 ** (bits - 1) - 1
    # The same law on the inputs themselves instead of their Hessian.
    assert np.square(x @ (kernel - rounded)).mean() < 0.6 * np.square(x @ (kernel - nearest)).mean()


def test_fewer_samples_than_inputs_and_float32_sums():
    """A singular Hessian: damping makes it invertible, in float32 as well."""
    x = correlated(10, 140)
    kernel = np.random.default_rng(1).normal(size=(140, 8)).astype("float32")
    results = [round_by_gptq(kernel, seen(x, dtype), damping=1e-12)[0] for dtype in ("float32", "float64")]
    nearest = round_matrix(kernel, matrix_scale(kernel, 4), 4)
    for rounded in results:
        assert np.square(x @ (kernel - rounded)).mean() < 0.1 * np.square(x @ (kernel - nearest)).mean()


def test_dead_inputs_are_rounded_to_nearest_and_hurt_nothing():
    x = correlated(100, 20)
    x[:, [3, 11]] = 0
    kernel = np.random.default_rng(1).normal(size=(20, 5)).astype("float32")
    alive = np.delete(np.arange(20), [3, 11])
    rounded, scale = round_by_gptq(kernel, seen(x), 4)
    np.testing.assert_array_equal(rounded[[3, 11]], round_matrix(kernel, scale, 4)[[3, 11]])
    # Damping is a fraction of the mean over all inputs; the two dead ones lower it by 18 / 20.
    without, _ = round_by_gptq(kernel[alive], seen(x[:, alive]), 4, scale=scale, damping=0.01 * 18 / 20)
    np.testing.assert_array_equal(rounded[alive], without)


def test_dead_output_stays_zero():
    kernel = np.random.default_rng(1).normal(size=(20, 3)).astype("float32")
    kernel[:, 1] = 0
    rounded, scale = round_by_gptq(kernel, seen(correlated(100, 20)), 4, group_size=8)
    assert not rounded[:, 1].any()
    assert np.isfinite(rounded).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_zeros_stay_zero_if_asked(act_order):
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(40, 8)).astype("float32")
    kernel[rng.random(kernel.shape) < 0.5] = 0
    hessian = seen(correlated(200, 40))
    free, scale = round_by_gptq(kernel, hessian, 4, act_order=act_order)
    kept, _ = round_by_gptq(kernel, hessian, 4, act_order=act_order, keep_zeros=True)
    assert free[kernel == 0].any()  # without asking, zeros are used to make up for errors
    assert not kept[kernel == 0].any()
    products, nearest = hessian.mean_products(), round_matrix(kernel, scale, 4)
    assert output_error(kernel - kept, products).sum() < output_error(kernel - nearest, products).sum()


def test_given_scales_are_the_grid():
    kernel = np.random.default_rng(1).normal(size=(20, 3)).astype("float32")
    given = matrix_scale(kernel, 4) * np.float32(0.75)
    rounded, scale = round_by_gptq(kernel, seen(correlated(100, 20)), 4, scale=given)
    np.testing.assert_allclose(scale, given, rtol=2**-15)
    assert np.abs(rounded / scale).max() == 7


def test_arguments_are_not_changed():
    kernel, hessian = np.random.default_rng(1).normal(size=(20, 3)).astype("float32"), seen(correlated(100, 20))
    before, products = kernel.copy(), hessian.mean_products()
    first, _ = round_by_gptq(kernel, hessian, 3)
    second, _ = round_by_gptq(kernel, hessian, 3)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(kernel, before)
    np.testing.assert_array_equal(hessian.mean_products(), products)
