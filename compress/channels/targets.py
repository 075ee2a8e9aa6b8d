"""A target instead of a ratio: the ratio is found with which a model costs what it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compress.channels.costs import CostModel, FileCostModel
from compress.channels.groups import ChannelGroups, Group
from compress.channels.rebuild import narrow
from compress.errors import UsageError
from compress.progress import track
from compress.targets.files import TOLERANCE, FileCosts
from compress.targets.reaching import Reached

_CALIBRATION = (0.25, 0.5, 0.75)
_FILES = 6
_MOST = 0.999
_HALVINGS = 24
_MARGINS = (0.0, 0.02, 0.05, 0.1, 0.2)


def reach_file_target(
    groups: ChannelGroups,
    chosen: Sequence[Group],
    choose: Callable[[float], set[int]],
    cost: str,
    target: float,
    files: FileCosts,
    tolerance: float = TOLERANCE,
) -> tuple[set[int], Reached]:
    """Return the units to remove so that the exported file costs its target, and what was predicted and measured.

    The cost model learns from a few exported files first, and from each further one that misses the target.

    Args:
        groups: of the model.
        chosen: what may lose channels.
        choose: returns the units to remove at a ratio.
        cost: `"bytes"` or `"latency"`.
        target: share of the original's cost.
        files: measures the cost.
        tolerance: how far from the target, as a share of it, is near enough.

    Raises:
        UsageError: the target cannot be met; the nearest share is named.
    """
    costs = FileCostModel(groups, cost)
    seen: list[tuple[set[int], float]] = [(set(), 1.0)]
    with track(f"measure {cost}", _FILES + len(_CALIBRATION)) as advance:
        for ratio in _CALIBRATION:
            removed = choose(ratio)
            seen.append((removed, files.share(narrow(groups, removed))))
            advance(1, f"{seen[-1][1]:.3f}")
        for _ in range(_FILES):
            costs.fit(seen)
            removed, predicted = reach_target(chosen, choose, costs, target, tolerance)
            measured = files.share(narrow(groups, removed))
            advance(1, f"{measured:.3f}")
            if abs(measured - target) <= tolerance * target:
                return removed, Reached(cost, target, predicted, measured)
            seen.append((removed, measured))
    nearest = min((share for _, share in seen), key=lambda share: abs(share - target))
    raise UsageError(
        f"the target was not met within {tolerance:.0%}: the nearest {cost} that was measured is {nearest:.1%}. "
        f"Received: {target:.1%}",
        f"Ask for {nearest:.1%}, lower `multiple_of`, or measure on a machine that does nothing else.",
    )


def reach_target(
    groups: Sequence[Group],
    choose: Callable[[float], set[int]],
    costs: CostModel | FileCostModel,
    target: float,
    tolerance: float = TOLERANCE,
) -> tuple[set[int], float]:
    """Return the units to remove, and the share of the cost that is left.

    Numbers of channels are rounded, so that many groups of one width lose channels at once. Between the two ratios that
    enclose the target, block by block follows the greater one; where no mixture meets the target, those of wider apart
    ratios are tried.

    Args:
        groups: what may lose channels.
        choose: returns the units to remove at a ratio.
        costs: what is left costs.
        target: share of the cost of the whole model, more than 0 and at most 1.
        tolerance: how far from it, as a share of it, is near enough.

    Raises:
        UsageError: the target cannot be met; the nearest share is named.
    """
    whole = costs.measure(())
    low, high = 0.0, _MOST
    if costs.measure(choose(high)) > target * whole * (1 + tolerance):
        least = costs.measure(choose(high)) / whole
        raise UsageError(
            f"the target cannot be met: the least that can be left is {least:.1%}. Received: {target:.1%}",
            "Raise the target, lower `minimum` or `multiple_of`, or let more layers lose channels.",
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.measure(choose(middle)) > target * whole else (low, middle)
    best: set[int] = set()
    for margin in _MARGINS:
        fewer, more = choose(max(0.0, low - margin)), choose(min(_MOST, high + margin))
        found = _mix(groups, fewer, more, lambda units: abs(costs.measure(units) - target * whole))
        best = min((best, found), key=lambda units: abs(costs.measure(units) - target * whole))
        if abs(costs.measure(best) - target * whole) <= tolerance * target * whole:
            break
    share = costs.measure(best) / whole
    if abs(share - target) > tolerance * target:
        raise UsageError(
            f"the target cannot be met within {tolerance:.0%}: the nearest that rounding allows is {share:.1%}. "
            f"Received: {target:.1%}",
            f"Ask for {share:.1%}, lower `multiple_of`, or raise `tolerance`.",
        )
    return best, share


def _mix(groups: Sequence[Group], fewer: set[int], more: set[int], distance: Callable[[set[int]], float]) -> set[int]:
    """Return the units to remove that are nearest to the target, where each block follows the one or the other."""
    blocks = [set(block.units.tolist()) for group in groups for block in group.blocks]
    blocks = [own for own in blocks if fewer & own != more & own]
    best = current = fewer
    for own in blocks:
        current = (current - own) | (more & own)
        best = min((best, current), key=distance)
    for own in blocks:  # one block may be too large a step where another fits
        for other in (fewer, more):
            best = min((best, (best - own) | (other & own)), key=distance)
    return best
