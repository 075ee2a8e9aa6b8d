"""Sensitivity and the search for layers that go back to float, on made-up losses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import PassError, UsageError
from compress.quantization.assignment import assign_bits
from compress.quantization.sensitivity import (
    LayerSensitivity,
    Restoration,
    bit_sensitivity,
    layer_sensitivity,
    layers_to_restore,
)


def test_layers_are_sorted_by_what_they_cost():
    losses = {"a": 0.25, "b": 1.0, "c": -0.5, "d": 0.25}
    calls = []

    def measure(enabled):
        calls.append(enabled)
        return 2.0 + sum(losses[name] for name in enabled)

    found = layer_sensitivity(list(losses), measure)
    assert found == [
        LayerSensitivity("b", 1.0), LayerSensitivity("a", 0.25), LayerSensitivity("d", 0.25), LayerSensitivity("c", -0.5),
    ]  # fmt: skip
    assert calls == [frozenset(), *(frozenset([name]) for name in losses)]


def test_baseline_is_not_measured_if_given():
    assert layer_sensitivity(["a"], lambda enabled: len(enabled) + 0.5, baseline=0.5) == [LayerSensitivity("a", 1.0)]
    assert layer_sensitivity([], lambda enabled: pytest.fail("nothing to measure")) == []


def test_a_lost_model_is_the_most_sensitive():
    found = layer_sensitivity(["a", "b"], lambda enabled: math.nan if "b" in enabled else float(len(enabled)))
    assert [item.layer for item in found] == ["b", "a"]


def test_bit_sensitivity_is_what_the_assignment_takes():
    table = bit_sensitivity(["a", "b"], [8, 4], lambda name, bits: {"a": 1, "b": 3}[name] / bits + 1, baseline=1)
    assert table == {"a": {4: 0.25, 8: 0.125}, "b": {4: 0.75, 8: 0.375}}
    assert assign_bits(table, {"a": {4: 4, 8: 8}, "b": {4: 4, 8: 8}}, budget=12) == {"a": 4, "b": 8}


def test_names_must_be_unique():
    for call in (
        lambda: layer_sensitivity(["a", "b", "a"], lambda enabled: 0.0),
        lambda: bit_sensitivity(["a", "b", "a"], [8], lambda name, bits: 0.0),
        lambda: layers_to_restore(["a", "b", "a"], lambda restored: 0.0, 0.1),
    ):
        with pytest.raises(UsageError, match="'a' twice"):
            call()


ORDER = [f"l{i}" for i in range(100)]


def drop_after(needed, calls):
    def evaluate(restored):
        assert list(restored) == ORDER[: len(restored)]
        calls.append(len(restored))
        return 0.004 if len(restored) >= needed else 0.02

    return evaluate


@pytest.mark.parametrize(
    ("needed", "counts"),
    [
        (0, [0]),
        (1, [0, 1]),
        (2, [0, 1, 2]),
        (3, [0, 1, 2, 4, 3]),
        (11, [0, 1, 2, 4, 8, 16, 12, 10, 11]),
        (100, [0, 1, 2, 4, 8, 16, 32, 64, 100, 82, 91, 95, 97, 98, 99]),
    ],
)
def test_shortest_prefix_with_few_evaluations(needed, counts):
    calls = []
    found = layers_to_restore(ORDER, drop_after(needed, calls), 0.005)
    assert found == Restoration(tuple(ORDER[:needed]), 0.004, len(counts))
    assert calls == counts


def test_a_drop_that_even_float_cannot_hold_fails_loudly():
    with pytest.raises(PassError, match=r"at most 0.005 must be reachable. Received: 0.02 with all 3 layers"):
        layers_to_restore(ORDER[:3], lambda restored: 0.02, 0.005)
    with pytest.raises(PassError, match="nan with all 0 layers"):
        layers_to_restore([], lambda restored: math.nan, 0.005)
    with pytest.raises(UsageError, match="NaN"):
        layers_to_restore(ORDER, lambda restored: 0.0, math.nan)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_what_is_returned_holds_even_where_a_drop_is_noisy(drops, max_drop):
    order = [f"l{i}" for i in range(len(drops) - 1)]
    measured = []

    def evaluate(restored):
        measured.append(len(restored))
        return drops[len(restored)]

    try:
        found = layers_to_restore(order, evaluate, max_drop)
    except PassError:
        assert drops[-1] > max_drop
        return
    count = len(found.layers)
    assert found.drop == drops[count] <= max_drop
    assert count == 0 or (count - 1 in measured and drops[count - 1] > max_drop)
    assert len(measured) == len(set(measured)) == found.evaluations
