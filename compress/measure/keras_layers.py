"""The outputs of every layer call of a `.keras` file; nested models are opened, shared layers are there per call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import keras
import numpy as np

from compress.deploy.runtimes import FileRuntime, one_line
from compress.deploy.signature import name_outputs, pack_inputs, read_signature
from compress.errors import DataError, ModelError
from compress.measure.layer_outputs import Lineage, Observed
from compress.models.graph import Graph, Node, trace_graph
from compress.models.opening import load_model

FAKE_QUANTIZERS = {"FakeQuant"}
"""Classes whose output stands for that of the layer before them."""

_QUANTIZED_WRAPPERS = {"QuantizedLayer"}
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class KerasLayers(FileRuntime):
    """A loaded `.keras` file that returns what each of its layer calls returns."""

    name = "keras"

    def __init__(self, path: Path):
        self._path = path
        model = load_model(path)
        signature = read_signature(model)
        super().__init__(signature.inputs, (), None)
        self.notes: tuple[str, ...] = ()
        graph = _trace(model)
        if graph is None:
            self.notes = (
                f"{path.name}: the calls of {type(model).__name__} {model.name!r} are known to Python alone, so only "
                "its outputs can be compared",
            )
            self._use_outputs(model, signature)
        else:
            self._use_graph(graph)
        self.layers = tuple(dict.fromkeys(tensor.labels[0] for tensor in self.tensors)) if graph else ()

    def _use_graph(self, graph: Graph) -> None:
        calls, seen = Counter(_path(node) for node in graph.nodes), Counter()
        lineage, symbolic = Lineage(), []
        for node in graph.nodes:
            path = _path(node)
            seen[path] += 1
            call = f" (call {seen[path]})" if calls[path] > 1 else ""
            for number, tensor in enumerate(_tensors(node.outputs)):
                inputs = [id(value) for value in node.inputs]
                if not _is_float(tensor) or _stands_for_its_input(graph, node):
                    lineage.skip(id(tensor), inputs)
                    continue
                name = f"{path}:{number}{call}" if number else f"{path}{call}"
                symbolic.append(_final(graph, tensor))
                lineage.add(id(tensor), inputs, _describe(name, node, graph.is_output(symbolic[-1])))
        self.tensors = tuple(lineage.tensors)
        functional = keras.Model(keras.tree.flatten(graph.inputs), symbolic)
        kinds = {node.kind for node in graph.nodes}
        self.quantized = bool(kinds & (FAKE_QUANTIZERS | _QUANTIZED_WRAPPERS)) or _stores_integers(functional)
        self._step = self._compile(lambda *flat: functional(list(flat), training=False))

    def _use_outputs(self, model: keras.Model, signature: Any) -> None:
        def call(*flat: Any) -> list[Any]:
            outputs = model(pack_inputs(signature, list(flat)), training=False)
            self._names = name_outputs(model, outputs)
            return keras.tree.flatten(outputs)

        self._names: list[str] = []
        call(*(np.zeros((1, *(size or 1 for size in info.shape[1:])), info.dtype) for info in self.inputs))
        self.tensors = tuple(Observed(name, type(model).__name__, (name,), (), True) for name in self._names)
        self.quantized = _stores_integers(model)
        self._step = self._compile(call)

    def _compile(self, call: Any) -> Any:
        if keras.backend.backend() != "tensorflow":
            return call
        import tensorflow as tf

        step = tf.function(call, input_signature=[tf.TensorSpec(info.shape, info.dtype) for info in self.inputs])
        return lambda *flat: step(*(tf.convert_to_tensor(array) for array in flat))

    def _invoke(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        try:
            outputs = keras.tree.flatten(self._step(*arrays))
        except Exception as error:  # user code may run here
            raise DataError(
                f"{self._path} could not run on inputs of shape {', '.join(str(a.shape) for a in arrays)}. "
                f"Received: {one_line(error)}"
            ) from error
        return [np.asarray(keras.ops.convert_to_numpy(output), "float32") for output in outputs]


def _trace(model: keras.Model) -> Graph | None:
    """Return the calls of `model`, of a subclassed one where its `call` runs on symbolic tensors; else `None`."""
    with suppress(ModelError):
        return trace_graph(model)
    try:
        signature = read_signature(model)
        inputs = [keras.Input(info.shape[1:], dtype=info.dtype, name=info.name) for info in signature.inputs]
        outputs = model.call(pack_inputs(signature, inputs))
        return trace_graph(keras.Model(inputs, keras.tree.flatten(outputs), name=model.name))
    except Exception:  # whatever a user's call() does with symbolic tensors; its outputs can still be compared
        return None


def _stands_for_its_input(graph: Graph, node: Node) -> bool:
    return node.kind in FAKE_QUANTIZERS and graph.producer(node.inputs[0]) is not None


def _final(graph: Graph, tensor: keras.KerasTensor) -> keras.KerasTensor:
    """Return what the layers behind read of `tensor`: its fake-quantized value where there is one."""
    quantized = [node.output for node in graph.consumers(tensor) if node.kind in FAKE_QUANTIZERS]
    return quantized[0] if quantized and not graph.is_output(tensor) else tensor


def _describe(name: str, node: Node, is_output: bool) -> Callable[[tuple[int, ...]], Observed]:
    return lambda parents: Observed(name, _kind(node), (_path(node),), parents, is_output)


def _tensors(structure: Any) -> list[keras.KerasTensor]:
    return [item for item in keras.tree.flatten(structure) if isinstance(item, keras.KerasTensor)]


def _is_float(tensor: keras.KerasTensor) -> bool:
    return keras.backend.standardize_dtype(tensor.dtype) in _FLOATS


def _path(node: Node) -> str:
    """Return the path of a layer in the user's model, which a quantized layer keeps."""
    return getattr(node.operation, "path_in_model", None) or node.path


def _kind(node: Node) -> str:
    wrapped = getattr(node.operation, "layer", None) if node.kind in _QUANTIZED_WRAPPERS else None
    return type(wrapped).__name__ if wrapped is not None else node.kind


def _stores_integers(model: keras.Model) -> bool:
    return any("int" in keras.backend.standardize_dtype(w.dtype) and len(w.shape) > 1 for w in model.weights)
