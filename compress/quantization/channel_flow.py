"""How channels travel from one layer to the next, through calls that treat each channel for itself, in one table.

Also building a graph again with some of its operations exchanged or taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from compress.models.graph import Graph, Node, rewrite_graph

_SAME = {"Identity", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D"}
_COPYING = {f"{kind}{n}D" for kind in ("Cropping", "UpSampling") for n in (1, 2, 3)}
_AVERAGING = {f"{kind}{n}D" for kind in ("AveragePooling", "GlobalAveragePooling") for n in (1, 2, 3)}
_MAXIMUM = {f"{kind}{n}D" for kind in ("MaxPooling", "GlobalMaxPooling") for n in (1, 2, 3)}
_PADDING = {"ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D"}
_SPATIAL = _COPYING | _AVERAGING | _MAXIMUM | _PADDING


@dataclass(frozen=True)
class ChannelTensor:
    """A tensor and where its channels lie.

    Args:
        tensor: the tensor.
        axis: its channel axis, batch included.
        count: number of channels; index i along the axis belongs to channel `i % count`.
    """

    tensor: keras.KerasTensor
    axis: int
    count: int

    @property
    def rank(self) -> int:
        """Rank of the tensor, batch included."""
        return len(self.tensor.shape)


Passes = Callable[[Node], bool]


def passes_affine(node: Node) -> bool:
    """Return whether a call of one tensor commutes with a factor and an offset for each channel.

    Dropout does where it is off, as it is when a model predicts.
    """
    kind = _kind(node)
    if kind.startswith("AveragePooling"):
        return node.operation.padding == "valid"
    return kind in _SAME | _COPYING | _AVERAGING or kind in ("Flatten", "Reshape") or _is_linear(node)


def passes_positive(node: Node) -> bool:
    """Return whether a call of one tensor commutes with a positive factor for each channel."""
    kind = _kind(node)
    return kind in _SAME | _SPATIAL or kind in ("Flatten", "Reshape") or _is_linear(node) or is_rectifier(node)


def is_rectifier(node: Node) -> bool:
    """Return whether a call is a ReLU without an upper limit, leaky or not: f(s x) = s f(x) for s > 0."""
    kind, operation = _kind(node), node.operation
    if kind == "ReLU":
        return operation.max_value is None and operation.threshold == 0
    return kind in ("LeakyReLU", "Relu") or (kind == "Activation" and operation.activation is keras.activations.relu)


def follow(graph: Graph, start: ChannelTensor, passes: Passes) -> tuple[Node, ChannelTensor] | None:
    """Return the first call after `start` that is not passed, with the tensor that it reads.

    `None` where a tensor on the way is read several times, is an output of the model, or its channels get lost.
    """
    current = start
    while (node := graph.only_consumer(current.tensor)) is not None:
        if len(node.inputs) != 1:
            return None
        if not passes(node):
            return node, current
        moved = _after(node, current)
        if moved is None:
            return node, current
        current = moved
    return None


def substitute(graph: Graph, replacements: dict[int, keras.Operation], dropped: set[int]) -> Graph:
    """Return `graph` with operations exchanged; everything else is shared.

    Args:
        graph: the graph.
        replacements: the new operation for the `id` of an old one; both take one tensor and nothing else.
        dropped: the `id` of each call of one tensor that is left out.
    """
    nodes: list[Node] = []

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if id(node) in dropped:
            return _only_tensor(args, kwargs)
        operation = replacements.get(id(node.operation), node.operation)
        if operation is not node.operation:
            args, kwargs = (_only_tensor(args, kwargs),), {}
        outputs = operation(*args, **kwargs)
        nodes.append(Node(node.path, operation, args, kwargs, outputs))
        return outputs

    model = rewrite_graph(graph, call)
    return Graph(graph.name, model.input, model.output, nodes)


def _only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> keras.KerasTensor:
    return next(item for item in keras.tree.flatten((args, kwargs)) if isinstance(item, keras.KerasTensor))


def _kind(node: Node) -> str:
    """Return the name of Keras' own class, or nothing for a class that a user wrote."""
    return node.kind if type(node.operation).__module__.startswith("keras.") else ""


def _is_linear(node: Node) -> bool:
    return _kind(node) == "Activation" and node.operation.activation is keras.activations.linear


def _after(node: Node, before: ChannelTensor) -> ChannelTensor | None:
    """Return where the channels lie after a call that is passed."""
    rank, output, kind = before.rank, node.output, node.kind
    last = before.axis == rank - 1
    if kind in ("Flatten", "Reshape"):
        # With channels last, features of one channel lie `count` apart, however the values are cut into rows.
        kept = last and getattr(node.operation, "data_format", None) != "channels_first"
        features = output.shape[-1]
        divided = features is not None and features % before.count == 0
        return ChannelTensor(output, len(output.shape) - 1, before.count) if kept and divided else None
    if kind in _SPATIAL:
        first = getattr(node.operation, "data_format", "channels_last") == "channels_first"
        if before.axis != (1 if first else rank - 1):
            return None
    return ChannelTensor(output, before.axis if len(output.shape) == rank else len(output.shape) - 1, before.count)
