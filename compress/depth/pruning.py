"""Depth pruning: the residual blocks whose removal changes the outputs least are dropped, one after the other.

The outputs are measured anew after each removal, on samples without labels, as blocks stand in for each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras

from compress.data.split import Split, as_data
from compress.depth.blocks import ResidualBlock, blocks_of, costs_of, drop, needed_nodes, open_graph
from compress.errors import DataError, UsageError
from compress.models.copying import copy_compile_settings, copy_model
from compress.models.graph import Graph, name_outputs_as
from compress.models.output_loss import OutputLoss
from compress.models.patterns import matches, require_matches
from compress.progress import track

Cost = Literal["parameters", "macs"]

TOLERANCE = 0.03
"""A block that overshoots the target by more than this share of it is exchanged for one that lands nearer."""


@dataclass(frozen=True)
class DroppedBlock:
    """A block that went.

    Args:
        path: path of its sum.
        layers: paths of the layers with weights that went with it.
        change: how far the outputs were from the original's then: nats for probabilities, otherwise the mean squared
            difference in units of the output's variance.
    """

    path: str
    layers: tuple[str, ...]
    change: float


@dataclass(frozen=True, eq=False)
class PrunedBlocks:
    """A shallower model and what was done.

    Args:
        model: the new model.
        dropped: the blocks, in the order in which they went.
        left: share of the parameters and of the MACs that is left.
    """

    model: keras.Model
    dropped: tuple[DroppedBlock, ...]
    left: dict[Cost, float]


def prune_blocks(
    model: keras.Model,
    count: int | None = None,
    *,
    target: Mapping[Cost, float] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    data: Any = None,
    samples: int = 256,
) -> PrunedBlocks:
    """Return a copy of `model` without some of its residual blocks.

    Args:
        model: a functional or sequential float model; it is not changed.
        count: how many blocks go.
        target: instead, the share of the `"parameters"` or `"macs"` that may be left, such as `{"macs": 0.7}`; blocks
            go, those first that cost the outputs least for what they save, until it is reached.
        include: shell patterns over the paths of blocks, which are those of their sums.
        exclude: shell patterns over the paths of blocks that stay.
        data: inputs, `(x, y)` or other data; labels are not used.
        samples: how many of the first are used at most.

    Raises:
        UsageError: an option that makes no sense, fewer blocks than are asked for, or a target that cannot be met.
        ModelError: the calls of the model are known to Python alone.
        DataError: no data.
    """
    graph = open_graph(model)
    blocks = select_blocks(graph, include, exclude)
    require_choice(graph, blocks, count, target)
    if data is None:
        raise DataError("dropping blocks needs samples. Received: data=None", "Pass data=x; labels are not used.")
    split = data if isinstance(data, Split) else as_data(data).require("train", "dropping blocks")
    chosen = _choose(graph, blocks, count, target, split, samples)
    # The layers of `graph` have been called by every candidate; a copy has the calls of the result alone.
    shallow = name_outputs_as(copy_model(drop(graph, [block for block, _ in chosen])), model)
    copy_compile_settings(model, shallow)
    whole, rest = costs_of(graph.nodes), costs_of(needed_nodes(graph, [block for block, _ in chosen]))
    left: dict[Cost, float] = {
        name: part / all_ if all_ else 1.0 for name, part, all_ in zip(("parameters", "macs"), rest, whole, strict=True)
    }
    return PrunedBlocks(shallow, tuple(DroppedBlock(each.path, each.layers, change) for each, change in chosen), left)


def select_blocks(graph: Graph, include: Sequence[str], exclude: Sequence[str]) -> list[ResidualBlock]:
    """Return the blocks that the patterns choose.

    Raises:
        UsageError: there are no residual blocks, a pattern fits none, or none is left.
    """
    blocks = blocks_of(graph)
    if not blocks:
        raise UsageError(
            f"expected residual blocks: sums of a tensor and of what was computed from it. "
            f"Received: model {graph.name!r} without any",
            "A sum whose skip has a layer of its own cannot go. prune_channels makes any model narrower.",
        )
    paths = [block.path for block in blocks]
    require_matches(paths, include, "include")
    require_matches(paths, exclude, "exclude")
    chosen = [block for block in blocks if matches(block.path, include) and not matches(block.path, exclude)]
    if not chosen:
        raise UsageError(f"expected a block that may go. Received: include={list(include)}, exclude={list(exclude)}")
    return chosen


def require_choice(
    graph: Graph, blocks: Sequence[ResidualBlock], count: int | None, target: Mapping[str, float] | None
) -> None:
    """Raise UsageError unless there is either a count or a target, and it can be met."""
    if (count is None) == (target is None):
        raise UsageError(f"expected a count or a target. Received: count={count}, target={target}")
    if target is None:
        if not 1 <= count <= len(blocks):
            raise UsageError(
                f"expected a count of 1 to {len(blocks)}, as so many blocks may go. Received: count={count}"
            )
        return
    if len(target) != 1 or not set(target) <= {"parameters", "macs"} or not all(0 < s <= 1 for s in target.values()):
        raise UsageError(
            f"expected a target such as macs: 0.7, a share of parameters or macs. Received: {dict(target)}"
        )
    ((cost, share),) = target.items()
    least = _share(graph, blocks, cost)
    if least > share:
        raise UsageError(
            f"the target cannot be met: the least that can be left is {least:.1%}. Received: {share:.1%}",
            "Raise the target, or let more blocks go.",
        )


def _share(graph: Graph, blocks: Sequence[ResidualBlock], cost: str) -> float:
    place = ("parameters", "macs").index(cost)
    whole = costs_of(graph.nodes)[place]
    return costs_of(needed_nodes(graph, blocks))[place] / whole if whole else 1.0


def _choose(
    graph: Graph,
    blocks: Sequence[ResidualBlock],
    count: int | None,
    target: Mapping[Cost, float] | None,
    split: Split,
    samples: int,
) -> list[tuple[ResidualBlock, float]]:
    """Return the blocks that go, and how far the outputs were off after each."""
    loss = OutputLoss(drop(graph, []), split, samples)
    cost, wanted = next(iter(target.items())) if target else ("macs", 0.0)
    chosen: list[tuple[ResidualBlock, float]] = []
    gone: list[ResidualBlock] = []  # with what is inside of them
    with track("drop blocks", count) as advance:
        while len(gone) != count and not (target and _share(graph, gone, cost) <= wanted):
            now = _share(graph, gone, cost)
            rows = []
            for block in blocks:
                after = [*gone, block]
                if block in gone or (count is not None and len(_without(graph, blocks, after)) > count):
                    continue
                rows.append((block, loss.measure_other(drop(graph, after)), _share(graph, after, cost)))
            if not rows:
                raise UsageError(
                    f"expected a count at which blocks can go one after the other. Received: count={count}, and "
                    f"{len(gone)} are gone when every other takes more with it",
                    f"Ask for {len(gone)} or for more.",
                )
            # A layer that other blocks share is saved with the last of them: until then what goes saves nothing.
            rows = [row for row in rows if row[2] < now] or rows
            best = _best(rows, now, wanted) if target else min(rows, key=lambda row: _harm(row[1], 1.0))
            chosen.append((best[0], best[1]))
            before, gone = len(gone), _without(graph, blocks, [*gone, best[0]])
            advance(len(gone) - before, best[0].path)
    return chosen


def _without(graph: Graph, blocks: Sequence[ResidualBlock], dropped: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    """Return which blocks are gone, as they are dropped or inside of one that is."""
    left = {id(node) for node in needed_nodes(graph, dropped)}
    return [block for block in blocks if id(block.call) not in left]


def _best(rows: list[tuple[ResidualBlock, float, float]], now: float, wanted: float) -> Any:
    """Return the block that goes next on the way to a target.

    Args:
        rows: each block, how far the outputs are off without it, and the share that is left then.
        now: the share that is left with it.
        wanted: the target.
    """
    landing = [row for row in rows if abs(row[2] - wanted) <= TOLERANCE * wanted]
    if landing:
        return min(landing, key=lambda row: row[1])
    if all(row[2] <= wanted for row in rows):
        return max(rows, key=lambda row: row[2])  # whichever goes is the last: the nearest to the target
    return min(rows, key=lambda row: _harm(row[1], now - row[2]))


def _harm(change: float, saved: float) -> float:
    """Return the change of the outputs for what is saved; outputs that are not finite are the worst."""
    return float("inf") if math.isnan(change) else change / (saved or 1.0)
