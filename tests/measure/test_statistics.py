"""Intervals against values worked out by hand or by SciPy, and how often they cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.measure import statistics


def test_wilson_known_values():
    assert statistics.wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert statistics.wilson_interval(0, 20) == pytest.approx((0.0, 0.161125), abs=1e-6)
    assert statistics.wilson_interval(20, 20) == pytest.approx((0.838875, 1.0), abs=1e-6)
    assert statistics.wilson_interval(0, 0) is None


def test_paired_interval_by_hand():
    # b' = 30.5, c' = 20.5, n' = 1002: -10/1002 -+ 1.959964 * sqrt(51 - 100/1002) / 1002
    expected = (-0.0099800 - 0.0139553, -0.0099800 + 0.0139553)
    assert statistics.paired_difference_interval(30, 20, 1000) == pytest.approx(expected, abs=1e-6)
    assert statistics.paired_difference_interval(0, 0, 0) is None


@pytest.mark.parametrize(("lost", "gained", "p"), [(0, 0, 1.0), (5, 5, 1.0), (10, 2, 0.0385742), (205, 121, 3.79e-6)])
def test_mcnemar_is_the_exact_binomial_test(lost, gained, p):
    assert statistics.mcnemar_p(lost, gained) == pytest.approx(p, rel=0.01)
    assert statistics.mcnemar_p(gained, lost) == statistics.mcnemar_p(lost, gained)


def test_mcnemar_of_many_samples_is_finite():
    assert 0 < statistics.mcnemar_p(24_000, 24_900) < 1e-4


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (30, 2.04227)]
)
def test_student_quantile_is_within_one_percent(degrees, quantile):
    assert statistics.student_quantile(0.975, degrees) == pytest.approx(quantile, rel=0.01)


def test_mean_interval_by_hand():
    # mean 2, standard deviation 1, t(0.975; 2) = 4.30265
    half = 4.30265 / math.sqrt(3)
    assert statistics.mean_interval([1, 2, 3]) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert statistics.mean_interval([1.0]) is None


def test_median_interval_between_ranks():
    # By hand from binomial tables: ranks 2 and 9 cover 97.85 % for n = 10, ranks 3 and 8 cover 89.06 %.
    assert statistics.median_interval(range(1, 11)) == pytest.approx((2.6576, 8.3424), abs=1e-4)
    assert statistics.median_interval(range(1, 101)) == pytest.approx((40.764, 60.236), abs=0.01)
    assert statistics.median_interval(range(1, 7)) == pytest.approx((1.357, 5.643), abs=1e-3)
    assert statistics.median_interval(range(5)) is None  # cannot reach 95 %
    assert statistics.median_interval([]) is None


@pytest.mark.parametrize(("share", "needed"), [(0.5, 20), (0.9, 100), (0.99, 1000)])
def test_percentile_needs_ten_values_above_it(share, needed):
    assert statistics.percentile_support(share) == needed
    assert statistics.supported_percentile(np.arange(needed - 1), share) is None
    assert statistics.supported_percentile(np.arange(needed), share) == pytest.approx(share * (needed - 1))


def test_share_interval_of_sequences_counts_samples_not_positions():
    right = np.repeat([1.0, 0.0, 1.0, 0.0], 5)
    assert statistics.share_interval(right) == statistics.wilson_interval(10, 20)
    uneven = np.tile([0.25, 0.75], 10)
    assert statistics.share_interval(uneven) == pytest.approx((0.37995, 0.62005), abs=1e-4)
    assert statistics.share_interval(np.full(8, 0.5)) == statistics.wilson_interval(4, 8)


@given(st.integers(1, 400), st.data())
def test_intervals_hold_their_estimate(n, data):
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    low, high = statistics.wilson_interval(lost, n)
    assert 0 <= low <= lost / n <= high <= 1
    low, high = statistics.paired_difference_interval(lost, gained, n)
    assert -1 <= low <= high <= 1
    mirrored = statistics.paired_difference_interval(gained, lost, n)
    assert mirrored == pytest.approx((-high, -low))


def _pairs(rng, processes, truth, process_sd):
    return [rng.normal(truth + rng.normal(0, process_sd), 0.05, 60) for _ in range(processes)]


def test_ratio_of_constant_pairs_is_exact():
    ratio, interval = statistics.ratio_interval([np.full(30, math.log(2))] * 3)
    assert (ratio, *interval) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize(("processes", "process_sd"), [(1, 0.0), (3, 0.0), (3, 0.01), (5, 0.0), (5, 0.01), (10, 0.01)])
def test_ratio_interval_covers_the_truth(processes, process_sd):
    rng = np.random.default_rng(7)
    found = [statistics.ratio_interval(_pairs(rng, processes, 0.1, process_sd))[1] for _ in range(4000)]
    assert _covered(found, math.exp(0.1)) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    ("n", "lost", "gained"), [(500, 0.03, 0.01), (500, 0.02, 0.02), (2000, 0.015, 0.015), (10_000, 0.02, 0.015)]
)
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_paired_interval_covers_the_truth(n, lost, gained, confidence):
    rng = np.random.default_rng(11)
    counts = rng.multinomial(n, (lost, gained, 1 - lost - gained), size=100_000).tolist()
    known = {(b, c): statistics.paired_difference_interval(b, c, n, confidence) for b, c, _ in counts}
    assert _covered([known[b, c] for b, c, _ in counts], gained - lost) == pytest.approx(confidence, abs=0.01)


@pytest.mark.parametrize(("n", "share"), [(200, 0.9), (500, 0.87), (1000, 0.9), (2000, 0.95), (10_000, 0.87)])
def test_wilson_interval_covers_the_truth(n, share):
    counts = np.random.default_rng(3).binomial(n, share, 20_000)
    known = {count: statistics.wilson_interval(int(count), n) for count in set(counts.tolist())}
    assert _covered([known[count] for count in counts.tolist()], share) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("n", [40, 200])
def test_median_interval_covers_the_truth(n):
    rng = np.random.default_rng(5)
    found = [statistics.median_interval(rng.exponential(size=n)) for _ in range(8000)]
    assert _covered(found, math.log(2)) == pytest.approx(0.95, abs=0.01)


def test_mean_interval_covers_the_truth():
    rng = np.random.default_rng(5)
    found = [statistics.mean_interval(rng.exponential(size=500)) for _ in range(8000)]
    assert _covered(found, 1.0) == pytest.approx(0.95, abs=0.01)


def _covered(intervals, truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))
