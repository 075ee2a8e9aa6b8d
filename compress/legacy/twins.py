"""Keras 3 models rebuilt in memory as models of Keras 2 (tf_keras), and back. tf_keras never opens a file here.

Needs `pip install "bmcompress[tfmot]"`, and TensorFlow as the backend of Keras.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import keras

from compress.errors import SetupError, UsageError
from compress.legacy.dialects import Dialect, NoTwin, activation_name, keras2, translate_layer
from compress.legacy.files import LegacyModel, NamedArray
from compress.legacy.keras_operations import activation_functions, find_function
from compress.legacy.migrating import Migration, migrate
from compress.models.graph import Graph, Node, copy_graph, is_of_keras

_FLAG = "TF_USE_LEGACY_KERAS"
_MASKS = frozenset(("mask", "query_mask", "key_mask", "value_mask"))
_AS_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu6": ("ReLU", {"max_value": 6.0}),
    "leaky_relu": ("LeakyReLU", {"alpha": 0.2}),
}
"""Activations that Keras 2 has as layers only."""


def import_tfmot() -> Any:
    """Return the package `tensorflow_model_optimization`, imported without a change that others would notice.

    It sets an environment variable that turns `tf.keras` into tf_keras for the whole process: `tf.keras` is settled
    before, and the variable is put back.

    Raises:
        SetupError: it is not installed, or Keras has another backend than TensorFlow.
    """
    _require_backend()
    if find_spec("tensorflow_model_optimization") is None or find_spec("tf_keras") is None:
        raise SetupError(
            "this needs tensorflow-model-optimization, which is not installed.", 'Run pip install "bmcompress[tfmot]".'
        )
    with _unchanged_environment():
        return import_module("tensorflow_model_optimization")


def to_tf_keras(model: keras.Model) -> Any:
    """Return a tf_keras model with the weights of `model`, which computes the same; nested models are opened.

    Args:
        model: a built model, functional, sequential or nested of both; it is not changed.

    Raises:
        UsageError: layers or operations without a counterpart in Keras 2, all of which are named.
        SetupError: tf_keras is not installed, or Keras has another backend than TensorFlow.
    """
    return make_twin(copy_graph(model))


def from_tf_keras(model: Any) -> Migration:
    """Return the Keras 3 model that computes what a tf_keras model in memory does, tfmot's wrappers included.

    Args:
        model: a functional or sequential tf_keras model.

    Raises:
        ModelError: a layer, option or function without a counterpart, which is named.
    """
    import tf_keras

    kind = "Sequential" if isinstance(model, tf_keras.Sequential) else "Functional"
    weights = {
        layer.name: [
            NamedArray(variable.name.partition(":")[0], variable.numpy())
            for variable in [*layer.trainable_weights, *layer.non_trainable_weights]
        ]
        for layer in model.layers
    }
    node = {"class_name": kind, "config": _plain(model.get_config())}
    elements = sum(array.value.size for each in weights.values() for array in each)
    return migrate(LegacyModel(node, tf_keras.__version__, weights, elements))


def require_twins(model: keras.Model) -> None:
    """Raise UsageError that names every layer of `model` which Keras 2 has no counterpart for."""
    _require_backend()
    _refuse(_Twins(copy_graph(model)).problems)


def make_twin(graph: Graph) -> Any:
    """Return the tf_keras model of a graph; its layers have the names of the operations. See `to_tf_keras`."""
    _require_backend()
    twins = _Twins(graph)
    _refuse(twins.problems)
    return twins.build()


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UsageError(
            "expected layers that Keras 2 has too. Received:\n  " + "\n  ".join(problems[:20]) + more,
            "Leave out engine: tfmot; our own passes take any layer.",
        )


class _Twins:
    """Makes what stands for each operation of a graph in tf_keras, and notes what has none."""

    def __init__(self, graph: Graph):
        with _unchanged_environment():
            self._dialect: Dialect = keras2()
        self._graph = graph = _without_implied_masks(graph)
        self.problems: list[str] = []
        self._calls: dict[int, Callable[..., Any]] = {}
        self._layers: list[tuple[keras.layers.Layer, Any]] = []
        for node in graph.nodes:
            if id(node.operation) in self._calls:
                continue
            try:
                self._calls[id(node.operation)] = self._make(node)
            except NoTwin as error:
                self.problems.append(error.message)

    def build(self) -> Any:
        """Return the tf_keras model, with the weights."""
        k = self._dialect.keras
        inputs = keras.tree.map_structure(
            lambda tensor: k.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name), self._graph.inputs
        )
        outputs = _replay(self._graph, inputs, self._calls)
        model = k.Model(inputs, outputs, name=self._graph.name)
        for layer, twin in self._layers:
            twin.set_weights(_in_order_of(twin, layer))
        return model

    def _make(self, node: Node) -> Callable[..., Any]:
        operation = node.operation
        if not isinstance(operation, keras.layers.Layer):
            return self._operation(node)
        kind = type(operation).__name__
        if not is_of_keras(type(operation)):
            raise NoTwin(f"{node.path!r} is a {kind}, a class of its own.")
        config = operation.get_config()
        extra = self._activation(config, operation.name)
        if extra is not None and kind == "Activation":
            return extra
        twin = translate_layer(kind, config, self._dialect, without_activation=extra is not None)
        twin.trainable = operation.trainable
        self._layers.append((operation, twin))
        return twin if extra is None else lambda *args, **kwargs: extra(twin(*args, **kwargs))

    def _activation(self, config: dict[str, Any], name: str) -> Any:
        """Return the layer or function for an activation that Keras 2 has only so, or `None`."""
        known = activation_name(config.get("activation"))
        if known in _AS_LAYERS:
            kind, options = _AS_LAYERS[known]
            return getattr(self._dialect.keras.layers, kind)(**options, name=f"{name}_{known}")
        return None if "recurrent_activation" in config else activation_functions().get(known)

    def _operation(self, node: Node) -> Callable[..., Any]:
        """Return the call that stands for an operation which is no layer; a layer where tfmot knows one."""
        k, operation, kind = self._dialect.keras, node.operation, node.kind
        tensors = [each for each in node.args if isinstance(each, keras.KerasTensor)]
        if kind in ("Add", "Subtract", "Multiply", "Maximum", "Minimum") and len(tensors) == 2:
            layer = getattr(k.layers, kind)(name=operation.name)
            return lambda x, y: layer([x, y])
        if kind == "Concatenate" and is_of_keras(type(operation)):
            return k.layers.Concatenate(axis=operation.axis, name=operation.name)
        function = find_function(operation) if is_of_keras(type(operation)) else None
        if function is None:
            raise NoTwin(f"{node.path!r} is the operation {kind}, which has no counterpart here.")
        return function


def _without_implied_masks(graph: Graph) -> Graph:
    """Return the graph without the masks that layers hand on by themselves, in Keras 2 as in Keras 3.

    Tracing shows them as arguments, and as operations that compute them.
    """
    makers = [node.operation for node in graph.nodes]
    if not any(isinstance(each, keras.layers.Masking) or getattr(each, "mask_zero", False) for each in makers):
        return graph
    nodes = [
        replace(node, kwargs={key: value for key, value in node.kwargs.items() if key not in _MASKS})
        for node in graph.nodes
    ]
    needed = {id(tensor) for tensor in keras.tree.flatten(graph.outputs)}
    kept: list[Node] = []
    for node in reversed(nodes):
        if any(id(tensor) in needed for tensor in keras.tree.flatten(node.outputs)):
            needed |= {id(tensor) for tensor in node.inputs}
            kept.append(node)
    return Graph(graph.name, graph.inputs, graph.outputs, kept[::-1])


def _replay(graph: Graph, inputs: Any, calls: dict[int, Callable[..., Any]]) -> Any:
    values: dict[int, Any] = {}

    def bind(old: Any, new: Any) -> None:
        flat = keras.tree.flatten(new)
        values.update(zip((id(t) for t in keras.tree.flatten(old)), flat, strict=True))

    def look_up(value: Any) -> Any:
        return values[id(value)] if isinstance(value, keras.KerasTensor) else value

    bind(graph.inputs, inputs)
    for node in graph.nodes:
        args, kwargs = keras.tree.map_structure(look_up, (node.args, node.kwargs))
        if kwargs.get("training"):  # a default that was noted as if it had been passed
            del kwargs["training"]
        bind(node.outputs, calls[id(node.operation)](*args, **kwargs))
    return keras.tree.map_structure(look_up, graph.outputs)


def _in_order_of(twin: Any, layer: keras.layers.Layer) -> list[Any]:
    """Return the weights of `layer` in the order in which those of `twin` stand."""
    found = [keras.ops.convert_to_numpy(weight) for weight in layer.weights]
    shapes = [tuple(weight.shape) for weight in twin.weights]
    if [value.shape for value in found] != shapes:
        raise UsageError(f"{layer.name!r} has the weights {[v.shape for v in found]}, and {shapes} in Keras 2.")
    return found


def _plain(value: Any) -> Any:
    """Return a configuration as JSON has it: lists for tuples, nothing that is shared with the model."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def _require_backend() -> None:
    if keras.backend.backend() != "tensorflow":
        raise SetupError(
            f"tf_keras needs TensorFlow as the backend of Keras. Received: {keras.backend.backend()}",
            "Run it with KERAS_BACKEND=tensorflow.",
        )
    if find_spec("tf_keras") is None:
        raise SetupError("this needs tf_keras, which is not installed.", 'Run pip install "bmcompress[tfmot]".')


@contextmanager
def _unchanged_environment() -> Iterator[None]:
    """Settle what `tf.keras` is, and put the variable back that decides it."""
    import tensorflow as tf

    before = os.environ.get(_FLAG)
    _ = tf.keras.__name__
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_FLAG, None)
        else:
            os.environ[_FLAG] = before
