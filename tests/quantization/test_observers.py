"""Ranges from batches of values."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compress.errors import DataError, UsageError
from compress.quantization.arithmetic import activation_scale
from compress.quantization.observers import ObserverKind, RangeObserver

KINDS = get_args(ObserverKind)


def observe(kind, *batches, **options):
    observer = RangeObserver(kind, **options)
    for batch in batches:
        observer.update(np.asarray(batch, "float32"))
    return observer


def mean_squared_error(values, low, high, bits, symmetric=False):
    scale, zero_point = activation_scale(low, high, bits, symmetric)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = np.clip(np.round(values / scale), lowest - zero_point, highest - zero_point)
    return float(np.mean((steps * scale - values) ** 2))


def test_min_max_and_moving():
    batches = [[-1.0, 2.0]], [[-3.0, 1.0]], [[0.5, 0.7]]
    assert observe("min-max", *batches).result() == (-3.0, 2.0)
    low, high = observe("moving", *batches, momentum=0.5).result()
    assert (low, high) == pytest.approx((-0.75, 1.1))
    assert observe("min-max", [[2.0, 3.0]]).result() == (0.0, 3.0)
    assert observe("min-max", [[-2.0, -3.0]]).result() == (-3.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0] * 10, (0, 3)), ([-0.5] * 3, (-0.5, 0)), ([0.0] * 4, (0, 0)), ([1e-20], (0, 1e-20)), ([2e30], (0, 2e30))],
)
def test_constants_zeros_and_a_single_value(kind, values, expected):
    assert observe(kind, values, values).result() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
@given(values=arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e4, 1e4, width=32)))
@settings(max_examples=15, deadline=None)
def test_ranges_lie_within_what_was_seen(kind, bits, symmetric, values):
    low, high = observe(kind, values[::2], values).result(bits, symmetric)
    assert min(values.min(), 0) <= low <= 0 <= high <= max(values.max(), 0)
    if kind in ("min-max", "percentile"):  # of so few values, none are cut off
        assert (low, high) == pytest.approx((min(values.min(), 0), max(values.max(), 0)), rel=1e-3, abs=1e-3 * 1e4)


def test_percentile_cuts_both_ends():
    values = np.random.default_rng(0).permutation(np.arange(-5000, 5001)) / 1000
    low, high = observe("percentile", values[:3000], values[3000:], percentile=99.0).result()
    assert (low, high) == pytest.approx((-4.9, 4.9), abs=0.005)
    zeros = np.zeros(99_995)
    assert observe("percentile", zeros, [1.0] * 5, percentile=99.9).result() == (0.0, 0.0)
    low, high = observe("percentile", zeros[:995], [1.0] * 5, percentile=99.9).result()
    assert (low, high) == pytest.approx((0.0, 1.0), rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", ["normal", "relu", "leaky", "one outlier"])
def test_mse_is_near_the_best_of_a_brute_force_search(bits, symmetric, shape):
    rng = np.random.default_rng(1)
    values = rng.normal(size=20_000).astype("float32")
    if shape == "relu":
        values = np.maximum(values, 0)
    elif shape == "leaky":
        values = np.where(values < 0, values * 0.1, values)
    elif shape == "one outlier":
        values[7] = 40
    found = mean_squared_error(values, *observe("mse", values).result(bits, symmetric), bits, symmetric)
    least = min(
        mean_squared_error(values, max(values.min(), -reach), min(values.max(), reach), bits, symmetric)
        for reach in np.linspace(0.05, 1, 200) * np.abs(values).max()
    )
    assert found <= 1.03 * least


def test_mse_and_entropy_cut_outliers_that_min_max_keeps():
    values = np.random.default_rng(0).laplace(size=50_000).astype("float32")
    values[3] = 60
    for kind in ("mse", "entropy"):
        low, high = observe(kind, values).result(bits=4)
        assert high < 20
        assert low < -2
        assert high > 2
    assert observe("min-max", values).result(bits=4)[1] == 60


def test_entropy_of_skewed_values_uses_both_signs():
    values = np.random.default_rng(0).normal(size=50_000).astype("float32")
    low, high = observe("entropy", np.where(values < 0, values * 0.1, values)).result(bits=4)
    assert low == pytest.approx(values.min() * 0.1, rel=1e-3)
    assert 2 < high < values.max()


def test_growing_ranges_count_as_if_all_came_at_once():
    values = np.random.default_rng(0).normal(size=8000).astype("float32")
    ordered = values[np.argsort(np.abs(values))]
    for kind in ("percentile", "mse"):
        together = observe(kind, ordered).result(bits=4)
        apart = observe(kind, *np.split(ordered, 16)).result(bits=4)
        assert apart == pytest.approx(together, rel=0.05)


def test_large_batches_are_sampled_over_all_channels():
    values = np.zeros((64, 64, 64, 8), "float32")
    values[..., 5] = np.random.default_rng(0).uniform(-1, 1, values.shape[:-1])
    low, high = observe("percentile", values, percentile=99.0).result()
    assert (low, high) == pytest.approx((-0.84, 0.84), abs=0.02)  # 8 % of a channel out of eight is 1 % of all


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_refused(kind):
    for wrong, name in ((np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")):
        with pytest.raises(DataError, match=name):
            observe(kind, [1.0, wrong, 2.0])
    with pytest.raises(DataError, match="at least one value"):
        observe(kind, []).result()


def test_settings_are_checked():
    with pytest.raises(UsageError, match="min-max, moving"):
        RangeObserver("max")
    with pytest.raises(UsageError, match="percentile"):
        RangeObserver("percentile", percentile=10)
    with pytest.raises(UsageError, match="momentum"):
        RangeObserver("moving", momentum=1)
