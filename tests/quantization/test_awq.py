"""AWQ: the float model stays the same, the quantized one comes closer."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from compress.errors import DataError, ModelError, UsageError
from compress.quantization.absorption import absorbing_weights, divide_outputs
from compress.quantization.awq import awq_scales, search_clipping
from compress.quantization.gptq import round_by_gptq
from compress.quantization.hessian import Hessian
from compress.quantization.matrix import matrix_scale, round_matrix

layers = keras.layers


def seen(inputs: np.ndarray) -> Hessian:
    hessian = Hessian(inputs.shape[-1], "dense")
    hessian.update(inputs)
    return hessian


@pytest.fixture
def loud_inputs():
    """Inputs of which two channels in 64 are 20 times as large as the others, and a kernel."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 64)).astype("float32")
    x[:, [5, 40]] *= 20
    return x, rng.normal(size=(64, 16)).astype("float32")


def output_mse(x, kernel, rounded):
    return float(np.square(x @ kernel - x @ rounded).mean())


@pytest.mark.parametrize("group_size", [None, 16])
def test_scales_cut_the_error_of_loud_channels(loud_inputs, group_size):
    x, kernel = loud_inputs
    factors, alpha = awq_scales(kernel, seen(x), 4, group_size)
    assert 0 < alpha <= 1
    assert (factors[[5, 40]] > np.delete(factors, [5, 40]).max()).all()
    assert factors.max() * factors.min() == pytest.approx(1, rel=1e-5)
    scaled = kernel * factors[:, None]
    np.testing.assert_allclose((x / factors) @ scaled, x @ kernel, rtol=1e-3, atol=1e-3)  # float: the same function
    rounded = round_matrix(scaled, matrix_scale(scaled, 4, group_size), 4, group_size) / factors[:, None]
    nearest = round_matrix(kernel, matrix_scale(kernel, 4, group_size), 4, group_size)
    assert output_mse(x, kernel, rounded) < 0.5 * output_mse(x, kernel, nearest)


def test_no_scales_where_none_help():
    """Each input has the same magnitude: every alpha gives factors of one."""
    x = np.sign(np.random.default_rng(0).normal(size=(100, 8)))
    factors, alpha = awq_scales(np.random.default_rng(1).normal(size=(8, 4)), seen(x), 4)
    assert alpha == 0
    np.testing.assert_array_equal(factors, np.ones(8))


def test_dead_inputs_do_not_set_the_range(loud_inputs):
    x, kernel = loud_inputs
    x[:, 0] = 0
    factors, _ = awq_scales(kernel, seen(x), 4)
    assert factors[0] == factors[1:].min()
    assert factors.max() / factors.min() < 50


@pytest.mark.parametrize("group_size", [None, 16])
def test_clipping_never_hurts_a_group(loud_inputs, group_size):
    x, kernel = loud_inputs
    kernel[3] *= 6  # outliers on a quiet input: worth clipping
    largest = matrix_scale(kernel, 4, group_size)
    scale = search_clipping(kernel, seen(x), 4, group_size)
    assert scale.shape == largest.shape
    assert (scale <= largest).all()
    assert (scale >= 0.4999 * largest).all()
    assert (scale < 0.95 * largest).any()
    nearest = round_matrix(kernel, largest, 4, group_size)
    clipped = round_matrix(kernel, scale, 4, group_size)
    for group in range(len(largest)):
        rows = slice(group * (group_size or 64), (group + 1) * (group_size or 64))
        errors = [np.square(x[:, rows] @ (kernel - q)[rows]).sum(axis=0) for q in (clipped, nearest)]
        assert (errors[0] <= errors[1] * 1.0001).all()
    assert output_mse(x, kernel, clipped) < 0.9 * output_mse(x, kernel, nearest)


def test_scaling_clipping_and_gptq_go_together(loud_inputs):
    x, kernel = loud_inputs
    hessian = seen(x)
    factors, _ = awq_scales(kernel, hessian, 3, 16)
    scaled, divided = kernel * factors[:, None], hessian.divided_by(factors)
    rounded, _ = round_by_gptq(scaled, divided, 3, 16, scale=search_clipping(scaled, divided, 3, 16))
    nearest = round_matrix(kernel, matrix_scale(kernel, 3, 16), 3, 16)
    assert output_mse(x, kernel, rounded / factors[:, None]) < 0.4 * output_mse(x, kernel, nearest)


def test_errors():
    with pytest.raises(DataError, match="no inputs"):
        awq_scales(np.ones((3, 2)), Hessian(3, "dense"))
    with pytest.raises(DataError, match="no inputs"):
        search_clipping(np.ones((3, 2)), Hessian(3, "dense"))
    with pytest.raises(UsageError, match="3 features"):
        awq_scales(np.ones((3, 2)), Hessian(4, "dense"))


def built(layer, *shape):
    layer.build((None, *shape))
    rng = np.random.default_rng(0)
    layer.set_weights([np.abs(rng.normal(size=w.shape)) + 0.1 for w in layer.get_weights()])
    return layer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.LayerNormalization(), (3, 8)),
        (layers.LayerNormalization(center=False), (3, 8)),
        (layers.RMSNormalization(), (3, 8)),
        (layers.BatchNormalization(), (3, 8)),
        (layers.BatchNormalization(axis=2), (3, 8)),
        (layers.GroupNormalization(groups=2), (3, 8)),
        (layers.Dense(8), (3, 5)),
        (layers.Dense(8, activation="relu", use_bias=False), (5,)),
        (layers.Dense(8, activation="leaky_relu"), (5,)),
        (layers.Conv1D(8, 2), (4, 5)),
        (layers.EinsumDense("abc,cd->abd", (None, 8), bias_axes="d"), (3, 5)),
        (layers.EinsumDense("abc,cde->abde", (None, 2, 8), bias_axes="de"), (3, 5)),
        (layers.EinsumDense("...c,cd->...d", (8,), bias_axes="d"), (5,)),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_divided_outputs_are_exact(layer, shape):
    layer = built(layer, *shape)
    x = np.random.default_rng(1).normal(size=(4, *shape)).astype("float32")
    factors = np.linspace(0.25, 4, 8).astype("float32")
    before = keras.ops.convert_to_numpy(layer(x))
    divide_outputs(layer, factors)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(x)), before / factors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.LayerNormalization(scale=False), (3, 8)),
        (layers.LayerNormalization(axis=1), (8, 8)),
        (layers.BatchNormalization(axis=1), (8, 8)),
        (layers.BatchNormalization(scale=False), (8,)),
        (layers.Dense(8, activation="gelu"), (5,)),
        (layers.Dense(8, activation="relu6"), (5,)),
        (layers.Dense(7), (5,)),
        (layers.EinsumDense("abc,bd->adc", (2, 8)), (3, 8)),
        (layers.EinsumDense("abc,cde->abde", (None, 2, 8), bias_axes="d"), (3, 5)),
        (layers.DepthwiseConv1D(2), (4, 8)),
        (layers.ReLU(), (8,)),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_others_do_not_absorb(layer, shape):
    layer = built(layer, *shape)
    assert absorbing_weights(layer, 8) == []
    with pytest.raises(ModelError, match=layer.name):
        divide_outputs(layer, np.ones(8))
