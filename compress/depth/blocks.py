"""Residual blocks of a model: sums of a tensor and of what was computed from it (He et al. 2016, arXiv:1512.03385).

Without its branch such a sum is the tensor itself, and whatever only the branch needed is gone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import keras

from compress.models.call_macs import count_call_macs
from compress.models.graph import Graph, Node, copy_graph, repeat, require_float, rewrite_graph


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """A sum whose branch can go.

    Args:
        path: path of the sum, by which the block is called.
        layers: paths of the layers with weights that only the branch needs.
        parameters: what they hold.
        macs: multiply-accumulates of what only the branch needs, as far as they are known.
        call: the sum.
        skip: which operand stays.
    """

    path: str
    layers: tuple[str, ...]
    parameters: int
    macs: int
    call: Node
    skip: int


def find_blocks(model: keras.Model) -> list[ResidualBlock]:
    """Return the residual blocks of a functional or sequential model, in order; nested models are opened.

    Raises:
        UsageError: the model is fake-quantized.
        ModelError: the calls of the model are known to Python alone.
    """
    return blocks_of(open_graph(model))


def open_graph(model: keras.Model) -> Graph:
    """Return the graph of a copy of a float model, or raise what `find_blocks` does."""
    return copy_graph(require_float(model, "Drop blocks before you quantize."))


def blocks_of(graph: Graph) -> list[ResidualBlock]:
    """Return the residual blocks of a graph, in order."""
    ancestors = _ancestors(graph)
    found = []
    for node in graph.nodes:
        operands = node.inputs
        if node.kind != "Add" or len(operands) != 2 or operands[0].shape != operands[1].shape:
            continue
        for skip, branch in ((0, 1), (1, 0)):
            if id(operands[skip]) in ancestors[id(operands[branch])]:
                found.append(_describe(graph, node, skip))
    return [block for block in found if block.layers or block.macs]


def drop(graph: Graph, blocks: Collection[ResidualBlock]) -> keras.Model:
    """Return a model in which the sums of these blocks are their skips; it shares the layers of `graph`."""
    skips = {id(block.call): block.skip for block in blocks}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if id(node) not in skips:
            return repeat(node, *args, **kwargs)
        return [each for each in keras.tree.flatten((args, kwargs)) if isinstance(each, keras.KerasTensor)][
            skips[id(node)]
        ]

    return rewrite_graph(graph, call)


def needed_nodes(graph: Graph, blocks: Collection[ResidualBlock]) -> list[Node]:
    """Return the calls that the outputs need without these blocks, in order."""
    skips = {id(block.call): block.skip for block in blocks}
    wanted = {id(each) for each in keras.tree.flatten(graph.outputs)}
    found = []
    for node in reversed(graph.nodes):
        outputs = [each for each in keras.tree.flatten(node.outputs) if isinstance(each, keras.KerasTensor)]
        if not any(id(each) in wanted for each in outputs):
            continue
        if id(node) in skips:
            wanted.add(id(node.inputs[skips[id(node)]]))
            continue
        wanted.update(id(each) for each in node.inputs)
        found.append(node)
    return found[::-1]


def costs_of(nodes: Collection[Node]) -> tuple[int, int]:
    """Return the parameters of the layers that are called, and the known multiply-accumulates of the calls."""
    layers = {id(node.operation): node.operation for node in nodes if isinstance(node.operation, keras.Layer)}
    variables = {id(variable): variable for layer in layers.values() for variable in layer.weights}
    parameters = sum(int(keras.ops.size(variable)) for variable in variables.values())
    return parameters, sum(count_call_macs(node) or 0 for node in nodes)


def _describe(graph: Graph, node: Node, skip: int) -> ResidualBlock:
    block = ResidualBlock(node.path, (), 0, 0, node, skip)
    kept = needed_nodes(graph, [block])
    ids, operations = {id(each) for each in kept}, {id(each.operation) for each in kept}
    gone = [each for each in graph.nodes if id(each) not in ids]
    lost = [each for each in gone if id(each.operation) not in operations]  # a shared layer may go on elsewhere
    layers = dict.fromkeys(each.path for each in lost if getattr(each.operation, "weights", ()))
    return ResidualBlock(node.path, tuple(layers), costs_of(lost)[0], costs_of(gone)[1], node, skip)


def _ancestors(graph: Graph) -> dict[int, set[int]]:
    """Return by `id` of each tensor those that it was computed from."""
    found: dict[int, set[int]] = {id(each): set() for each in keras.tree.flatten(graph.inputs)}
    for node in graph.nodes:
        own: set[int] = set()
        for tensor in node.inputs:
            own |= found[id(tensor)] | {id(tensor)}
        found.update((id(each), own) for each in keras.tree.flatten(node.outputs))
    return found
