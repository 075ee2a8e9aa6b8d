"""Confidence intervals and tests for what is measured: shares, paired drops, medians and latency ratios.

Every interval is a pair `(low, high)`, or `None` where the sample is too small to say anything. Sources:
Wilson 1927 (shares), Agresti and Min 2005 (paired differences), McNemar 1947 in its exact form, Hettmansperger and
Sheather 1986 (medians). NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]

_TAIL_SAMPLES = 10


def normal_quantile(probability: float) -> float:
    """Return the quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)


def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t with `degrees` >= 1 of freedom, within 1 % (exact for 1 and 2).

    Series of Abramowitz and Stegun 26.7.5 in the normal quantile.
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    z = normal_quantile(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval | None:
    """Return the Wilson score interval of the share `successes / n`, or `None` for `n == 0`."""
    if n == 0:
        return None
    z = normal_quantile(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def paired_difference_interval(lost: int, gained: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Return the Agresti-Min interval of `(gained - lost) / n`, the change of a share on the same samples.

    Args:
        lost: samples right before and wrong now.
        gained: samples wrong before and right now.
        n: all samples; 0 gives `None`.
        confidence: two-sided level.
    """
    if n == 0:
        return None
    b, c, total = lost + 0.5, gained + 0.5, n + 2
    centre = (c - b) / total
    half = normal_quantile(0.5 + confidence / 2) * math.sqrt(b + c - (c - b) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def mcnemar_p(lost: int, gained: int) -> float:
    """Return the exact two-sided McNemar p-value: could `lost` and `gained` samples be a fair coin's work?"""
    return min(1.0, 2 * float(_fair_coin_cdf(lost + gained)[min(lost, gained)]))


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval | None:
    """Return Student's t interval of the mean of `values`, or `None` for fewer than two."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    half = (
        student_quantile(0.5 + confidence / 2, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    )
    mean = float(np.mean(values))
    return mean - half, mean + half


def share_interval(values: np.ndarray, confidence: float = 0.95) -> Interval | None:
    """Return the interval of the mean of per-sample shares in `[0, 1]`.

    Wilson's where each sample is right or wrong. Where a sample is a sequence of positions, these are not
    independent, so the sample is the unit and the interval is that of a mean.
    """
    values = np.asarray(values, np.float64)
    if np.isin(values, (0.0, 1.0)).all() or np.ptp(values) == 0:
        return wilson_interval(float(values.sum()), len(values), confidence)
    interval = mean_interval(values, confidence)
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))


def median_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval | None:
    """Return the interval of the median, or `None` where values are too few.

    Order statistics alone cover more than is asked for, as ranks are whole numbers; so it lies between two ranks, after
    Hettmansperger and Sheather 1986.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    if n == 0:
        return None
    tails = _fair_coin_cdf(n)
    rank = int(np.searchsorted(tails, (1 - confidence) / 2, side="right"))
    if rank == 0:
        return None
    if 2 * rank >= n:
        return float(ordered[rank - 1]), float(ordered[-rank])
    outer, inner = 1 - 2 * tails[rank - 1], 1 - 2 * tails[rank]
    share = (outer - confidence) / (outer - inner)
    weight = (n - rank) * share / (rank + (n - 2 * rank) * share)
    low = (1 - weight) * ordered[rank - 1] + weight * ordered[rank]
    high = (1 - weight) * ordered[-rank] + weight * ordered[-rank - 1]
    return float(low), float(high)


def percentile_support(share: float) -> int:
    """Return how many values the percentile `share`, such as 0.99, needs: ten above it."""
    return math.ceil(_TAIL_SAMPLES / (1 - share) - 1e-9)


def supported_percentile(values: Sequence[float] | np.ndarray, share: float) -> float | None:
    """Return the percentile `share` of `values`, or `None` unless at least ten values lie above it.

    The p99 of twenty runs is only their maximum.
    """
    return float(np.quantile(values, share)) if len(values) >= percentile_support(share) else None


def ratio_interval(log_ratios: Sequence[np.ndarray], confidence: float = 0.95) -> tuple[float, Interval]:
    """Return the typical ratio and its interval, from what each of a few processes found.

    Each process has a median of its own, and these scatter by more than the pairs within one would let expect: memory
    lies elsewhere, a clock has changed. So a process is the unit, and the interval is Student's over their medians. One
    process speaks for itself only, by the interval of its median.

    Args:
        log_ratios: one array per process with the log of each pair's ratio; none may be empty.
        confidence: two-sided level.
    """
    medians = np.array([np.median(values) for values in log_ratios])
    if len(medians) > 1:
        low, high = mean_interval(medians, confidence)
    else:
        low, high = median_interval(log_ratios[0], confidence) or (np.min(log_ratios[0]), np.max(log_ratios[0]))
    return math.exp(np.mean(medians)), (math.exp(low), math.exp(high))


def _fair_coin_cdf(n: int) -> np.ndarray:
    """Return P(heads <= k) of `n` fair tosses for k = 0 .. n."""
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return np.cumsum(np.exp(log_factorials[-1] - log_factorials - log_factorials[::-1] - n * math.log(2)))
