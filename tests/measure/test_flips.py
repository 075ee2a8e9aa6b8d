"""Decisions that change, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from compress.errors import DataError
from compress.measure.flips import compare_decisions

A = np.eye(3, dtype="float32")[[0, 0, 1, 1, 2, 2]]
B = np.eye(3, dtype="float32")[[0, 1, 1, 0, 2, 0]]
LABELS = np.array([0, 0, 0, 0, 2, 1])


def test_flips_for_better_and_worse():
    (found,) = compare_decisions(["class"], [A], [B], LABELS)
    assert (found.kind, found.decisions, found.flips) == ("classification", 6, 3)
    assert (found.right_to_wrong, found.wrong_to_right) == (1, 1)
    assert found.examples == [1, 3, 5]
    assert found.metrics_a["accuracy"].value == found.metrics_b["accuracy"].value == pytest.approx(3 / 6)
    assert found.metrics_b["agreement"].value == pytest.approx(3 / 6)
    rows = [(c.label, c.decisions, c.flips, c.right_to_wrong, c.wrong_to_right) for c in found.by_class]
    assert rows == [(0, 4, 2, 1, 1), (1, 1, 1, 0, 0), (2, 1, 0, 0, 0)]


def test_without_labels_classes_are_those_of_the_first_file():
    (found,) = compare_decisions(["class"], [A], [B], None)
    assert [(c.label, c.decisions, c.flips, c.right_to_wrong) for c in found.by_class] == [
        (0, 2, 1, None), (1, 2, 1, None), (2, 2, 1, None),
    ]  # fmt: skip
    assert "right_to_wrong" in found.reasons


def test_outputs_that_are_not_finite_agree_with_nothing():
    broken = A.copy()
    broken[4] = np.nan
    (found,) = compare_decisions(["class"], [A], [broken], None)
    assert (found.flips, found.examples) == (1, [4])


def test_regression_has_no_flips():
    x = np.array([[1.5], [2.0]], "float32")
    (found,) = compare_decisions(["size"], [x], [x + 1], x)
    assert (found.kind, found.flips, found.metrics_b["mse"].value) == ("regression", None, 1)


def test_labels_that_do_not_fit():
    with pytest.raises(DataError):
        compare_decisions(["class"], [A], [B], np.zeros((6, 2), int))
