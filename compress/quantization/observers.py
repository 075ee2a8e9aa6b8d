"""Ranges of activations from batches of samples: extremes, percentiles, and the range that loses least when rounded.

Entropy follows Migacz 2017 ("8-bit inference with TensorRT"), made for grids with any zero point. NumPy only; memory
and time per batch are bounded whatever the number of samples.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from compress.errors import DataError, UsageError
from compress.quantization.arithmetic import activation_scale, integer_limits

ObserverKind = Literal["min-max", "moving", "percentile", "entropy", "mse"]
"""How a range comes from values.

- `min-max`: least and greatest value.
- `moving`: moving average of each batch's least and greatest value, as in training.
- `percentile`: all but a small part of the values at either end.
- `entropy`: the range whose rounded distribution diverges least from the true one (Kullback-Leibler).
- `mse`: the range with the least mean squared error, of rounding and clipping together.
"""

_BINS = 8192
_HEADROOM = 1.5
_VALUES_PER_UPDATE = 2**17
_CANDIDATES = 64
_UNSEEN = 1e-8  # probability of what the rounded distribution cannot show

Range = tuple[float, float]


class RangeObserver:
    """Collects values of one tensor and says which range to quantize.

    Args:
        kind: see `ObserverKind`.
        percentile: per cent of the values that `percentile` keeps at either end, more than 50.
        momentum: weight of the past in the `moving` average, at least 0 and less than 1.

    Raises:
        UsageError: a value outside of what is said above.
    """

    def __init__(self, kind: ObserverKind = "min-max", percentile: float = 99.99, momentum: float = 0.9):
        if kind not in get_args(ObserverKind):
            raise UsageError(f"expected an observer out of {', '.join(get_args(ObserverKind))}. Received: {kind!r}")
        if not 50 < percentile <= 100:
            raise UsageError(f"expected percentile more than 50 and at most 100. Received: percentile={percentile!r}")
        if not 0 <= momentum < 1:
            raise UsageError(f"expected momentum at least 0 and less than 1. Received: momentum={momentum!r}")
        self._kind = kind
        self._percentile = percentile
        self._momentum = momentum
        self._extremes: Range | None = None
        self._average: Range | None = None
        self._histogram = _Histogram() if kind in ("percentile", "entropy", "mse") else None

    def update(self, values: np.ndarray) -> None:
        """Take in a batch of any shape; an empty one changes nothing.

        Raises:
            DataError: a value is NaN or infinite.
        """
        values = np.asarray(values)
        values = values.ravel() if values.dtype == np.float32 else values.astype("float32").ravel()
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())  # both carry NaN on
        if not (math.isfinite(low) and math.isfinite(high)):
            wrong = "NaN" if math.isnan(low) or math.isnan(high) else "infinity"
            raise DataError(
                f"expected finite values. Received: {wrong}", "Look for NaN in the data and in the weights."
            )
        old = self._extremes or (low, high)
        self._extremes = min(old[0], low), max(old[1], high)
        old = self._average or (low, high)
        self._average = tuple(
            self._momentum * a + (1 - self._momentum) * b for a, b in zip(old, (low, high), strict=True)
        )
        if self._histogram is not None:
            self._histogram.add(values, max(-low, high))

    def result(self, bits: int = 8, symmetric: bool = False) -> Range:
        """Return `(minimum, maximum)`, which include 0 and lie within what was observed.

        Args:
            bits: 2 to 8, or 16, of the grid to round to; `entropy` and `mse` take all that was observed at 16.
            symmetric: the zero point of that grid is 0.

        Raises:
            DataError: nothing was observed.
        """
        if self._extremes is None:
            raise DataError("expected at least one value. Received: none", "Calibrate with samples.")
        low, high = self._average if self._kind == "moving" else self._extremes
        observed = min(low, 0.0), max(high, 0.0)
        if self._histogram is None or self._histogram.is_empty:
            return observed
        if self._kind == "percentile":
            low, high = self._histogram.quantiles(self._percentile / 100)
            return max(low, observed[0]), min(high, observed[1])
        if bits > 8:
            return observed
        search = _least_divergence if self._kind == "entropy" else _least_squares
        return search(self._histogram, observed, bits, symmetric)


class _Histogram:
    """Counts of values in even bins on both sides of 0; exact zeros, which any grid holds, are counted apart."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.zeros = 0
        self.limit = 0.0

    @property
    def is_empty(self) -> bool:
        return not self.counts.any()

    @property
    def edges(self) -> np.ndarray:
        return np.linspace(-self.limit, self.limit, _BINS + 1)

    def add(self, values: np.ndarray, peak: float) -> None:
        """Count `values`, or of many an even part; `peak` is the greatest magnitude among all of them."""
        values = values[:: _stride(values.size)]
        others = values[values != 0]
        self.zeros += values.size - others.size
        if not others.size:
            return
        self._make_room(peak)
        # In float64 a tiny or huge limit overflows nothing, and rounding cannot move a value to the wrong side of 0.
        places = np.floor(others * np.float64(_BINS / 2 / self.limit)).astype(np.int32) + _BINS // 2
        self.counts += np.bincount(np.minimum(places, _BINS - 1), minlength=_BINS)

    def quantiles(self, kept: float) -> Range:
        """Return the least range of bins such that `kept` of all values lie below its end, and above its start."""
        target = kept * (self.counts.sum() + self.zeros)
        edges = self.edges
        below = np.cumsum(self.counts)
        below[_BINS // 2 - 1 :] += self.zeros
        above = np.cumsum(self.counts[::-1])[::-1]
        above[: _BINS // 2 + 1] += self.zeros
        high = edges[np.argmax(below >= target) + 1]
        low = edges[_BINS - 1 - np.argmax(above[::-1] >= target)]
        return float(min(low, 0.0)), float(max(high, 0.0))

    def _make_room(self, peak: float) -> None:
        """Double the bins' width until `peak` fits; pairs of bins become one, so nothing is lost."""
        if not self.limit:
            self.limit = peak * _HEADROOM
        while peak > self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(merged, _BINS // 4)
            self.limit *= 2


def _stride(size: int) -> int:
    """Return a step through `size` values that keeps enough of them and meets every channel alike."""
    step = -(-size // _VALUES_PER_UPDATE)
    while math.gcd(step, size) != 1:  # a divisor of the size may be a multiple of the channels
        step += 1
    return step


def _least_divergence(histogram: _Histogram, observed: Range, bits: int, symmetric: bool) -> Range:
    """Return the range with the least KL divergence; ranges shrink from both ends to the same magnitude."""
    levels = 2**bits - 1
    centre, width = _BINS // 2, 2 * histogram.limit / _BINS
    used = np.flatnonzero(histogram.counts)
    first, last = min(used[0], centre), max(used[-1] + 1, centre)
    most = max(centre - first, last - centre)
    best, least = observed, math.inf
    for reach in np.unique(np.linspace(1, most, 2 * _CANDIDATES).astype(int))[::-1]:
        start, end = max(first, centre - reach), min(last, centre + reach)
        grid = 2 * reach if symmetric else end - start
        if grid < levels:
            break  # bins are wider than steps: rounding would seem to be free
        divergence = _divergence(histogram.counts, start, end, grid, levels)
        if divergence < least:
            least = divergence
            best = max((start - centre) * width, observed[0]), min((end - centre) * width, observed[1])
    return best


def _divergence(counts: np.ndarray, start: int, end: int, grid: int, levels: int) -> float:
    """Return KL(true || rounded) over the bins of a range: what is outside belongs to the ends of the true one only."""
    inside = counts[start:end]
    if not inside.any():
        return math.inf
    true = inside.astype(np.float64)
    true[0] += counts[:start].sum()
    true[-1] += counts[end:].sum()
    true /= true.sum()

    level = (np.arange(end - start) * levels) // grid
    filled = inside > 0
    share = np.bincount(level, inside) / np.maximum(np.bincount(level, filled), 1)
    rounded = np.where(filled, share[level], 0.0)
    rounded = np.maximum(rounded / rounded.sum(), _UNSEEN)
    present = true > 0
    return float(np.sum(true[present] * np.log(true[present] / rounded[present])))


def _least_squares(histogram: _Histogram, observed: Range, bits: int, symmetric: bool) -> Range:
    """Return the range with the least squared error: both ends shrink together, then each for itself."""
    used = np.flatnonzero(histogram.counts)
    values = ((used + 0.5) * (2 * histogram.limit / _BINS) - histogram.limit).astype("float32")
    weights = (histogram.counts[used] / histogram.counts.sum()).astype("float32")

    def choose(lows: np.ndarray, highs: np.ndarray) -> Range:
        errors = _squared_errors(values, weights, lows, highs, bits, symmetric)
        best = int(np.argmin(errors))
        return float(lows[best]), float(highs[best])

    parts = np.linspace(1.0, 1.0 / _CANDIDATES, _CANDIDATES)  # the widest first: it wins ties
    reach = max(-observed[0], observed[1]) * parts
    low, high = choose(np.maximum(observed[0], -reach), np.minimum(observed[1], reach))
    near = np.concatenate([[1.0], np.linspace(1.25, 0.5, _CANDIDATES)])
    for _ in range(2):
        highs = np.minimum(high * near, observed[1])
        low, high = choose(np.full_like(highs, low), highs)
        lows = np.maximum(low * near, observed[0])
        low, high = choose(lows, np.full_like(lows, high))
    return low, high


def _squared_errors(
    values: np.ndarray, weights: np.ndarray, lows: np.ndarray, highs: np.ndarray, bits: int, symmetric: bool
) -> np.ndarray:
    """Return the mean squared error of rounding `values` to the grid of each range."""
    # Relative to the largest magnitude: squares of tiny or huge values would leave float32.
    largest = np.abs(values).max()
    values, lows, highs = values / largest, (lows / largest).astype("float32"), (highs / largest).astype("float32")
    scale, zero_point = activation_scale(lows[:, None], highs[:, None], bits, symmetric)
    lowest, highest = integer_limits(bits)
    errors = values * (1 / scale)  # one array in place: these few lines are most of a calibration's time
    np.rint(errors, out=errors)
    np.clip(errors, lowest - zero_point, highest - zero_point, out=errors)
    errors *= scale
    errors -= values
    return np.square(errors, out=errors) @ weights
