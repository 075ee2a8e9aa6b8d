"""Distributions: exact totals, the papers' formulas on small kernels, and sparsities by pattern."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.pruning.distributions import DISTRIBUTIONS, ScoredKernel, find_distribution

SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple), min_size=1, max_size=5)
SPARSITY = st.floats(0, 1, exclude_max=True)


def kernels_of(*scores, shapes=None):
    arrays = [np.asarray(each, np.float32) for each in scores]
    shapes = [array.shape for array in arrays] if shapes is None else shapes
    return [
        ScoredKernel(f"{name}/kernel", shape, array)
        for name, shape, array in zip("abcde", shapes, arrays, strict=False)
    ]


def counts_of(name, kernels, sparsity):
    return DISTRIBUTIONS[name].function(kernels, sparsity)


def test_uniform_and_global():
    kernels = kernels_of([0.1, 0.2], [1, 2, 3, 4])
    assert counts_of("uniform", kernels, 0.5) == [1, 2]
    assert counts_of("global", kernels, 1 / 6) == [1, 0]
    assert counts_of("global", kernels, 0.5) == [1, 2]  # the best weight of the first kernel stays
    assert counts_of("global", kernels, 0.99) == [2, 4]  # no weight for each kernel is left


def test_erk_by_hand():
    # Densities are as 6 / 8 (2 x 4) to 20 / 96 (8 x 12): 8 and 96 weights, 26 to keep: scale 1 would keep 6 + 20.
    kernels = kernels_of(np.ones((2, 4)), np.ones((8, 12)))
    assert counts_of("erk", kernels, 0.75) == [2, 76]
    # 54 to keep: the first would keep 12.5 of its 8, so it stays whole and the second keeps 46 of 96.
    assert counts_of("erk", kernels, 1 - 54 / 104) == [0, 50]


def test_lamp_by_hand():
    # Squares 1, 4, 5 -> 1/10, 4/9, 1; squares 1, 1, 98 -> 1/100, 1/99, 1.
    kernels = kernels_of([1, 2, 5**0.5], [1, 98**0.5, 1])
    assert [counts_of("lamp", kernels, n / 6) for n in range(5)] == [[0, 0], [0, 1], [0, 2], [1, 2], [2, 2]]
    scaled = kernels_of([1e-30, 2e-30, 5**0.5 * 1e-30], [1e30, 98**0.5 * 1e30, 1e30])  # squares would overflow
    assert [counts_of("lamp", scaled, n / 6) for n in range(5)] == [[0, 0], [0, 1], [0, 2], [1, 2], [2, 2]]


def test_lamp_with_pruned_infinite_and_negative_scores():
    kernels = kernels_of([-np.inf, -np.inf, 3, 1], [np.inf, 1, 2, np.inf])
    assert counts_of("lamp", kernels, 0.5) == [2, 2]
    with pytest.raises(UsageError, match=r"at least 0\. Received: a negative one in a/kernel"):
        counts_of("lamp", kernels_of([-1, 2]), 0.5)


@given(SHAPES, SPARSITY, st.sampled_from(["global", "erk", "lamp"]), st.booleans(), st.integers(0, 9))
def test_totals_are_exact_and_no_kernel_is_emptied(shapes, sparsity, name, constant, seed):
    random = np.random.default_rng(seed)
    kernels = kernels_of(*(np.ones(s) if constant else random.integers(0, 4, s) for s in shapes))
    counts = counts_of(name, kernels, sparsity)
    sizes = [kernel.size for kernel in kernels]
    total = round(sparsity * sum(sizes))
    assert sum(counts) == total
    room = 1 if total <= sum(sizes) - len(sizes) else 0
    assert all(0 <= count <= size - room for count, size in zip(counts, sizes, strict=True))


@given(SHAPES, SPARSITY, SPARSITY)
def test_erk_follows_the_formula(shapes, first, second):
    kernels = kernels_of(*(np.ones(shape) for shape in shapes))
    low, high = (counts_of("erk", kernels, sparsity) for sparsity in sorted((first, second)))
    assert all(a <= b + 1 for a, b in zip(low, high, strict=True))  # grows with the sparsity, but for rounding
    sizes = np.array([kernel.size for kernel in kernels])
    density = 1 - np.array(high) / sizes
    scale = density * sizes / np.array([sum(kernel.shape) for kernel in kernels])
    inner = (np.array(high) > 1) & (np.array(high) < sizes - 1)  # neither whole nor nearly empty
    if inner.sum() > 1:
        slack = 2 / np.array([sum(kernel.shape) for kernel in kernels])[inner]
        assert np.ptp(scale[inner]) <= slack.max() + 1e-9


def test_by_pattern():
    paths = ["stem/kernel", "body/conv1/kernel", "body/conv2/kernel", "head/kernel"]
    table = {"body/conv1": 0.9, "body/*": 0.5, "head": 0}
    kernels = [ScoredKernel(path, (10, 10), np.ones((10, 10))) for path in paths]
    final = find_distribution(table, paths, 0.8, 0.8)
    assert final.function(kernels, 0.8) == [80, 90, 50, 0]
    half_way = find_distribution(table, paths, 0.4, 0.8)
    assert half_way.function(kernels, 0.4) == [40, 45, 25, 0]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("best", r"one of \['uniform', 'global', 'erk', 'lamp', 'sensitivity'\].*Received: 'best'"),
        ({"conv": 0.5}, "distribution: the pattern matches no layer. Received: 'conv'"),
        ({"stem": 1.0}, "the sparsity of 'stem' at least 0 and less than 1. Received: sparsity=1.0"),
        ({"*": 0.5, "stem": 0.8}, "an earlier pattern takes every kernel of this one. Received: 'stem'"),
    ],
    ids=str,
)
def test_refused(table, said):
    with pytest.raises(UsageError, match=said):
        find_distribution(table, ["stem/kernel", "head/kernel"], 0.5, 0.5)
    with pytest.raises(UsageError, match="Received: sparsity=0"):
        find_distribution({"stem": 0.5}, ["stem/kernel"], 0, 0)
