"""The graph of a functional Keras model: traced call by call, and built again with something changed.

A rewrite walks through the recorded calls in order and decides for each what to call instead. Layers are
shared between a graph and what is built from it, so start from `copy_graph`, which leaves the user's model
alone. Nested models are opened.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from compress.errors import ModelError, UsageError
from compress.models.copying import copy_model, custom_objects_of, rebuild_operation
from compress.models.walking import find_layers

Caller = Callable[..., Any]
"""`call(node, *args, **kwargs)`: what to do for a recorded call; returns symbolic tensors in the node's structure."""


SEPARATOR = "-"
"""What stands for `"/"` in names: it may be in names of TensorFlow and, unlike a dot, in those of PyTorch."""


@dataclass(eq=False)
class Node:
    """One call of an operation.

    Args:
        path: path of the layer in the user's model, such as `"encoder/conv1"`.
        operation: a layer, or the operation behind a `keras.ops` function.
        args: its positional arguments, with symbolic tensors in them.
        kwargs: its keyword arguments.
        outputs: the symbolic tensors that it returned.
    """

    path: str
    operation: keras.Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any

    @property
    def kind(self) -> str:
        """Name of the operation's class, such as `"Conv2D"` for layers and `"Add"` for operations."""
        return type(self.operation).__name__

    @property
    def inputs(self) -> list[keras.KerasTensor]:
        """The symbolic tensors among its arguments, in order."""
        return _tensors((self.args, self.kwargs))

    @property
    def output(self) -> keras.KerasTensor:
        """The first tensor that it returned."""
        return _tensors(self.outputs)[0]


@dataclass(eq=False)
class Graph:
    """The calls of a model in topological order.

    Args:
        name: name of the model.
        inputs: structure of its symbolic inputs.
        outputs: structure of its symbolic outputs.
        nodes: its calls.
    """

    name: str
    inputs: Any
    outputs: Any
    nodes: list[Node]
    _consumers: dict[int, list[Node]] = field(init=False)
    _producers: dict[int, Node] = field(init=False)

    def __post_init__(self) -> None:
        self._consumers, self._producers = {}, {}
        for node in self.nodes:
            for tensor in node.inputs:
                self._consumers.setdefault(id(tensor), []).append(node)
            for tensor in _tensors(node.outputs):
                self._producers[id(tensor)] = node

    def consumers(self, tensor: keras.KerasTensor) -> list[Node]:
        """Return the calls that read `tensor`; a call that reads it twice is there twice."""
        return self._consumers.get(id(tensor), [])

    def producer(self, tensor: keras.KerasTensor) -> Node | None:
        """Return the call that made `tensor`, or `None` for an input of the model."""
        return self._producers.get(id(tensor))

    def is_output(self, tensor: keras.KerasTensor) -> bool:
        """Return whether the model returns `tensor`."""
        return any(tensor is output for output in _tensors(self.outputs))

    @property
    def paths(self) -> dict[str, str]:
        """The path of each operation by its name, with which a rewritten model is traced again."""
        return {node.operation.name: node.path for node in self.nodes}

    def calls(self, operation: keras.Operation) -> list[Node]:
        """Return every call of one operation; a shared layer has several."""
        return [node for node in self.nodes if node.operation is operation]

    def only_consumer(self, tensor: keras.KerasTensor) -> Node | None:
        """Return the one call that reads `tensor`, or `None` where others or the model's outputs need it too."""
        consumers = self.consumers(tensor)
        return consumers[0] if len(consumers) == 1 and not self.is_output(tensor) else None


def trace_graph(model: keras.Model, paths: Mapping[str, str] | None = None) -> Graph:
    """Return the calls that a functional or sequential model makes; nested ones are opened.

    Every operation has a name of its own: one of a nested model whose name is taken is replaced by a copy that is
    called after its path, such as `"encoder-conv1"`.

    Args:
        model: the model; its layers are called once more, so trace a copy of a model that is not yours.
        paths: paths of operations that are not called as their names say, by name; see `Graph.paths`.

    Raises:
        ModelError: the model is neither, so its calls are known to Python alone.
    """
    functional = plain_functional(model)
    names = Names({tensor.name for tensor in functional.inputs}, paths or {})
    with keras.saving.custom_object_scope(custom_objects_of(model)):
        return trace_calls(functional, "", names)


def copy_graph(model: keras.Model) -> Graph:
    """Return the graph of an independent copy of `model`.

    Raises:
        ModelError: the model cannot be copied or traced.
    """
    return trace_graph(copy_model(model))


def read_graph(model: keras.Model) -> Graph:
    """Return the calls that a functional or sequential model makes, without making them: it stays untouched.

    The operations are the model's own, whatever their names, and the tensors are good for shapes; to build something,
    call copies of the operations.

    Raises:
        ModelError: the model is neither, so its calls are known to Python alone.
    """
    functional = plain_functional(model)
    graph = trace_calls(functional, "", _Reader(set(), {}))
    # An input is called as its layer is; the tensor of one that was given no name has another.
    layers = [layer for layer in functional.layers if isinstance(layer, keras.layers.InputLayer)]
    names = {id(layer.output): layer.name for layer in layers}
    for own, tensor in zip(_tensors(functional.input), _tensors(graph.inputs), strict=True):
        tensor.name = names.get(id(own), tensor.name)
    return graph


def require_float(model: keras.Model, advice: str) -> keras.Model:
    """Return the model, or raise UsageError with this advice if it is fake-quantized."""
    if any(type(layer).__name__ == "QuantizedLayer" for _, layer in find_layers(model)):
        raise UsageError(f"expected a float model. Received: model {model.name!r}, which is fake-quantized", advice)
    return model


def rewrite_graph(graph: Graph, call: Caller) -> keras.Model:
    """Return a functional model with the same inputs and outputs in which `call` stands for each recorded call.

    Args:
        graph: the graph; its layers are shared with the new model.
        call: `call(node, *args, **kwargs)` with the new model's symbolic tensors; see `repeat` for no change.
    """
    inputs = keras.tree.map_structure(new_input, graph.inputs)
    return keras.Model(inputs, replay(graph, inputs, call), name=graph.name)


def replay(graph: Graph, inputs: Any, call: Caller) -> Any:
    """Return the outputs of `graph` for new symbolic `inputs`, made with `call`."""
    values: dict[int, Any] = {}

    def bind(old: Any, new: Any) -> None:
        pairs = zip(_tensors(old), _tensors(new), strict=True)
        values.update((id(before), after) for before, after in pairs)

    def look_up(value: Any) -> Any:
        return values[id(value)] if isinstance(value, keras.KerasTensor) else value

    bind(graph.inputs, inputs)
    for node in graph.nodes:
        args, kwargs = keras.tree.map_structure(look_up, (node.args, node.kwargs))
        bind(node.outputs, call(node, *args, **kwargs))
    return keras.tree.map_structure(look_up, graph.outputs)


def repeat(node: Node, *args: Any, **kwargs: Any) -> Any:
    """Make the call as it was recorded."""
    return node.operation(*args, **kwargs)


def rename_operation(operation: keras.Operation, name: str) -> keras.Operation:
    """Return a copy of an operation, with the same weights and another name."""
    return copy_operation(operation, name=name)


def copy_operation(operation: keras.Operation, **changes: Any) -> keras.Operation:
    """Return a copy of an operation with the same weights, in which some entries of its configuration are changed."""
    copy = rebuild_operation(operation, {**operation.get_config(), **changes})
    if isinstance(operation, keras.Layer) and operation.built:
        copy.build_from_config(operation.get_build_config() or {})
        copy.set_weights(operation.get_weights())
        for source, target in zip(operation.variables, copy.variables, strict=True):
            target.trainable = source.trainable
    return copy


def unique_name(name: str, taken: set[str]) -> str:
    """Return `name`, with a number behind it where it is taken, and add it to `taken`."""
    found, number = name, 1
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found


def free_name(name: str, path: str, taken: set[str]) -> str:
    """Return `name`, or, where it is taken, one after the path of the operation; and add it to `taken`."""
    return unique_name(path.replace("/", SEPARATOR) if name in taken else name, taken)


class Names:
    """Which operation is called what while a model is traced.

    Args:
        taken: names that no operation may have.
        paths: paths of operations that are not called as their names say, by name.
    """

    def __init__(self, taken: set[str], paths: Mapping[str, str]):
        self.taken, self.paths = taken, dict(paths)
        self._settled: dict[int, tuple[keras.Operation, keras.Operation]] = {}

    def call(self, operation: keras.Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the symbolic outputs of a call."""
        return operation(*args, **kwargs)

    def path(self, operation: keras.Operation, prefix: str) -> str:
        """Return the path of an operation that is called in the model whose path is `prefix`."""
        return self.paths.get(operation.name, f"{prefix}{operation.name}")

    def settle(self, operation: keras.Operation, path: str) -> keras.Operation:
        """Return the operation, or a renamed copy where another one has its name.

        Raises:
            ModelError: the name is taken, and the operation cannot be copied.
        """
        if id(operation) not in self._settled:
            # The operation itself is kept in the pair, so that no later one gets its id.
            self._settled[id(operation)] = operation, self._free(operation, path)
        return self._settled[id(operation)][1]

    def claim(self, operation: keras.Operation, prefix: str, label: str) -> str:
        """Give an operation of the caller's own a free name that begins with `prefix`, and return its path.

        Args:
            operation: the operation; once claimed, it keeps its name.
            prefix: path of the layer that it is in, such as `"encoder/block/"`.
            label: what to call it in there.
        """
        if id(operation) not in self._settled:
            start = prefix.replace("/", SEPARATOR)
            name = unique_name(start + re.sub(r"[^\w-]", "_", label.removeprefix(start)), self.taken)
            operation.name = name
            self.paths[name] = prefix + name.removeprefix(start)
            self._settled[id(operation)] = operation, operation
        return self.path(self._settled[id(operation)][1], prefix)

    def _free(self, operation: keras.Operation, path: str) -> keras.Operation:
        if operation.name not in self.taken:
            self.taken.add(operation.name)
            return operation
        name = free_name(operation.name, path, self.taken)
        try:
            return rename_operation(operation, name)
        except Exception as error:  # user code runs here: get_config, from_config and build of custom layers
            raise ModelError(
                f"expected layers with distinct names. Received: two layers called {operation.name!r}, and the one at "
                f"{path!r} cannot be copied under another name: {type(error).__name__}",
                "Give the layers of nested models distinct names, or add get_config() to the custom ones.",
            ) from error


class _StandIn(keras.Operation):
    """Has the symbolic outputs of another operation, which is not called and so keeps no trace of it."""

    def __init__(self, operation: keras.Operation):
        super().__init__()
        self.operation = operation

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        return self.operation.compute_output_spec(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.operation(*args, **kwargs)


class _Reader(Names):
    """Calls stand-ins, and keeps the operations whatever their names."""

    def call(self, operation: keras.Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _StandIn(operation)(*args, **kwargs)

    def settle(self, operation: keras.Operation, path: str) -> keras.Operation:
        return operation


def trace_calls(model: keras.Model, prefix: str, names: Names) -> Graph:
    """Return the calls of `model`, a plain functional one, with `prefix` before their paths."""
    nodes: list[Node] = []

    def record(path: str, operation: keras.Operation, args: tuple, kwargs: dict[str, Any]) -> Any:
        outputs = names.call(operation, args, kwargs)
        nodes.append(Node(path, operation, args, kwargs, outputs))
        return outputs

    def open_nested(nested: keras.Model, path: str, inputs: Any, training: bool | None) -> Any:
        def call(node: Node, *args: Any, **kwargs: Any) -> Any:
            # A nested model that is called with training=False, as frozen base models are, says so to its layers.
            if training is not None and _takes_training(node.operation):
                kwargs.setdefault("training", training)
            return record(node.path, node.operation, args, kwargs)

        inner = _with_casts(plain_functional(nested), inputs, type(names))
        return replay(trace_calls(inner, f"{path}/", names), inputs, call)

    def call(operation: keras.Operation, *args: Any, **kwargs: Any) -> Any:
        operation = operation.operation if isinstance(operation, _StandIn) else operation
        path = names.path(operation, prefix)
        if is_functional(operation):
            return open_nested(operation, path, args[0] if args else kwargs["inputs"], kwargs.get("training"))
        return record(path, names.settle(operation, path), args, kwargs)

    clone = keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)
    return Graph(model.name, clone.input, clone.output, nodes)


def is_functional(operation: Any) -> bool:
    """Return whether an operation is a model whose calls can be traced: one that has a graph and uses it."""
    if not isinstance(operation, keras.Model) or not is_of_keras(type(operation).call):
        return False
    return _has_graph(operation)


def is_of_keras(item: Any) -> bool:
    """Return whether a class or function is defined by Keras itself."""
    return item.__module__ == "keras" or item.__module__.startswith("keras.")


def plain_functional(model: keras.Model) -> keras.Model:
    """Return the functional model behind a functional or sequential one, without its class and compile settings.

    Raises:
        ModelError: the model is neither, or not built.
    """
    if not is_functional(model):
        raise ModelError(
            f"expected a functional or sequential model that is built. Received: model {model.name!r} of class "
            f"{type(model).__name__}",
            "Build the model; a subclassed one becomes functional with make_functional(model).",
        )
    if isinstance(model, keras.Sequential):
        return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    return keras.Model(model.input, model.output, name=model.name)


def _with_casts(model: keras.Model, inputs: Any, names: type[Names]) -> keras.Model:
    """Return `model` for inputs of other dtypes, such as bytes, which models turn into those they were made for.

    Args:
        model: a plain functional model.
        inputs: structure of its symbolic inputs.
        names: how its operations are called.
    """
    expected = keras.tree.flatten(model.input)
    dtypes = [tensor.dtype for tensor in keras.tree.flatten(inputs)]
    if dtypes == [tensor.dtype for tensor in expected]:
        return model
    fresh = [keras.Input(batch_shape=old.shape, dtype=dtype) for old, dtype in zip(expected, dtypes, strict=True)]
    converted = [keras.ops.cast(new, old.dtype) for new, old in zip(fresh, expected, strict=True)]
    caller = names(set(), {})
    outputs = replay(
        trace_calls(model, "", caller),
        keras.tree.pack_sequence_as(model.input, converted),
        lambda node, *args, **kwargs: caller.call(node.operation, args, kwargs),
    )
    return keras.Model(fresh, outputs, name=model.name)


def _has_graph(model: keras.Model) -> bool:
    try:
        return bool(getattr(model, "inputs", None)) and bool(getattr(model, "outputs", None))
    except ValueError:  # a sequential model without them
        return False


def new_input(tensor: keras.KerasTensor) -> keras.KerasTensor:
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name, sparse=tensor.sparse)


def _takes_training(operation: keras.Operation) -> bool:
    return "training" in inspect.signature(operation.call).parameters


def _tensors(structure: Any) -> list[keras.KerasTensor]:
    return [item for item in keras.tree.flatten(structure) if isinstance(item, keras.KerasTensor)]


def name_outputs_as(model: keras.Model, original: keras.Model) -> keras.Model:
    """Return `model` with the output names of `original`, the model that it was made from; see `rename_outputs`."""
    return rename_outputs(model, output_names(original))


def rename_outputs(model: keras.Model, names: Sequence[str]) -> keras.Model:
    """Return `model` with other output names, which losses, metrics and exported files go by.

    Args:
        model: a functional model of your own; its last operations get other names.
        names: a name for each output.
    """
    graph = trace_graph(model)
    last = [graph.producer(tensor) for tensor in _tensors(graph.outputs)]
    distinct = {id(node.operation) for node in last if node}
    if len(names) != len(last) or len(distinct) != len(last):
        return model  # outputs that are inputs, or that one operation makes, have no names of their own
    taken = {node.operation.name: node.operation for node in graph.nodes}
    for node, name in zip(last, names, strict=True):
        holder = taken.get(name)
        if holder is node.operation:
            continue
        if holder is not None:
            holder.name = unique_name(f"{name}_before", set(taken))
            taken[holder.name] = holder
        node.operation.name = name
        taken[name] = node.operation
    return rewrite_graph(graph, repeat)


def output_names(model: keras.Model) -> list[str]:
    """Return the names of a model's outputs in the order of its outputs; empty where they have none."""
    if isinstance(model, keras.Sequential):
        return [model.layers[-1].name]
    return list(getattr(model, "output_names", ()))
