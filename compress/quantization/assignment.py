"""Mixed precision: which layer gets how many bits, under a budget for the whole model.

Choosing one width per layer is a multiple-choice knapsack problem, solved exactly as an integer program (as in
HAWQ-V3, Yao et al. 2021, arXiv:2011.10680) or greedily. Losses of layers are taken to add up.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from compress.errors import UsageError

Table = Mapping[str, Mapping[int, float]]
"""`{layer: {bits: number}}`."""

_Options = dict[str, list[tuple[float, float, int]]]
"""For each layer, its `(cost, loss, bits)` by rising cost and falling loss."""

_CUTS = 20
_LARGEST_OBJECTIVE = 1e3  # the solver's absolute tolerance of 1e-6 then means 1e-9 of the objective


def bit_operations(macs: int, weight_bits: int, activation_bits: int) -> int:
    """Return the bit operations (BOPs) of a layer: its multiply-accumulates times both widths."""
    return macs * weight_bits * activation_bits


def assign_bits(
    sensitivity: Table,
    cost: Table,
    *,
    budget: float | None = None,
    max_loss: float | None = None,
    method: Literal["ilp", "greedy"] = "ilp",
) -> dict[str, int]:
    """Return the bits of each layer, in the order of `sensitivity`.

    With `budget`, the total loss is the smallest for a total cost of at most `budget`; with `max_loss`, the total
    cost is the smallest for a total loss of at most `max_loss`. Of equal choices the cheaper one is taken, then fewer
    bits; layers are visited by name, so the same tables give the same answer.

    Args:
        sensitivity: what a layer's quantization to so many bits costs in quality; lower is better, negative is fine.
        cost: what a layer takes at so many bits, such as bytes or BOPs; for the same layers and bits.
        budget: largest total cost.
        max_loss: largest total loss; give one of the two.
        method: `"ilp"` is exact; `"greedy"` takes the step with the most gain per price until none fits, and is
            never better.

    Raises:
        UsageError: the tables do not fit each other or hold NaN, or even the cheapest choice breaks the budget.
    """
    if (budget is None) == (max_loss is None):
        raise UsageError(f"give one of budget and max_loss. Received: budget={budget}, max_loss={max_loss}")
    if method not in ("ilp", "greedy"):
        raise UsageError(f"method must be 'ilp' or 'greedy'. Received: {method!r}")
    _check_tables(sensitivity, cost)
    limited, wanted, limit, word = (
        (cost, sensitivity, budget, "budget") if budget is not None else (sensitivity, cost, max_loss, "max_loss")
    )
    options = {layer: _undominated(limited[layer], wanted[layer]) for layer in sorted(sensitivity)}
    least = math.fsum(choices[0][0] for choices in options.values())
    if not least <= limit:
        raise UsageError(
            f"{word} must be at least {least:.12g}, the smallest that {len(options)} layers can reach. "
            f"Received: {limit:.12g}",
            f"Raise {word}, allow fewer bits, or exclude fewer layers." if word == "budget" else f"Raise {word}.",
        )
    chosen = _choose_greedily(options, limit)
    if method == "ilp" and options:
        chosen = _choose_exactly(options, limit, chosen)
    return {layer: options[layer][chosen[layer]][2] for layer in sensitivity}


def _check_tables(sensitivity: Table, cost: Table) -> None:
    if set(sensitivity) != set(cost):
        odd = sorted(set(sensitivity) ^ set(cost))
        raise UsageError(f"sensitivity and cost must name the same layers. Received: {odd[0]!r} in only one of them")
    for layer, losses in sensitivity.items():
        if not losses or set(losses) != set(cost[layer]):
            raise UsageError(
                f"sensitivity and cost of layer {layer!r} must name the same bits, at least one. "
                f"Received: {sorted(losses)} and {sorted(cost[layer])}"
            )
        for table, word in ((losses, "sensitivity"), (cost[layer], "cost")):
            for bits, value in table.items():
                if not math.isfinite(value):
                    raise UsageError(f"{word} must be finite. Received: {value} for layer {layer!r} at {bits} bits")


def _undominated(limited: Mapping[int, float], wanted: Mapping[int, float]) -> list[tuple[float, float, int]]:
    """Return `(limited, wanted, bits)` by rising first and falling second; anything else is never worth choosing."""
    kept: list[tuple[float, float, int]] = []
    for option in sorted((float(limited[bits]), float(wanted[bits]), bits) for bits in limited):
        if not kept or option[1] < kept[-1][1]:
            kept.append(option)
    return kept


def _total(options: _Options, chosen: Mapping[str, int], column: int) -> float:
    return math.fsum(options[layer][index][column] for layer, index in chosen.items())


def _choose_greedily(options: _Options, limit: float) -> dict[str, int]:
    """Return the index of each layer's option: from the cheapest, step by step, the most gain per price."""
    chosen = dict.fromkeys(options, 0)
    while True:
        spent = _total(options, chosen, 0)
        best: tuple[float, str, int] | None = None
        for layer, choices in options.items():
            price_now, loss_now, _ = choices[chosen[layer]]
            for index in range(chosen[layer] + 1, len(choices)):
                price, gain = choices[index][0] - price_now, loss_now - choices[index][1]
                if spent + price <= limit and (best is None or gain / price > best[0]):
                    best = (gain / price, layer, index)
        if best is None:
            return chosen
        trial = {**chosen, best[1]: best[2]}
        if _total(options, trial, 0) > limit:  # rounding of the sum above
            return chosen
        chosen = trial


def _choose_exactly(options: _Options, limit: float, fallback: dict[str, int]) -> dict[str, int]:
    """Return the best choice by integer programming; `fallback` where the solver's tolerance leaves it better.

    A solver keeps the budget only within a tolerance. A choice that breaks it by less is cut off and the rest solved
    again.
    """
    flat = [(layer, index) for layer, choices in options.items() for index in range(len(choices))]
    prices, losses = (np.array([options[layer][index][column] for layer, index in flat]) for column in (0, 1))
    owners = np.array([[layer == owner for layer, _ in flat] for owner in options], float)
    one_each = LinearConstraint(owners, 1, 1)
    # Costs above each layer's cheapest, in units of what is left: well scaled whatever the unit.
    spare = limit - _total(options, dict.fromkeys(options, 0), 0)
    extra = prices - np.array([options[layer][0][0] for layer, _ in flat])
    fits = LinearConstraint(extra[None] / (spare or 1.0), -np.inf, 1.0 if spare else 0.0)
    upper = (extra <= spare).astype(float)
    objective = losses - losses.min()
    objective *= _LARGEST_OBJECTIVE / (objective.max() or 1.0)
    constraints = [one_each, fits]
    for _ in range(_CUTS):
        with _stdout_on_stderr():
            solution = milp(
                objective,
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, upper),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
        if solution.x is None:
            break
        taken = np.round(solution.x).astype(bool)
        chosen = {layer: index for (layer, index), take in zip(flat, taken, strict=True) if take}
        if _total(options, chosen, 0) <= limit:
            return min((chosen, fallback), key=lambda choice: (_total(options, choice, 1), _total(options, choice, 0)))
        constraints.append(LinearConstraint(taken[None].astype(float), -np.inf, len(options) - 1))
    return fallback


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Send what native code prints inside the block to stderr: HiGHS prints debugging lines that no option stops.

    stdout belongs to results. C buffers its output, so it must be flushed before the descriptor is put back.
    """
    try:
        saved = os.dup(1)
    except OSError:  # stdout is closed: nothing can be printed
        yield
        return
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        os.dup2(2, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
