"""Initial centroids, as literals where they can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.clustering.centroids import INITIALISATIONS, initial_centroids
from compress.errors import UsageError

WEIGHTS = np.array([-1.0, -0.9, 0.1, 0.2, 0.3, 2.0, 2.1, 3.0], "float32")


def test_linear():
    np.testing.assert_allclose(initial_centroids(WEIGHTS, 5, "linear"), [-1, 0, 1, 2, 3])


def test_density():
    """The middles of four groups of two weights."""
    np.testing.assert_allclose(
        initial_centroids(WEIGHTS, 4, "density"), np.quantile(WEIGHTS, [0.125, 0.375, 0.625, 0.875])
    )


def test_k_means_finds_the_groups():
    np.testing.assert_allclose(initial_centroids(WEIGHTS, 4, "k-means++"), [-0.95, 0.2, 2.05, 3.0], atol=1e-6)


@pytest.mark.parametrize("name", sorted(INITIALISATIONS))
def test_few_distinct_values_are_their_own_centroids(name):
    weights = np.array([0.5, -0.0, 0.5, -2.0, 0.0], "float32")
    found = initial_centroids(weights, 3, name)
    np.testing.assert_array_equal(found, [-2.0, 0.0, 0.5])
    assert not np.signbit(found[1])
    assert found.dtype == np.float32


@pytest.mark.parametrize("name", sorted(INITIALISATIONS))
def test_constant_weights(name):
    np.testing.assert_array_equal(initial_centroids(np.full(9, 0.25), 4, name), [0.25])


def test_zero_is_a_centroid_and_the_signs_share_the_others():
    """Two negative and five positive weights: two and four of the six other centroids."""
    weights = np.array([-1.0, -0.9, 0, 0, 0, 0.1, 0.2, 0.3, 2.0, 2.1, 3.0, -0.8])
    found = initial_centroids(weights, 7, "linear", zero=True)
    np.testing.assert_allclose(found, [-1.0, -0.8, 0.0, 0.1, 0.1 + 2.9 / 3, 0.1 + 5.8 / 3, 3.0])


def test_each_sign_keeps_a_centroid():
    weights = np.append(np.linspace(0.1, 1, 99), [-5.0, 0.0])
    found = initial_centroids(weights, 3, "linear", zero=True)
    np.testing.assert_allclose(found, [-5.0, 0.0, 0.55])


@pytest.mark.parametrize("name", sorted(INITIALISATIONS))
@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=60),
    clusters=st.integers(3, 20),
    zero=st.booleans(),
)
def test_centroids_are_few_sorted_and_inside(name, values, clusters, zero):
    weights = np.array(values, "float32")
    found = initial_centroids(weights, clusters, name, zero=zero)
    assert 1 <= len(found) <= clusters
    assert np.all(np.diff(found) >= 0)
    assert found.min() >= min(weights.min(), 0 if zero else np.inf) - 1e-6
    assert found.max() <= max(weights.max(), 0 if zero else -np.inf) + 1e-6
    assert not zero or 0 in found


def test_k_means_is_at_least_as_near_as_the_others():
    weights = np.random.default_rng(0).laplace(size=4000).astype("float32")
    errors = {
        name: np.square(weights[:, None] - initial_centroids(weights, 16, name)).min(1).sum()
        for name in INITIALISATIONS
    }
    assert errors["k-means++"] < min(errors["linear"], errors["density"])


@pytest.mark.parametrize("clusters", [1, 0, -3, 2.0, True, "16"])
def test_refuses_a_number_that_is_none(clusters):
    with pytest.raises(UsageError, match="integer of at least 2"):
        initial_centroids(WEIGHTS, clusters)


def test_refuses_unknown_names_and_too_few_clusters():
    with pytest.raises(UsageError, match="'random'"):
        initial_centroids(WEIGHTS, 4, "random")
    with pytest.raises(UsageError, match="at least 3 clusters"):
        initial_centroids(WEIGHTS, 2, zero=True)


@pytest.mark.parametrize("zero", [False, True])
def test_linear_centroids_equal_tfmot(zero):
    """The oracle: same weights, same centroids; tfmot calls the zero `preserve_sparsity`."""
    clustering = pytest.importorskip(
        "tensorflow_model_optimization.python.core.clustering.keras.clustering_centroids", exc_type=ImportError
    )
    import tensorflow as tf

    random = np.random.default_rng(3)
    weights = random.normal(0.02, 0.3, (3, 3, 8, 16)).astype("float32")
    if zero:
        weights[np.abs(weights) < 0.2] = 0
    for clusters in (2, 8, 16, 32)[zero:]:
        theirs = clustering.LinearCentroidsInitialisation(tf.constant(weights), clusters, preserve_sparsity=zero)
        ours = initial_centroids(weights.reshape(-1), clusters, "linear", zero=zero)
        np.testing.assert_allclose(ours, theirs.get_cluster_centroids(), atol=1e-6)
