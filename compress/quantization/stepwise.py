"""Runs a graph call by call, each over all batches, so that a layer can be changed before later ones see its outputs.

What layer-by-layer methods (bias correction, AdaRound, GPTQ, AWQ) have in common: the inputs of each layer in the
model as it is so far. Outputs are dropped when no later call reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from compress.data.split import Split, as_split
from compress.errors import DataError
from compress.models.graph import Graph, Node


class StepwiseRun:
    """The values of a graph's tensors, for all batches.

    Args:
        graph: the graph; run its nodes in order, `outputs` and then `keep`.
        batches: for each batch, a value for each input of the model; see `batches_for`.
    """

    def __init__(self, graph: Graph, batches: list[list[Any]]):
        tensors = _symbolic(graph.inputs)
        self._count = len(batches)
        self._values = {id(tensor): [batch[i] for batch in batches] for i, tensor in enumerate(tensors)}
        self._last = {id(tensor): node for node in graph.nodes for tensor in node.inputs}

    def inputs(self, node: Node) -> list[Any]:
        """Return the first tensor that a call reads, for each batch."""
        return list(self._values[id(node.inputs[0])])

    def outputs(self, node: Node, operation: keras.Operation | None = None) -> list[Any]:
        """Make a call, with another operation if one is given, and return its outputs for each batch."""
        return [self._call(node, operation or node.operation, k) for k in range(self._count)]

    def keep(self, node: Node, outputs: list[Any]) -> None:
        """Remember the outputs of a call that later ones read, and drop the inputs that none reads any more."""
        given = [keras.tree.flatten(output) for output in outputs]
        for i, tensor in enumerate(_symbolic(node.outputs)):
            if id(tensor) in self._last:
                self._values[id(tensor)] = [each[i] for each in given]
        for tensor in node.inputs:
            if self._last[id(tensor)] is node:
                self._values.pop(id(tensor), None)

    def _call(self, node: Node, operation: keras.Operation, batch: int) -> Any:
        def look_up(value: Any) -> Any:
            return self._values[id(value)][batch] if isinstance(value, keras.KerasTensor) else value

        args, kwargs = keras.tree.map_structure(look_up, (node.args, node.kwargs))
        return operation(*args, **kwargs)


def batches_for(graph: Graph, x: Any, batch_size: int) -> list[list[Any]]:
    """Return for each batch of `x` a tensor for each input of the model.

    Args:
        graph: the graph.
        x: samples as the model takes them: an array, or a list or dict of arrays, samples first.
        batch_size: samples in each batch but the last.

    Raises:
        DataError: the arrays do not fit the inputs, or there are no samples.
    """
    tensors = _symbolic(graph.inputs)
    arrays = list(_arrays(graph, tensors, x))
    samples = {len(array) for array in arrays}
    if len(arrays) != len(tensors) or len(samples) != 1 or not min(samples):
        raise DataError(
            f"expected samples for {len(tensors)} inputs, as many for each and at least one. Received: arrays of "
            f"shape {[np.shape(array) for array in arrays]}"
        )
    return [
        [
            keras.ops.convert_to_tensor(array[start : start + batch_size], dtype=tensor.dtype)
            for array, tensor in zip(arrays, tensors, strict=True)
        ]
        for start in range(0, samples.pop(), batch_size)
    ]


def take_samples(data: Any, samples: int, seed: int = 0) -> Any:
    """Return the inputs of up to `samples` samples in memory: random ones of arrays, the first ones of a stream.

    Raises:
        DataError: there are none.
    """
    if data is None:
        raise DataError("this needs samples. Received: data=None", "Pass a few hundred inputs, without labels.")
    split = data if isinstance(data, Split) else as_split("calibration", data)
    return split.sample(samples, seed).head(samples)[0]


def _arrays(graph: Graph, tensors: list[keras.KerasTensor], x: Any) -> Iterator[Any]:
    if not isinstance(x, dict):
        return iter(x if isinstance(x, (list, tuple)) else [x])
    keys = {id(tensor): key for key, tensor in graph.inputs.items()} if isinstance(graph.inputs, dict) else {}
    names = [keys.get(id(tensor), tensor.name) for tensor in tensors]
    if missing := [name for name in names if name not in x]:
        raise DataError(f"expected samples for the inputs {missing}. Received: {sorted(x)}")
    return (x[name] for name in names)


def _symbolic(structure: Any) -> list[keras.KerasTensor]:
    return [item for item in keras.tree.flatten(structure) if isinstance(item, keras.KerasTensor)]
