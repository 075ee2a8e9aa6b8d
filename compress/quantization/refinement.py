"""What methods that round a fake-quantized model layer by layer share: which layers they take, and what they report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras

from compress.errors import UsageError
from compress.models.graph import Graph, Node, trace_graph
from compress.models.walking import Skipped
from compress.quantization.clustered import is_clustered
from compress.quantization.layers import FakeQuant, QuantizedLayer
from compress.quantization.weight_format import WeightFormat

Reason = str


@dataclass(frozen=True)
class RoundedLayer:
    """What rounding did to one layer.

    Args:
        path: path of the layer in the model.
        error: mean squared error of its outputs on the calibration samples, in units of the output squared.
        nearest_error: the same with every weight rounded to the nearest point of the same grid.
    """

    path: str
    error: float
    nearest_error: float


@dataclass(eq=False)
class RoundingTask:
    """A layer whose one quantized weight is to be rounded.

    Args:
        layer: the wrapper.
        weight: name of the weight.
        calls: the calls of the layer, in order.
    """

    layer: QuantizedLayer
    weight: str
    calls: list[Node]

    @property
    def path(self) -> str:
        """Path of the layer in the model."""
        return self.layer.path_in_model

    @property
    def form(self) -> WeightFormat:
        """The format of the weight."""
        return self.layer.formats[self.weight]


def plan_rounding(
    model: keras.Model, method: str, refuse: Callable[[QuantizedLayer], Reason | None]
) -> tuple[Graph, list[RoundingTask], list[Skipped]]:
    """Return the graph of a fake-quantized model, the layers that `method` can round, and the others with a reason.

    Args:
        model: a fake-quantized model.
        method: what errors call the method.
        refuse: returns why the method cannot round a layer that has one integer weight, or `None`.

    Raises:
        UsageError: there is no layer that it can round.
    """
    graph = trace_graph(model)
    tasks: list[RoundingTask] = []
    skipped: list[Skipped] = []
    wrappers = {
        id(node.operation): node.operation for node in graph.nodes if isinstance(node.operation, QuantizedLayer)
    }
    for layer in wrappers.values():
        calls = graph.calls(layer)
        if reason := _reason(layer, calls) or refuse(layer):
            skipped.append(Skipped(layer.path_in_model, reason))
        else:
            tasks.append(RoundingTask(layer, next(iter(layer.formats)), calls))
    if not tasks:
        listed = "; ".join(f"{each.path}: {each.reason}" for each in skipped[:10]) or "no layer is quantized"
        raise UsageError(f"expected a layer that {method} can round. Received: model {model.name!r} ({listed})")
    return graph, tasks, skipped


def float_operation(operation: keras.Operation) -> Callable | None:
    """Return what a call of a fake-quantized model is in float: a layer without its quantized weights, or nothing."""
    if isinstance(operation, FakeQuant):
        return lambda x, **options: x
    return operation.layer if isinstance(operation, QuantizedLayer) else operation


def with_weight(layer: QuantizedLayer, name: str) -> Callable:
    """Return `forward(values, x)`: the float layer inside `layer`, with other values of one weight."""
    variable = layer.weight_variable(name)

    def forward(values: object, x: object) -> object:
        mapping = [(variable, keras.ops.cast(values, variable.dtype))]
        with keras.StatelessScope(state_mapping=mapping):
            return layer.layer(x)

    return forward


def _reason(layer: QuantizedLayer, calls: list[Node]) -> Reason | None:
    inside = [node for node in calls if len(node.inputs) != 1 or len(node.args) != 1]
    if len(layer.formats) != 1:
        return "has several quantized weights"
    if isinstance(layer.layer, keras.layers.Embedding):
        return "is a table: its rows are its outputs"
    if next(iter(layer.formats.values())).dtype != "int":
        return "is stored as floats"
    if is_clustered(layer, next(iter(layer.formats))):
        return "is clustered: its clusters would be split"
    return "is called with more than one tensor" if inside else None
