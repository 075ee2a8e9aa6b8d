"""Errors of layers, with numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compress.measure.layer_errors import ErrorSums


def _sums(*batches):
    sums = ErrorSums()
    for a, b in batches:
        sums.add(np.array(a, "float32"), np.array(b, "float32"))
    return sums


def test_batches_add_up():
    sums = _sums(([[3.0, 4.0]], [[3.0, 3.0]]), ([[0.0, 5.0]], [[1.0, 5.0]]))
    assert sums.mse == 2 / 4
    assert sums.sqnr_db == pytest.approx(10 * math.log10(50 / 2))
    assert sums.cosine == pytest.approx((9 + 12 + 25) / math.sqrt(50 * (9 + 9 + 1 + 25)))


def test_equal_values_have_no_noise():
    sums = _sums(([1.0, -2.0], [1.0, -2.0]))
    assert (sums.mse, sums.sqnr_db, sums.cosine) == (0, math.inf, 1)


def test_no_signal():
    sums = _sums(([0.0, 0.0], [0.0, 1.0]))
    assert (sums.mse, sums.sqnr_db, sums.cosine) == (0.5, -math.inf, None)
    assert _sums(([0.0], [0.0])).sqnr_db == math.inf


def test_values_that_are_finite_on_one_side_only():
    sums = _sums(([1.0, 2.0, math.inf], [1.0, math.nan, math.inf]))
    assert sums.broken == 1
    assert sums.sqnr_db == -math.inf
    assert sums.mse == 0


def test_nothing_was_added():
    assert ErrorSums().mse is None
    assert ErrorSums().sqnr_db == -math.inf
