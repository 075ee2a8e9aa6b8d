"""Which units go: a ratio for each group or for all together, in numbers of channels that runtimes like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compress.channels.groups import Block, ChannelGroups, Group
from compress.errors import UsageError
from compress.models.patterns import matches, require_matches

_MOST_GLOBAL = 0.9  # of a block; ranking all together would otherwise empty some


def select_groups(groups: ChannelGroups, include: Sequence[str], exclude: Sequence[str]) -> list[Group]:
    """Return the groups that the patterns choose.

    Raises:
        UsageError: a pattern fits no layer, or no group is left.
    """
    paths = [node.path for node in groups.graph.nodes]
    require_matches(paths, include, "include")
    require_matches(paths, exclude, "exclude")
    chosen = [
        group
        for group in groups.groups
        if all(matches(path, include) and not matches(path, exclude) for path in group.producers)
    ]
    if not chosen:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(groups.frozen.items())[:5])
        raise UsageError(
            f"expected channels that can be removed. Received: model {groups.graph.name!r} with "
            f"{len(groups.groups)} groups, include={list(include)}, exclude={list(exclude)}",
            f"What stays, and why: {reasons or 'see bmcompress inspect --groups'}.",
        )
    return chosen


def choose_units(
    groups: Sequence[Group],
    scores: Mapping[int, float],
    ratio: float | Mapping[str, float],
    *,
    together: bool,
    multiple_of: int,
    minimum: int,
) -> set[int]:
    """Return the units to remove.

    Args:
        groups: what may lose channels.
        scores: importance by unit; a unit without one is the first to go.
        ratio: share of the channels to remove, for all groups or by pattern over the layers that make them.
        together: rank the units of all groups together instead of each block by itself.
        multiple_of: what the number of channels that stay is rounded to, where a block has so many.
        minimum: how many channels of each block stay at least.
    """
    removed: set[int] = set()
    ranked = _ranked_together(groups, scores, ratio) if together else {}
    for group in groups:
        for block in group.blocks:
            share = ranked[id(block)] if together else ratio_of(group, ratio)
            keep = round_count(len(block.units), (1 - share) * len(block.units), multiple_of, minimum)
            order = sorted(range(len(block.units)), key=lambda i: (scores.get(int(block.units[i]), 0.0), i))
            removed.update(int(block.units[i]) for i in order[: len(block.units) - keep])
    return removed


def ratio_of(group: Group, ratio: float | Mapping[str, float]) -> float:
    """Return the ratio of a group: the first pattern that one of its makers fits counts, and none means 0."""
    if not isinstance(ratio, Mapping):
        return ratio
    fitting = (value for pattern, value in ratio.items() if any(matches(path, [pattern]) for path in group.producers))
    return next(fitting, 0.0)


def round_count(count: int, wanted: float, multiple_of: int, minimum: int) -> int:
    """Return how many of `count` channels stay: near `wanted`, a multiple where there are enough, at least one."""
    step = multiple_of if count >= multiple_of else 1
    keep = max(round(wanted / step) * step, step, minimum)
    return min(keep, count)


def require_ratio(ratio: float | Mapping[str, float], paths: Sequence[str]) -> None:
    """Raise UsageError unless each ratio is at least 0 and less than 1, and each pattern fits a layer."""
    if isinstance(ratio, Mapping):
        require_matches(paths, list(ratio), "ratio")
    for value in ratio.values() if isinstance(ratio, Mapping) else [ratio]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UsageError(
                f"expected a ratio of at least 0 and less than 1. Received: ratio={value!r}",
                "0.5 removes half of the channels.",
            )


def _ranked_together(
    groups: Sequence[Group], scores: Mapping[int, float], ratio: float | Mapping[str, float]
) -> dict[int, float]:
    """Return the share that each block loses when the units of all are ranked together, by `id` of the block."""
    blocks: list[Block] = [block for group in groups for block in group.blocks]
    weights = [ratio_of(group, ratio) for group in groups for _ in group.blocks]
    if not blocks:
        return {}
    values = [np.array([scores.get(unit, 0.0) for unit in block.units.tolist()]) for block in blocks]
    total = round(sum(weight * len(block.units) for weight, block in zip(weights, blocks, strict=True)))
    everything = np.concatenate([own for own, weight in zip(values, weights, strict=True) if weight > 0] or [[]])
    if total == 0:
        return dict.fromkeys(map(id, blocks), 0.0)
    threshold = np.partition(everything, total - 1)[total - 1]
    return {
        id(block): min(_MOST_GLOBAL, float((own <= threshold).mean())) if weight > 0 else 0.0
        for block, own, weight in zip(blocks, values, weights, strict=True)
    }
