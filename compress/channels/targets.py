"""A target instead of a ratio: the ratio is found with which a model costs what it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compress.channels.costs import CostModel
from compress.channels.groups import Block, Group
from compress.errors import UsageError

TOLERANCE = 0.03
"""How far from its target, as a share of it, a model may be."""

_MOST = 0.999
_HALVINGS = 24


def reach_target(
    groups: Sequence[Group], choose: Callable[[float], set[int]], costs: CostModel, target: float
) -> tuple[set[int], float]:
    """Return the units to remove, and the share of the cost that is left.

    Numbers of channels are rounded, so that many groups of one width lose channels at once; between the two ratios that
    enclose the target, block by block follows the greater one until the target is met.

    Args:
        groups: what may lose channels.
        choose: returns the units to remove at a ratio.
        costs: what is left costs.
        target: share of the cost of the whole model, more than 0 and at most 1.

    Raises:
        UsageError: the target cannot be met; the nearest share is named.
    """
    whole = costs.measure(())
    low, high = 0.0, _MOST
    if costs.measure(choose(high)) > target * whole * (1 + TOLERANCE):
        least = costs.measure(choose(high)) / whole
        raise UsageError(
            f"the target cannot be met: the least that can be left is {least:.1%}. Received: {target:.1%}",
            "Raise the target, lower `minimum` or `multiple_of`, or let more layers lose channels.",
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.measure(choose(middle)) > target * whole else (low, middle)
    removed, more = choose(low), choose(high)
    best = min((removed, more), key=lambda units: abs(costs.measure(units) - target * whole))
    for block in _blocks(groups):
        own = set(block.units.tolist())
        removed = (removed - own) | (more & own)
        if abs(costs.measure(removed) - target * whole) < abs(costs.measure(best) - target * whole):
            best = set(removed)
    share = costs.measure(best) / whole
    if abs(share - target) > TOLERANCE * target:
        raise UsageError(
            f"the target cannot be met within {TOLERANCE:.0%}: the nearest that rounding allows is {share:.1%}. "
            f"Received: {target:.1%}",
            f"Ask for {share:.1%}, or lower `multiple_of`.",
        )
    return best, share


def _blocks(groups: Sequence[Group]) -> list[Block]:
    return [block for group in groups for block in group.blocks]
