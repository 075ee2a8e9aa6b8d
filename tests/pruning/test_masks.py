"""Masks hit the requested sparsity exactly, whatever the weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.errors import UsageError
from compress.pruning.masks import magnitude_mask, magnitude_masks

# Few distinct values, so that ties are the rule.
TIED = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=4, max_side=6), elements=st.sampled_from([-2, -1, -0.0, 0, 1, 2])
)
ANY = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=8), elements=st.floats(width=32, allow_nan=False))
SPARSITY = st.floats(0, 1, exclude_max=True)


def test_smallest_magnitudes_are_pruned():
    weights = np.array([[0.5, -0.1], [-3.0, 0.2]], np.float32)
    assert magnitude_mask(weights, 0.5).tolist() == [[True, False], [True, False]]


def test_ties_go_by_index_and_zeros_first():
    assert magnitude_mask(np.array([1, -1, 1, -1], np.float32), 0.5).tolist() == [False, False, True, True]
    assert magnitude_mask(np.array([1, 0, -1, -0.0], np.float32), 0.5).tolist() == [True, False, True, False]
    assert magnitude_mask(np.zeros(4, np.float32), 0.25).tolist() == [False, True, True, True]


def test_global_ranks_kernels_together():
    small, large = np.array([0.1, 0.2], np.float32), np.array([1, 2, 3, 4], np.float32)
    masks = magnitude_masks([small, large], 0.5, "global")
    assert [mask.tolist() for mask in masks] == [[False, False], [False, True, True, True]]
    uniform = magnitude_masks([small, large], 0.5)
    assert [mask.tolist() for mask in uniform] == [[False, True], [False, False, True, True]]


def test_infinite_weights_are_kept():
    assert magnitude_mask(np.array([np.inf, 1, -np.inf, 2], np.float32), 0.5).tolist() == [
        True,
        False,
        True,
        False,
    ]


@given(st.one_of(TIED, ANY), SPARSITY)
def test_exact_sparsity_of_one_kernel(weights, sparsity):
    mask = magnitude_mask(weights, sparsity)
    assert mask.shape == weights.shape
    assert np.count_nonzero(~mask) == round(sparsity * weights.size)
    magnitudes = np.abs(weights)
    assert not mask.any() or mask.all() or magnitudes[~mask].max() <= magnitudes[mask].min()


@given(st.lists(TIED, min_size=1, max_size=4), SPARSITY)
def test_exact_sparsity_of_all_kernels_together(weights, sparsity):
    masks = magnitude_masks(weights, sparsity, "global")
    pruned = sum(np.count_nonzero(~mask) for mask in masks)
    assert pruned == round(sparsity * sum(each.size for each in weights))


@given(TIED, SPARSITY, SPARSITY)
def test_more_sparsity_prunes_the_same_weights_and_more(weights, first, second):
    low, high = sorted((first, second))
    mask = magnitude_mask(weights, low)
    again = magnitude_mask(np.where(mask, weights, 0), high)
    zeros = (weights == 0) | ~mask
    assert np.count_nonzero(~again & zeros) == min(np.count_nonzero(~again), np.count_nonzero(zeros))


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan"), "80%", None, True])
def test_impossible_sparsity(sparsity):
    with pytest.raises(UsageError, match="Received: sparsity="):
        magnitude_mask(np.ones(3), sparsity)


def test_nan_and_unknown_distribution_are_refused():
    with pytest.raises(UsageError, match="NaN"):
        magnitude_mask(np.array([1.0, np.nan]), 0.5)
    with pytest.raises(UsageError, match=r"\['global', 'uniform'\].*'erk'"):
        magnitude_masks([np.ones(2)], 0.5, "erk")


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_other_dtypes(dtype):
    assert magnitude_mask(np.array([3, -2, 1, -128 if dtype == "int8" else 4], dtype), 0.5).tolist() == [
        True,
        False,
        False,
        True,
    ]
