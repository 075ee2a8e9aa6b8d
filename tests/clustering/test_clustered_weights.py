"""Clustering at once: few distinct values, zeros kept, and what is refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import compress
from compress.clustering.clustered_weights import cluster_array, refine_clusters
from compress.errors import PassError, UsageError
from compress.models.clusters import count_values


def test_nearest_centroid_and_ties_go_down():
    found = cluster_array(np.array([0.0, 1.0, 2.0, 3.0, 4.0]), 2, "linear")
    np.testing.assert_array_equal(found.values(), [0, 0, 0, 4, 4])


def test_each_channel_has_centroids_of_its_own():
    array = np.array([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0], [4.0, 50.0]])
    found = cluster_array(array, 2, "linear", axes=(1,))
    np.testing.assert_array_equal(found.centroids, [[0, 4], [10, 50]])
    np.testing.assert_array_equal(found.values(), [[0, 10], [0, 10], [0, 10], [4, 50]])


def test_refinement_moves_centroids_to_means_and_zero_stays():
    array = np.array([-1.2, -1.0, -0.2, 0.0, 0.1, 0.9, 1.1, 1.3])
    found = refine_clusters(array, np.array([[-1.0, 0.0, 1.0]]), (), keep_zero=True)
    np.testing.assert_allclose(found.centroids, [[-1.1, 0.0, 1.1]])
    found = refine_clusters(array, np.array([[-1.0, 0.0, 1.0]]), ())
    np.testing.assert_allclose(found.centroids, [[-1.1, -0.1 / 3, 1.1]])


def test_a_copy_is_clustered(cnn_factory):
    model = cnn_factory()
    before = model.get_weights()
    result = compress.cluster_weights(model, 6)
    assert [count_values(w) for w in result.get_weights() if w.ndim > 1] == [6, 6]
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    untouched = [(a, b) for a, b in zip(before, result.get_weights(), strict=True) if a.ndim == 1]
    assert all(np.array_equal(a, b) for a, b in untouched)


def test_zeros_stay_zero_and_all_zero_kernels_are_new(cnn_factory):
    model = cnn_factory()
    conv, head = model.get_layer("conv"), model.get_layer("head")
    conv.kernel.assign(np.where(np.abs(conv.kernel) < 0.1, 0, conv.kernel))
    head.kernel.assign(np.zeros_like(head.kernel))
    result = compress.cluster_weights(model, 4)
    zeros = np.asarray(conv.kernel) == 0
    clustered = np.asarray(result.get_layer("conv").kernel)
    assert zeros.any()
    assert (clustered[zeros] == 0).all()
    assert count_values(clustered) == 4
    assert count_values(np.asarray(result.get_layer("head").kernel)) == 1


def test_include_exclude_and_channels(cnn_factory):
    result = compress.cluster_weights(cnn_factory(), 3, include=["conv"], granularity="per_channel")
    conv, head = np.asarray(result.get_layer("conv").kernel), np.asarray(result.get_layer("head").kernel)
    assert count_values(conv, (-1,)) == 3
    assert count_values(conv) > 3
    assert count_values(head) == head.size


def test_kernels_of_attention_recurrent_and_embedding_layers():
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 8)(inputs)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.SeparableConv1D(8, 3)(x)
    model = keras.Model(inputs, keras.layers.LSTM(4)(x))
    for granularity in ("per_tensor", "per_channel"):
        result = compress.cluster_weights(model, 5, granularity=granularity)
        changed = [not np.array_equal(a, b) for a, b in zip(model.get_weights(), result.get_weights(), strict=True)]
        assert sum(changed) >= 7
        assert np.isfinite(result(np.arange(12).reshape(2, 6))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 1}, "at least 2"),
        ({"clusters": 4, "initialisation": "best"}, "initialisation"),
        ({"clusters": 4, "granularity": "per_row"}, "per_row"),
        ({"clusters": 4, "include": ["nothing"]}, "nothing"),
        ({"clusters": 4, "include": ["conv"], "exclude": ["conv"]}, "at least one trainable kernel"),
    ],
)
def test_refuses_bad_options(cnn_factory, options, message):
    with pytest.raises(UsageError, match=message):
        compress.cluster_weights(cnn_factory(), **options)


def test_refuses_frozen_and_quantized_kernels_by_name(cnn_factory):
    model = cnn_factory()
    with pytest.raises(UsageError, match="conv/kernel of a fake-quantized layer"):
        compress.cluster_weights(compress.fake_quantize(model, "int8"), 4)
    model.get_layer("conv").trainable = False
    with pytest.raises(UsageError, match="conv/kernel: frozen"):
        compress.cluster_weights(model, 4, include=["conv", "head"])


def test_too_few_clusters_and_nan_name_the_kernel(cnn_factory):
    model = cnn_factory()
    kernel = model.get_layer("conv").kernel
    values = np.array(kernel)
    kernel.assign(np.where(np.abs(values) < 0.1, 0, values))
    with pytest.raises(UsageError, match="conv/kernel: expected at least 3 clusters"):
        compress.cluster_weights(model, 2)
    values[0, 0, 0, 0] = np.nan
    kernel.assign(values)
    with pytest.raises(PassError, match="NaN in conv/kernel"):
        compress.cluster_weights(model, 4)
