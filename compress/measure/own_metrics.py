"""Metrics that users bring as functions, such as a mean average precision of boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from compress.data.factories import check_allowed, find_function
from compress.data.split import flatten_arrays
from compress.errors import DataError
from compress.measure import statistics
from compress.measure.results import Change, Interval, Metric

MetricFunction = Callable[[list[np.ndarray], list[np.ndarray]], Any]
"""`function(labels, outputs)`: one array `(samples, ...)` for each output, in lists; returns a number for all samples,
or `(samples,)`, one for each. Higher is better, unless the function has the attribute `higher_is_better = False`."""

_BLOCKS = 20


def find_metrics(references: Mapping[str, str], allow_imports: Sequence[str]) -> dict[str, MetricFunction]:
    """Return the functions that `module:function` names, by metric.

    Args:
        references: by the name of the metric.
        allow_imports: packages whose code may run.

    Raises:
        RecipeError: a package is not allowed, or there is no such function.
        DataError: importing its module raised an error.
    """
    for reference in references.values():
        check_allowed(reference, tuple(allow_imports))
    return {name: find_function(reference) for name, reference in references.items()}


def evaluate_function(
    name: str,
    function: MetricFunction,
    labels: Any,
    outputs: Sequence[np.ndarray],
    reference: Sequence[np.ndarray] | None = None,
) -> Metric:
    """Return what a user's function says of `outputs`, and its drop against `reference`.

    The interval of a value for each sample is that of their mean. That of one number comes from what it changes by
    without each of twenty blocks of samples (jackknife: Tukey 1958).

    Args:
        name: of the metric.
        function: see `MetricFunction`.
        labels: whatever structure of arrays the data have.
        outputs: one array per output.
        reference: those of the reference on the same samples.

    Raises:
        DataError: the function fails, or returns something else than numbers.
    """
    truth = [] if labels is None else [np.asarray(each) for each in flatten_arrays(labels)]
    better = bool(getattr(function, "higher_is_better", True))
    n = len(outputs[0])

    def call(chosen: np.ndarray | slice, arrays: Sequence[np.ndarray]) -> np.ndarray:
        try:
            given = [each[chosen] for each in truth], [np.asarray(each)[chosen] for each in arrays]
            found = np.asarray(function(*given), np.float64)
        except Exception as error:  # the user's own code
            raise DataError(f"the metric {name} failed. Received: {type(error).__name__}: {error}") from error
        if found.shape not in ((), (len(given[1][0]),)):
            raise DataError(f"the metric {name} must give one number, or one for each sample. Received: {found.shape}")
        return found

    def estimate(arrays: Sequence[np.ndarray], other: Sequence[np.ndarray] | None) -> tuple[float, Interval | None]:
        """Return the metric, or how much lower it is than that of `other`, with its interval."""
        sign = 1.0 if other is None else -1.0
        value = sign * call(slice(None), arrays) + (0 if other is None else call(slice(None), other))
        if value.ndim:
            return float(value.mean()), statistics.mean_interval(value)
        blocks = np.array_split(np.arange(n), min(_BLOCKS, n))
        if len(blocks) < 2:
            return float(value), None
        parts = []
        for block in blocks:
            rest = np.setdiff1d(np.arange(n), block)
            without = sign * call(rest, arrays) + (0 if other is None else call(rest, other))
            parts.append(len(blocks) * value - (len(blocks) - 1) * without)
        low, high = statistics.mean_interval(parts)
        middle = float(np.mean(parts))
        return float(value), (float(value) + low - middle, float(value) + high - middle)

    value, interval = estimate(outputs, None)
    if not np.isfinite(value):
        return Metric(value=None, n=n, ci95=None, higher_is_better=better, reasons={"value": "it is not finite"})
    drop = None
    if reference is not None:
        lost, around = estimate(outputs, reference)
        if not better:
            lost, around = -lost, around and (-around[1], -around[0])
        drop = Change(value=lost, ci95=around) if np.isfinite(lost) else None
    return Metric(value=value, n=n, ci95=interval, higher_is_better=better, drop=drop)
