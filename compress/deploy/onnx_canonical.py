"""One canonical form for equal ONNX graphs, so that exporting a model twice gives the same bytes.

tf2onnx numbers tensors by a counter and orders nodes, and chooses among equal ones, by memory addresses. Here
nodes are ordered from the outputs backwards and everything is named by its place in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx

from compress.deploy.onnx_digests import bodies, sort_loops

_READ_STORED = ("DequantizeLinear", "Cast", "Gather", "MatMulInteger", "ConvInteger")
_MAKE_FLOATS = ("DequantizeLinear", "Cast", "Mul", "Concat")


def canonicalize(model: onnx.ModelProto, layer_of: Callable[[str], str]) -> None:
    """Reorder and rename all of `model` but its inputs and outputs, in place; drop what nothing uses.

    Nodes with weights are named after the Keras layer they come from, all others after their operator.

    Args:
        model: an ONNX model.
        layer_of: returns the path of the layer that a node comes from, from the node's name; empty for none.
    """
    graph = model.graph
    _forget_sizes(graph)
    sort_loops(graph, {value.name: value.name for value in graph.input})
    scope = _Scope(graph, None, _Names({value.name for value in (*graph.input, *graph.output)}), layer_of)
    for value in (*graph.input, *graph.output):
        scope.new_names[value.name] = value.name
    graph.name = "model"
    scope.rewrite()


class _Names:
    """Names that are given to one thing each."""

    def __init__(self, taken: set[str]):
        self._taken, self._counts = set(taken), {}

    def new(self, wish: str, number: bool) -> str:
        while True:
            count = self._counts.get(wish, 0)
            self._counts[wish] = count + 1
            name = f"{wish}_{count}" if number or count else wish
            if name not in self._taken:
                self._taken.add(name)
                return name


class _Scope:
    """A graph while it is rewritten; the body of a loop or branch also sees the graph around it."""

    def __init__(self, graph: onnx.GraphProto, outer: _Scope | None, names: _Names, layer_of: Callable[[str], str]):
        self.graph, self.outer, self.names, self.layer_of = graph, outer, names, layer_of
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.new_names: dict[str, str] = {}
        self.used_initializers: list[str] = []
        self.stored = self._find_stored()

    def rewrite(self) -> None:
        nodes = _ordered_nodes(self.graph)
        for node in nodes:
            self._rewrite_node(node)
        for value in self.graph.output:
            if value.name in self.initializers and value.name in self.new_names:  # an output that is a constant
                self.used_initializers.append(value.name)
            value.name = self.resolve(value.name, "constant", number=True)
        self.used_initializers = list(dict.fromkeys(self.used_initializers))
        constants = [self.initializers[name] for name in self.used_initializers]
        for name, tensor in zip(self.used_initializers, constants, strict=True):
            tensor.name, tensor.doc_string = self.new_names[name], ""
        _replace(self.graph.node, nodes)
        _replace(self.graph.initializer, constants)
        del self.graph.value_info[:]

    def _find_stored(self) -> set[str]:
        """Return the tensors that stored weights are read as: what makes floats out of constant integers or halves."""
        stored: set[str] = set()
        for node in self.graph.node:  # which stand after their inputs
            sources = [name in stored or name in self.initializers for name in node.input if name]
            if node.op_type in _MAKE_FLOATS and sources and all(sources):
                first = node.input[0]
                if first in stored or self._is_weight(first, node.op_type):
                    stored.update(node.output)
        return stored

    def resolve(self, name: str, wish: str, number: bool = False) -> str:
        """Return the new name of a tensor; one without a name yet is an initializer and is named `wish`."""
        if not name:  # an optional input that is left out
            return ""
        if name in self.new_names:
            return self.new_names[name]
        if name in self.initializers:
            self.new_names[name] = self.names.new(wish, number)
            self.used_initializers.append(name)
            return self.new_names[name]
        if self.outer is None:
            raise ValueError(f"tensor {name!r} has no source")
        return self.outer.resolve(name, wish, number)

    def _rewrite_node(self, node: onnx.NodeProto) -> None:
        layer = self.layer_of(node.name) if self._has_weights(node) else ""
        node.name = self.names.new(f"{layer}/{node.op_type}" if layer else node.op_type, number=not layer)
        node.doc_string = ""
        if node.domain in ("", "ai.onnx"):
            node.ClearField("domain")  # unset and empty are the same domain, but not the same bytes
        for i, name in enumerate(node.input):
            node.input[i] = self.resolve(name, f"{node.name}/input_{i}")
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        for attribute in attributes:
            for body in bodies(attribute):
                self._rewrite_body(body, f"{node.name}/{attribute.name}")
        _replace(node.attribute, attributes)
        for i, name in enumerate(node.output):
            if name and name not in self.new_names:
                self.new_names[name] = self.names.new(f"{node.name}:{i}", number=False)
            node.output[i] = self.new_names.get(name, "")

    def _rewrite_body(self, body: onnx.GraphProto, name: str) -> None:
        scope = _Scope(body, self, self.names, self.layer_of)
        body.name = name
        for i, value in enumerate(body.input):
            scope.new_names[value.name] = self.names.new(f"{name}/input_{i}", number=False)
            value.name = scope.new_names[value.name]
        scope.rewrite()

    def _has_weights(self, node: onnx.NodeProto) -> bool:
        return any(name in self.stored or self._is_weight(name, node.op_type) for name in node.input)

    def _is_weight(self, name: str, op_type: str) -> bool:
        tensor = self.initializers.get(name)
        if tensor is None or len(tensor.dims) < 2:
            return False
        return tensor.data_type == onnx.TensorProto.FLOAT or op_type in _READ_STORED


def _forget_sizes(graph: onnx.GraphProto) -> None:
    """Clear the names of open dimensions inside the bodies of loops and branches, which tf2onnx counts up."""
    for body in (body for node in graph.node for attribute in node.attribute for body in bodies(attribute)):
        for value in (*body.input, *body.output):
            for size in value.type.tensor_type.shape.dim:
                if size.HasField("dim_param"):
                    size.ClearField("dim_param")
        _forget_sizes(body)


def _ordered_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that the outputs need, each after its inputs, in an order that depends on no name."""
    sources = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    order: list[onnx.NodeProto] = []
    state: dict[int, bool] = {}  # node -> whether it is finished
    stack = [sources[value.name] for value in reversed(graph.output) if value.name in sources]
    while stack:
        i = stack[-1]
        if i in state:
            stack.pop()
            if not state[i]:
                state[i] = True
                order.append(graph.node[i])
            continue
        state[i] = False
        needed = [sources[name] for name in _references(graph.node[i]) if name in sources]
        stack.extend(j for j in reversed(needed) if j not in state)
    return [_copy(node) for node in order]


def _references(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that a node reads, also inside its bodies, with names of the bodies' own."""
    yield from node.input
    for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
        for body in bodies(attribute):
            for inner in _ordered_nodes(body):
                yield from _references(inner)
            yield from (value.name for value in body.output)


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _replace(target: Any, items: list[Any]) -> None:
    copies = [_copy(item) for item in items]
    del target[:]
    target.extend(copies)
