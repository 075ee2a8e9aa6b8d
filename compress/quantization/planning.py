"""Where activations are quantized: which tensors of a graph share one quantizer, and where it stands.

Follows what the integer kernels of LiteRT and ONNX Runtime fuse and demand, so that both files run in
integers with the scales that training has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import keras

from compress.models.graph import Graph, Node
from compress.quantization.rules import Kind, fixed_range, kind_of

_INTEGER = ("kernel", "value", "fixed", "relu", "average")


@dataclass(eq=False)
class QuantizerPlan:
    """Tensors with one scale.

    Args:
        places: the tensors behind which the quantizer stands; the others of its group carry its numbers on.
        fixed: a prescribed range, or `None` for one that is found from data.
    """

    places: list[keras.KerasTensor] = field(default_factory=list)
    fixed: tuple[float, float] | None = None


def read_or_written_in_integers(graph: Graph, left_float: set[int]) -> Callable[[keras.KerasTensor], bool]:
    """Return a function that says whether a tensor is one that an integer kernel reads or writes.

    Args:
        graph: a graph, perhaps of a fake-quantized model.
        left_float: the `id` of each operation that shall compute in float.
    """
    planner = _Planner(graph, left_float)
    groups = planner.integer_groups()
    return lambda tensor: planner.group_of(tensor) in groups


def plan_activations(graph: Graph, left_float: set[int]) -> list[QuantizerPlan]:
    """Return the quantizers that the activations of `graph` need.

    Args:
        graph: a graph, expanded and with batch norm folded.
        left_float: the `id` of each operation that shall compute in float although it need not.
    """
    return _Planner(graph, left_float).plan()


class _Planner:
    def __init__(self, graph: Graph, left_float: set[int]):
        self._graph, self._left_float = graph, left_float
        self._parent: dict[int, int] = {}
        self._kinds: dict[int, Kind] = {}
        for node in graph.nodes:
            self._kinds[id(node)] = self._kind(node)

        for node in graph.nodes:
            if self._kinds[id(node)] in ("same", "average", "join"):
                tensors = [tensor for tensor in (*node.inputs, *_outputs(node)) if _is_float(tensor)]
                for tensor in tensors[1:]:
                    self._parent[self.group_of(tensor)] = self.group_of(tensors[0])

    def plan(self) -> list[QuantizerPlan]:
        """Return one quantizer for each group of tensors with one scale that an integer kernel reads or writes."""
        plans: dict[int, QuantizerPlan] = {}
        for tensor, node in self._sources():
            plan = plans.setdefault(self.group_of(tensor), QuantizerPlan())
            # Two sources, such as a softmax beside a tanh, cannot keep the range of one.
            plan.fixed = fixed_range(node) if node and not plan.places else None
            plan.places.append(tensor)
        integer = self.integer_groups()
        tables = {self.group_of(node.output) for node in self._graph.nodes if self._kinds[id(node)] == "table"}
        return [
            plan
            for group, plan in plans.items()
            if group in integer and not (group in tables and len(plan.places) == 1)  # has the scale of the table
        ]

    def integer_groups(self) -> set[int]:
        """Return the groups of tensors that an integer kernel reads or writes."""
        nodes = [node for node in self._graph.nodes if self._kinds[id(node)] in _INTEGER]
        tensors = [tensor for node in nodes for tensor in (*node.inputs, *_outputs(node))]
        return {self.group_of(tensor) for tensor in tensors if _is_float(tensor)}

    def group_of(self, tensor: keras.KerasTensor) -> int:
        """Return the group of tensors with one scale that `tensor` is in."""
        key = id(tensor)
        while self._parent.get(key, key) != key:
            key = self._parent[key]
        return key

    def _sources(self) -> list[tuple[keras.KerasTensor, Node | None]]:
        """Return the tensors with new values, each with the call that made it."""
        inputs = [(tensor, None) for tensor in keras.tree.flatten(self._graph.inputs)]
        outputs = [
            (tensor, node)
            for node in self._graph.nodes
            if self._kinds[id(node)] not in ("same", "join") and not self._is_fused(node)
            for tensor in _outputs(node)
        ]
        return [(tensor, node) for tensor, node in inputs + outputs if _is_float(tensor)]

    def _is_fused(self, node: Node) -> bool:
        """Return whether the numbers behind a call never exist, because the ReLU behind it is a part of its kernel."""
        if self._kinds[id(node)] not in ("kernel", "value"):
            return False
        reader = self._graph.only_consumer(node.output)
        return reader is not None and self._kinds[id(reader)] == "relu"

    def _kind(self, node: Node) -> Kind:
        kind = kind_of(node)
        if kind in ("same", "join"):
            return kind  # what moves numbers around computes nothing that could be left float
        if kind == "relu":
            producer = self._graph.producer(node.inputs[0])
            if producer and self._kinds[id(producer)] == "float":
                return "float"  # fused into the float operation before it
        return "float" if id(node.operation) in self._left_float else kind


def _outputs(node: Node) -> list[keras.KerasTensor]:
    return [item for item in keras.tree.flatten(node.outputs) if isinstance(item, keras.KerasTensor)]


def _is_float(tensor: keras.KerasTensor) -> bool:
    return "float" in keras.backend.standardize_dtype(tensor.dtype)
