"""Which channels of a model go together: units that stay or go as a whole, and groups that a ratio applies to.

A unit is every place, in whatever tensor and weight, that a removed channel takes with it. Units whose channels equal
layers make are ranked together (a *block*); blocks that share a maker are one group. Source of dependency groups: Fang
et al. 2023 (DepGraph), arXiv:2301.12900; here axes carry atoms, so joins and sums of joins need no case of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from compress.channels import (  # noqa: F401  (they register their rules)
    rules_attention,
    rules_elementwise,
    rules_linear,
    rules_operations,
    rules_recurrent,
    rules_shape,
)
from compress.channels.atoms import Atoms, Axes, Norm
from compress.channels.probing import probe_layer
from compress.channels.rules import apply_rule, find_rule, freeze_all, output_tensors
from compress.models.graph import Graph, read_graph, require_float


@dataclass(frozen=True, eq=False)
class Block:
    """Units that the same layers make.

    Args:
        producers: paths of these layers.
        units: its units, in the order of the first layer's channels.
    """

    producers: tuple[str, ...]
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Blocks that share a layer that makes their channels.

    Args:
        producers: paths of the layers that make them.
        readers: paths of the layers whose weights read them.
        blocks: what is ranked together.
    """

    producers: tuple[str, ...]
    readers: tuple[str, ...]
    blocks: tuple[Block, ...]

    @property
    def size(self) -> int:
        """Number of units."""
        return sum(len(block.units) for block in self.blocks)


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """The groups of a model.

    Args:
        graph: the calls of the model; its layers hold the weights that `atoms` speaks of.
        atoms: all atoms.
        groups: what can be removed.
        frozen: reason by path of each layer some of whose channels must stay.
    """

    graph: Graph
    atoms: Atoms
    groups: tuple[Group, ...]
    frozen: dict[str, str]

    def describe(self) -> list[dict[str, Any]]:
        """Return a row for each group, and one for each layer whose channels must stay."""
        rows: list[dict[str, Any]] = [
            {"layers": list(group.producers), "channels": group.size, "read_by": list(group.readers), "frozen": None}
            for group in self.groups
        ]
        for path, reason in self.frozen.items():
            rows.append({"layers": [path], "channels": None, "read_by": [], "frozen": reason})
        return rows


def find_channel_groups(model: keras.Model, *, norm: Norm = "freeze", probe: bool = False) -> ChannelGroups:
    """Return the channel groups of a functional or sequential model; nested ones are opened.

    Args:
        model: a float model; it is not changed.
        norm: `"freeze"` keeps the channels that a LayerNormalization, RMSNormalization or GroupNormalization norms
            over: without some of them their statistics differ. `"allow"` removes them all the same, and training has
            to recover.
        probe: whether layers without a rule are tried out: built again for fewer channels, which runs their code.

    Raises:
        UsageError: the model is fake-quantized.
        ModelError: the calls of the model are known to Python alone.
    """
    graph = read_graph(require_float(model, "Prune channels before you quantize."))
    atoms = best = _follow(graph, norm, {}, probe)
    choices: dict[tuple[str, int], int] = {}
    while changes := _other_choices(atoms):
        choices |= changes
        atoms = _follow(graph, norm, choices, probe)
        best = max((best, atoms), key=_count_free)
    return ChannelGroups(graph, best, tuple(_group(best)), _frozen_layers(best))


def _other_choices(atoms: Atoms) -> dict[tuple[str, int], int]:
    """Return the next choice for each divided axis whose channels all stay with the one that was made."""
    frozen = set(atoms.frozen_units())
    return {
        key: split.chosen + 1
        for key, split in atoms.splits.items()
        if split.chosen + 1 < len(split.candidates) and set(atoms.units(split.atoms).tolist()) <= frozen
    }


def _count_free(atoms: Atoms) -> int:
    """Return how many units may go."""
    made = [atoms.units(producer.atoms) for producer in atoms.producers]
    return len(set(np.concatenate(made or [np.zeros(0, np.int64)]).tolist()) - set(atoms.frozen_units()))


def _follow(graph: Graph, norm: Norm, choices: Mapping[tuple[str, int], int], probe: bool) -> Atoms:
    """Return the atoms of a graph after all of its calls."""
    atoms = Atoms(norm, choices)
    axes: dict[int, Axes] = {id(tensor): [None] * len(tensor.shape) for tensor in _tensors(graph.inputs)}
    for node in graph.nodes:
        inputs = [axes[id(tensor)] for tensor in node.inputs]
        count = atoms.count
        try:
            probed = probe_layer(node, inputs, atoms) if probe and find_rule(node) is None else None
            outputs = probed or apply_rule(node, inputs, atoms)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            # A call that the rule was not made for, or a rule of the user's own; what is not understood stays as it is.
            reason = f"{node.path} ({node.kind}): {type(error).__name__} in its rule"
            atoms.freeze_since(count, reason)
            outputs = freeze_all(node, inputs, atoms, reason)
        axes.update((id(tensor), own) for tensor, own in zip(output_tensors(node), outputs, strict=True))
    for tensor in _tensors(graph.outputs):
        for axis in axes[id(tensor)]:
            atoms.freeze(axis, "is an output of the model")
    return atoms


def _tensors(structure: Any) -> list[keras.KerasTensor]:
    return [each for each in keras.tree.flatten(structure) if isinstance(each, keras.KerasTensor)]


def _group(atoms: Atoms) -> list[Group]:
    frozen = atoms.frozen_units()
    makers: dict[int, dict[str, None]] = {}
    for producer in atoms.producers:
        for unit in atoms.units(producer.atoms).tolist():
            if unit not in frozen:
                makers.setdefault(unit, {})[producer.path] = None
    blocks: dict[tuple[str, ...], list[int]] = {}
    for unit, paths in makers.items():
        blocks.setdefault(tuple(paths), []).append(unit)
    readers: dict[int, dict[str, None]] = {}
    for weight in atoms.weights:
        if weight.role == "reads":
            for unit in np.unique(atoms.units(weight.atoms)).tolist():
                readers.setdefault(unit, {})[weight.path] = None
    groups = []
    for members in _connected(list(blocks)):
        own = [Block(paths, np.array(blocks[paths], np.int64)) for paths in members]
        units = [unit for block in own for unit in block.units.tolist()]
        reading = dict.fromkeys(path for unit in units for path in readers.get(unit, ()))
        producers = dict.fromkeys(path for paths in members for path in paths)
        groups.append(Group(tuple(producers), tuple(reading), tuple(own)))
    return groups


def _connected(keys: list[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Return the keys in lists of those that share a name, directly or through others."""
    parts: list[tuple[set[str], list[tuple[str, ...]]]] = []
    for key in keys:
        joined = [part for part in parts if part[0] & set(key)]
        names, members = set(key), []
        for part in joined:
            names |= part[0]
            members += part[1]
            parts.remove(part)
        parts.append((names, [*members, key]))
    return [members for _, members in parts]


def _frozen_layers(atoms: Atoms) -> dict[str, str]:
    frozen = atoms.frozen_units()
    found: dict[str, str] = {}
    for producer in atoms.producers:
        for unit in atoms.units(producer.atoms).tolist():
            if unit in frozen:
                found.setdefault(producer.path, frozen[unit])
                break
    return found
