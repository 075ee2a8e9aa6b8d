"""Scales that give all channels of a clustered kernel the same integers, worked out by hand."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import compress
from compress.quantization.clustered import ClusteredKernels, cluster_unit, is_clustered
from compress.quantization.layers import QuantizedLayer
from compress.quantization.weight_format import WeightFormat

L = keras.layers
SOURCE = np.tile(np.float32([[0.0, 0.5], [-0.25, 0.125], [0.5, 0.0], [0.125, -0.25]]), (3, 1))  # (12, 2), four values


def dense(kernel) -> keras.Model:
    model = keras.Sequential([keras.Input((len(kernel),)), L.Dense(kernel.shape[1], name="dense")])
    model.layers[0].kernel.assign(kernel)
    return model


@pytest.fixture(scope="module")
def clustered():
    return ClusteredKernels(dense(SOURCE))


def test_scales_take_the_factors_of_channels_back(clustered):
    factors = np.float32([[2.0, -0.25]])
    scale = clustered.shared_scale(SOURCE * factors, WeightFormat(8, (1,)))
    np.testing.assert_allclose(scale, [[2 * 0.5 / 127, 0.25 * 0.5 / 127]], rtol=1e-5)
    assert clustered.knows(SOURCE * factors, (1,))


@pytest.mark.parametrize(
    ("kernel", "form"),
    [
        (SOURCE * np.linspace(1, 2, 12, dtype="float32")[:, None], WeightFormat(8, (1,))),  # factors of inputs
        (SOURCE * np.float32([[2.0, 0.25]]), WeightFormat(8)),  # one scale for all channels
        (SOURCE + 0.01, WeightFormat(8, (1,))),
        (SOURCE.T, WeightFormat(8, (1,))),
        (SOURCE, WeightFormat(16, dtype="float16")),
    ],
)
def test_no_scales_where_integers_cannot_be_shared(clustered, kernel, form):
    assert clustered.shared_scale(kernel, form) is None


def test_a_dead_channel_has_a_scale_that_is_not_too_small(clustered):
    scale = clustered.shared_scale(SOURCE * np.float32([[1.0, 0.0]]), WeightFormat(8, (1,)))
    assert scale[0, 1] == pytest.approx(scale[0, 0] * 2.0**-16, rel=1e-4)


def test_groups_share_the_scale_of_their_channel(clustered):
    scale = clustered.shared_scale(SOURCE * np.float32([[2.0, 1.0]]), WeightFormat(8, (1,), 4, 0))
    np.testing.assert_allclose(scale, np.tile([[1 / 127, 0.5 / 127]], (3, 1)), rtol=1e-5)


def test_a_cluster_between_two_integers_gets_one():
    """0.5 of a step, divided by scales of 16 bits, would be rounded down in some channels and up in others."""
    values = np.float32([63.5, 127, 20.5, 0, -41.5])
    rng = np.random.default_rng(0)
    kernel = values[rng.integers(0, 5, (40, 64))] / 127
    kernel[0] = 1.0
    x = keras.Input((40,))
    model = keras.Model(x, L.BatchNormalization(name="norm")(L.Dense(64, use_bias=False, name="dense")(x)))
    model.get_layer("dense").kernel.assign(kernel)
    model.get_layer("norm").gamma.assign(rng.uniform(0.3, 3, 64))
    layer = next(each for each in compress.fake_quantize(model, "int8").layers if each.name == "dense")
    (stored,) = layer.stored_weights()
    assert len(np.unique(stored.values)) == 5
    assert is_clustered(layer, "kernel")
    np.testing.assert_allclose(stored.dequantize() / cluster_unit(layer, "kernel"), stored.values, rtol=1e-6)


def test_few_bits_have_searched_scales_that_are_shared():
    rng = np.random.default_rng(0)
    centroids = np.sort(np.append(rng.normal(0, 0.1, 19), 1.0)).astype("float32")  # the largest is far from the others
    kernel = centroids[rng.integers(0, 19, (64, 16))]
    kernel[0, 0] = kernel[1, 1] = 1.0
    layer = next(e for e in compress.fake_quantize(dense(kernel), "int4_weights", bits=4).layers if e.name == "dense")
    (stored,) = layer.stored_weights()
    assert np.ptp(stored.scale) == 0
    assert stored.scale.max() < 0.9 / 7
    assert np.square(stored.dequantize() - kernel).sum() < 0.5 * np.square(np.rint(kernel * 7) / 7 - kernel).sum()


def test_unclustered_kernels_are_as_before():
    kernel = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
    layer = next(e for e in compress.fake_quantize(dense(kernel), "int8").layers if isinstance(e, QuantizedLayer))
    assert layer.formats["kernel"].scale == "absmax"
    assert cluster_unit(layer, "kernel") is None
    assert not is_clustered(layer, "kernel")
