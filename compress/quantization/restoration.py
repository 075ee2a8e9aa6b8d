"""Layers of a fake-quantized model go back to float, with what they have learned."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras

from compress.errors import UsageError
from compress.models.copying import copy_model
from compress.models.graph import Node, rewrite_graph, trace_graph
from compress.quantization.layers import FakeQuant, QuantizedLayer
from compress.quantization.planning import read_or_written_in_integers
from compress.quantization.rules import kind_of


def quantized_layers(model: keras.Model) -> list[str]:
    """Return the paths of the layers of a fake-quantized model whose weights are quantized, in order."""
    nodes = {id(node.operation): node for node in trace_graph(model).nodes}.values()
    return [node.operation.path_in_model for node in nodes if isinstance(node.operation, QuantizedLayer)]


def end_layers(model: keras.Model) -> list[str]:
    """Return the paths of the quantized layers that read inputs of a model or make its outputs.

    A file can take and return integers only while these are quantized.
    """
    graph = trace_graph(model)
    ends = {id(node): node for node in map(graph.producer, keras.tree.flatten(graph.outputs)) if node}
    waiting = list(ends.values())
    while waiting:  # from an output back through what follows its layer, such as a softmax
        node = waiting.pop()
        before = graph.producer(node.inputs[0]) if len(node.inputs) == 1 else None
        if before is not None and not isinstance(node.operation, QuantizedLayer):
            ends[id(before)] = before
            waiting.append(before)
    for node in graph.nodes:
        before = graph.producer(node.inputs[0]) if node.inputs else None
        if before is None or (isinstance(before.operation, FakeQuant) and graph.producer(before.inputs[0]) is None):
            ends[id(node)] = node
    return [node.operation.path_in_model for node in ends.values() if isinstance(node.operation, QuantizedLayer)]


def restore_layers(model: keras.Model, paths: Collection[str]) -> keras.Model:
    """Return a copy of a fake-quantized model in which some layers compute in float again.

    Activations stay quantized where an integer kernel still reads or writes them; with every layer restored, none are.

    Args:
        model: a fake-quantized model; it is not changed.
        paths: paths as `quantized_layers` gives them.

    Raises:
        UsageError: a path is not one of a quantized layer.
    """
    known = quantized_layers(model)
    if unknown := sorted(set(paths) - set(known)):
        raise UsageError(f"expected paths of quantized layers ({', '.join(known[:20])}). Received: {unknown[0]!r}")
    graph = trace_graph(copy_model(model))
    wrappers = [node.operation for node in graph.nodes if isinstance(node.operation, QuantizedLayer)]
    restored = {id(layer) for layer in wrappers if layer.path_in_model in paths}
    float_already = {id(node.operation) for node in graph.nodes if _is_float_kernel(node)}
    is_integer = read_or_written_in_integers(graph, restored | float_already)
    everything = set(paths) == set(known)

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.operation
        if isinstance(layer, FakeQuant):
            readers = [reader.operation for reader in graph.consumers(node.output)]
            is_read = any(isinstance(each, QuantizedLayer) and id(each) not in restored for each in readers)
            stays = is_read if layer.dynamic else is_integer(node.output)
            return layer(*args, **kwargs) if stays and not everything else args[0]
        if id(layer) in restored:
            layer.layer.name = layer.name  # an output's name may have gone to a later operation
            return layer.layer(*args, **kwargs)
        return layer(*args, **kwargs)

    return rewrite_graph(graph, call)


def _is_float_kernel(node: Node) -> bool:
    """Return whether a call could have been quantized and was left out, or restored before."""
    return kind_of(node) in ("kernel", "table") and not isinstance(node.operation, QuantizedLayer)
