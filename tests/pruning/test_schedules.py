"""Schedules: values at hand-worked moments, and options that make no sense."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from compress.pruning.schedules import ConstantSchedule, PolynomialSchedule, Schedule


def test_constant():
    schedule = ConstantSchedule(begin=0.25)
    assert [schedule.sparsity_at(p, 0.8) for p in (0, 0.24, 0.25, 1)] == [0, 0, 0.8, 0.8]


def test_cubic():
    schedule = PolynomialSchedule(begin=0.2, end=0.6)
    assert [schedule.sparsity_at(p, 0.8) for p in (0, 0.19, 0.6, 1)] == [0, 0, 0.8, 0.8]
    assert schedule.sparsity_at(0.2, 0.8) == pytest.approx(0)
    assert schedule.sparsity_at(0.4, 0.8) == pytest.approx(0.7)  # 0.8 - 0.8 * 0.5 ** 3


def test_linear_from_an_initial_sparsity():
    schedule = PolynomialSchedule(end=0.5, initial_sparsity=0.5, power=1)
    assert [schedule.sparsity_at(p, 0.9) for p in (0, 0.25, 0.5)] == pytest.approx([0.5, 0.7, 0.9])


def test_sparsity_never_falls():
    schedule = PolynomialSchedule(begin=0.1, end=0.9)
    values = [schedule.sparsity_at(step / 100, 0.8) for step in range(101)]
    assert values == sorted(values)


@pytest.mark.parametrize(
    "options",
    [
        {"begin": 0.7},
        {"end": 1.0},
        {"end": 1.2},
        {"begin": -0.1},
        {"power": 0},
        {"frequency": 0},
        {"initial_sparsity": 2},
        {"stop": 1},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(ValidationError):
        PolynomialSchedule(**options)


def test_chosen_by_type():
    adapter = TypeAdapter(Schedule)
    assert adapter.validate_python({"type": "constant"}) == ConstantSchedule()
    assert adapter.validate_python({"type": "polynomial", "end": "50%"}) == PolynomialSchedule(end=0.5)
