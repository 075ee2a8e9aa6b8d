"""Bit assignment: optimal against brute force, within budget, deterministic."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.quantization.assignment import assign_bits, bit_operations

LOSS = {"stem": {2: 9.0, 4: 4.0, 8: 0.0}, "body": {2: 5.0, 4: 1.0, 8: 0.0}, "head": {2: 0.2, 4: 0.1, 8: 0.0}}
COST = {"stem": {2: 2, 4: 4, 8: 8}, "body": {2: 20, 4: 40, 8: 80}, "head": {2: 10, 4: 20, 8: 40}}


def total(table, bits):
    return math.fsum(table[layer][width] for layer, width in bits.items())


def test_bit_operations():
    assert bit_operations(1000, 8, 8) == 64_000
    assert bit_operations(1000, 4, 16) == 64_000


@pytest.mark.parametrize("method", ["ilp", "greedy"])
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (128, {"stem": 8, "body": 8, "head": 8}),  # everything fits
        (32, {"stem": 2, "body": 2, "head": 2}),  # nothing else fits
        (38, {"stem": 8, "body": 2, "head": 2}),
        (60, {"stem": 8, "body": 4, "head": 2}),
        (67, {"stem": 8, "body": 4, "head": 2}),
        (68, {"stem": 8, "body": 4, "head": 4}),
        (1e12, {"stem": 8, "body": 8, "head": 8}),
        (math.inf, {"stem": 8, "body": 8, "head": 8}),
    ],
)
def test_size_budget(budget, expected, method):
    assert assign_bits(LOSS, COST, budget=budget, method=method) == expected


def test_loss_budget():
    """The cheapest bits that lose at most 1.3 in total: the stem is cheap to keep, the others give."""
    assert assign_bits(LOSS, COST, max_loss=1.3) == {"stem": 8, "body": 4, "head": 2}
    assert assign_bits(LOSS, COST, max_loss=0) == {"stem": 8, "body": 8, "head": 8}
    assert assign_bits(LOSS, COST, max_loss=100) == {"stem": 2, "body": 2, "head": 2}


def test_greedy_can_be_worse_than_ilp():
    """`a` gains most per price (10 for 6), but then the better pair of `b` and `c` (8 for 5 each) does not fit."""
    loss = {"a": {4: 10, 8: 0}, "b": {4: 8, 8: 0}, "c": {4: 8, 8: 0}}
    cost = {"a": {4: 0, 8: 6}, "b": {4: 0, 8: 5}, "c": {4: 0, 8: 5}}
    assert assign_bits(loss, cost, budget=10, method="greedy") == {"a": 8, "b": 4, "c": 4}
    assert assign_bits(loss, cost, budget=10, method="ilp") == {"a": 4, "b": 8, "c": 8}


def test_ties_take_the_cheaper_and_do_not_depend_on_order():
    loss = {"b": {4: 1.0, 8: 1.0}, "a": {4: 1.0, 8: 0.0}, "c": {4: 1.0, 8: 0.0}}
    cost = {"b": {4: 4, 8: 8}, "a": {4: 4, 8: 8}, "c": {4: 4, 8: 8}}
    for method in ("ilp", "greedy"):
        chosen = assign_bits(loss, cost, budget=16, method=method)
        assert chosen["b"] == 4  # 8 bits gain nothing
        assert list(chosen) == ["b", "a", "c"]
        assert sorted([chosen["a"], chosen["c"]]) == [4, 8]
        turned = assign_bits(dict(reversed(loss.items())), dict(reversed(cost.items())), budget=16, method=method)
        assert turned == chosen
    equal = {"a": {8: 0.0, 4: 0.0}}
    assert assign_bits(equal, {"a": {8: 5, 4: 5}}, budget=5) == {"a": 4}


def test_budget_holds_to_the_last_byte():
    """A solver's relative tolerance of 1e-6 would let 10 bytes of 1e9 slip through."""
    loss = {f"l{i}": {4: 1.0 + i / 100, 8: 0.0} for i in range(8)}
    cost = {f"l{i}": {4: 0, 8: 10**9 + i} for i in range(8)}
    best = sorted(cost, key=lambda layer: -loss[layer][4])[:4]
    budget = sum(cost[layer][8] for layer in best) - 1  # the four most gainful are one byte too many
    chosen = assign_bits(loss, cost, budget=budget)
    assert total(cost, chosen) <= budget
    assert total(loss, chosen) == pytest.approx(min(total(loss, c) for c in _all(loss) if total(cost, c) <= budget))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 31}, "budget must be at least 32, the smallest that 3 layers can reach. Received: 31"),
        ({"budget": math.nan}, "budget must be at least 32"),
        ({"max_loss": -0.1}, "max_loss must be at least 0"),
        ({}, "one of budget and max_loss"),
        ({"budget": 1, "max_loss": 1}, "one of budget and max_loss"),
        ({"budget": 50, "method": "random"}, "'ilp' or 'greedy'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UsageError, match=message):
        assign_bits(LOSS, COST, **arguments)


def test_tables_must_fit():
    with pytest.raises(UsageError, match=r"same layers\. Received: 'head'"):
        assign_bits(LOSS, {name: COST[name] for name in ("stem", "body")}, budget=50)
    with pytest.raises(UsageError, match="'body' must name the same bits"):
        assign_bits(LOSS, {**COST, "body": {2: 1, 4: 2}}, budget=50)
    with pytest.raises(UsageError, match=r"finite\. Received: nan for layer 'stem' at 4 bits"):
        assign_bits({**LOSS, "stem": {2: 9.0, 4: math.nan, 8: 0.0}}, COST, budget=50)


def test_no_layers():
    assert assign_bits({}, {}, budget=1) == {}


def test_solver_prints_nothing_on_stdout(capfd):
    """HiGHS prints debugging lines on this instance; stdout must stay free for results."""
    rng = np.random.default_rng(5)
    losses, sizes = np.sort(rng.random((200, 7)), axis=1)[:, ::-1], rng.integers(1000, 10**6, 200)
    loss = {f"l{i}": {bits: float(losses[i, bits - 2]) for bits in range(2, 9)} for i in range(200)}
    cost = {f"l{i}": {bits: int(sizes[i]) * bits // 8 for bits in range(2, 9)} for i in range(200)}
    chosen = assign_bits(loss, cost, budget=int(sizes.sum()) // 2)
    assert total(loss, chosen) < total(loss, assign_bits(loss, cost, budget=int(sizes.sum()) // 2, method="greedy"))
    print("result")
    assert capfd.readouterr().out == "result\n"


def _all(table):
    layers = list(table)
    for widths in itertools.product(*(table[layer] for layer in layers)):
        yield dict(zip(layers, widths, strict=True))


@st.composite
def _instances(draw):
    layers = draw(st.integers(1, 4))
    widths = draw(st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, max_size=4, unique=True))
    loss = {f"l{i}": {w: draw(st.integers(-20, 100)) / 8 for w in widths} for i in range(layers)}
    cost = {f"l{i}": {w: draw(st.integers(0, 60)) for w in widths} for i in range(layers)}
    cheapest = sum(min(costs.values()) for costs in cost.values())
    return loss, cost, cheapest + draw(st.integers(0, 120))


@settings(max_examples=150, deadline=None)
@given(_instances())
def test_ilp_equals_brute_force_and_greedy_is_never_better(instance):
    loss, cost, budget = instance
    exact, greedy = (assign_bits(loss, cost, budget=budget, method=method) for method in ("ilp", "greedy"))
    assert total(cost, exact) <= budget
    assert total(cost, greedy) <= budget
    assert total(loss, exact) == min(total(loss, choice) for choice in _all(loss) if total(cost, choice) <= budget)
    assert total(loss, exact) <= total(loss, greedy)
    allowed = total(loss, exact)
    cheapest = assign_bits(loss, cost, max_loss=allowed)
    assert total(cost, cheapest) == min(total(cost, c) for c in _all(loss) if total(loss, c) <= allowed)
