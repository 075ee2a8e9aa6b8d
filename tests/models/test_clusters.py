"""Clusters of weights, told from the values alone."""

from __future__ import annotations

import numpy as np
import pytest

from compress.models.clusters import count_values, find_clusters, from_rows, pad_rows, to_rows


def test_count_values():
    array = np.array([[1.0, 1.0, 0.0], [2.0, 3.0, -0.0]])
    assert count_values(array) == 4
    assert count_values(array, (1,)) == 2
    assert count_values(array, (0,)) == 3


@pytest.mark.parametrize("axes", [(), (0,), (-1,), (1, 2), (2, 0)])
def test_rows_and_back(axes):
    array = np.arange(24).reshape(2, 3, 4)
    rows = to_rows(array, axes)
    assert len(rows) == np.prod([array.shape[axis] for axis in axes], dtype=int)
    np.testing.assert_array_equal(from_rows(rows, axes, array.shape), array)


def test_a_row_for_each_output_channel():
    np.testing.assert_array_equal(to_rows(np.array([[1, 2], [3, 4]]), (1,)), [[1, 3], [2, 4]])


def test_shorter_rows_repeat_their_last_value():
    np.testing.assert_array_equal(pad_rows([np.array([1.0, 2.0]), np.array([3.0])]), [[1, 2], [3, 3]])
    assert pad_rows([np.array([1.0])], 3).shape == (1, 3)


def test_clusters_of_a_whole_kernel():
    kernel = np.array([[0.5, -1.0, 0.5, 0.0], [-1.0, 0.5, 0.0, 0.5]], "float32")
    found = find_clusters(kernel, (1,))
    np.testing.assert_array_equal(found.centroids, [[-1.0, 0.0, 0.5]])
    np.testing.assert_array_equal(found.assignment, [[2, 0, 2, 1], [0, 2, 1, 2]])
    np.testing.assert_array_equal(found.values(), kernel)
    assert found.axes == ()


def test_clusters_of_each_output_channel():
    """As batch-norm folding leaves them: each channel has a factor of its own."""
    rng = np.random.default_rng(0)
    kernel = rng.choice([-1.0, 0.5, 2.0], (8, 16)).astype("float32") * rng.normal(size=16).astype("float32")
    found = find_clusters(kernel, (1,))
    assert (found.axes, found.centroids.shape) == ((1,), (16, 3))
    np.testing.assert_array_equal(found.values(), kernel)


@pytest.mark.parametrize(
    "kernel",
    [
        np.random.default_rng(0).normal(size=(3, 3, 4, 8)),
        np.where(np.random.default_rng(0).random((8, 64)) < 0.97, 0, np.random.default_rng(1).normal(size=(8, 64))),
        np.zeros((4, 4)),
        np.ones((4, 4)),
        np.full((4, 4), np.nan),
        np.repeat(np.arange(300.0), 4).reshape(30, 40),
        np.zeros((0, 4)),
    ],
    ids=["dense", "pruned", "zeros", "constant", "nan", "too many", "empty"],
)
def test_what_is_not_clustered(kernel):
    assert find_clusters(kernel) is None
