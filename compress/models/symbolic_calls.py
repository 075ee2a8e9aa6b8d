"""One call of a layer as a graph: `layer.call` runs on symbolic tensors, and the layers it calls are traced.

That is exact only if nothing gets lost on the way. What would be is found here: weights that call() uses itself,
values of weights that would become constants, losses, and code that is not made of Keras operations.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from compress.models.graph import Graph, Names, is_of_keras, trace_calls
from compress.models.masks import SetMask, mask_of

_CONSTANTS = 2**20
"""How many numbers a call may hold as constants; models are saved with them as text."""


class Untraceable(Exception):
    """The call of a layer is not the same as the calls that could be traced inside it; the message says why."""


@dataclass(frozen=True)
class OpenedCall:
    """A call of a layer and what it calls in turn.

    Args:
        graph: the calls inside; its inputs are a list.
        inputs: the symbolic tensors that stand outside for the inputs of the graph.
        trains_otherwise: whether call() does something else in training than the graph.
    """

    graph: Graph
    inputs: list[keras.KerasTensor]
    trains_otherwise: bool


def open_call(
    layer: keras.Layer, args: tuple, kwargs: dict[str, Any], path: str, names: Names, **options: Any
) -> OpenedCall:
    """Return what `layer` does when it is called with `args` and `kwargs`.

    Args:
        layer: a built layer; the layers inside it get new names.
        args: its positional arguments, with symbolic tensors in them.
        kwargs: its keyword arguments.
        path: its path; those inside stand below it. Empty for a whole model.
        names: the names in the model.
        options: more keyword arguments of `layer.call`.

    Raises:
        Untraceable: the calls inside would not compute or train the same.
    """
    if layer.activity_regularizer is not None:
        raise Untraceable("its activity regularizer would be lost")
    if kwargs.get("training"):
        raise Untraceable("it is called with training=True")
    prefix = f"{path}/" if path else ""
    _name_sublayers(layer, prefix, names)
    inputs, model = _run(layer, args, kwargs, options, training=None)
    for operation in model.operations:
        if not isinstance(operation, keras.layers.InputLayer):
            names.claim(operation, prefix, re.sub(r"_\d+$", "", operation.name))
    graph = trace_calls(model, prefix, names)
    _require_weights(layer, graph)
    _require_constants(layer, graph, lambda: _run(layer, args, kwargs, options, training=None)[1])
    return OpenedCall(graph, inputs, _trains_otherwise(layer, args, kwargs, options, model))


def sublayers(layer: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
    """Yield the layers that `layer` holds in attributes, lists and dicts, with the names of the attributes."""
    seen: set[int] = {id(layer)}

    def walk(label: str, value: Any) -> Iterator[tuple[str, keras.Layer]]:
        if isinstance(value, keras.Layer):
            if id(value) not in seen:
                seen.add(id(value))
                yield label, value
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from walk(f"{label}_{index}", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(f"{label}_{key}", item)

    for name, value in vars(layer).items():
        if name not in ("_layers", "_metrics", "_tracker") and not name.startswith(("_self_", "_obj_reference")):
            yield from walk(name.strip("_"), value)


def _name_sublayers(layer: keras.Layer, prefix: str, names: Names) -> None:
    """Call the layers inside by their place: Keras makes up names that differ from process to process."""
    for label, child in sublayers(layer):
        names.claim(child, prefix, label if _is_made_up(child) else child.name)


def _is_made_up(layer: keras.Layer) -> bool:
    return (
        re.sub(r"(_\d+)?$", "", layer.name, count=1).replace("_", "") == type(layer).__name__.replace("_", "").lower()
    )


def _run(
    layer: keras.Layer, args: tuple, kwargs: dict[str, Any], options: dict[str, Any], training: bool | None
) -> tuple[list[keras.KerasTensor], keras.Model]:
    """Return the tensors that `layer` reads, and a model of what it does with them."""
    entries = _Entries(layer)
    try:
        new_args, new_kwargs = keras.tree.map_structure(entries.enter, (args, kwargs))
        new_kwargs.update(entries.masks(args, kwargs))
        if "training" in inspect.signature(layer.call).parameters:
            new_kwargs["training"] = training
        outputs = layer.call(*new_args, **{**new_kwargs, **options})
        return entries.outside, keras.Model(entries.inputs, outputs)
    except Exception as error:  # user code runs here
        lines = str(error).strip().splitlines() or [""]
        raise Untraceable(f"its call() cannot be traced: {type(error).__name__}: {lines[0][:200]}") from error


class _Entries:
    """Fresh inputs for a call of a layer, prepared as Keras prepares the arguments of a call."""

    def __init__(self, layer: keras.Layer):
        self._layer = layer
        self.outside: list[keras.KerasTensor] = []
        self.inputs: list[keras.KerasTensor] = []
        self._entered: dict[int, keras.KerasTensor] = {}

    def enter(self, value: Any) -> Any:
        """Return what stands inside for an argument."""
        if not isinstance(value, keras.KerasTensor):
            return value
        if id(value) not in self._entered:  # an argument that is given twice is one tensor inside, too
            tensor = keras.Input(batch_shape=value.shape, dtype=value.dtype, sparse=value.sparse)
            self.outside.append(value)
            self.inputs.append(tensor)
            if self._layer.autocast and "float" in tensor.dtype and tensor.dtype != self._layer.compute_dtype:
                tensor = keras.ops.cast(tensor, self._layer.compute_dtype)
            mask = mask_of(value)
            self._entered[id(value)] = tensor if mask is None else SetMask()([tensor, self.enter(mask)])
        return self._entered[id(value)]

    def masks(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the mask arguments that Keras adds to a call: `mask`, or `query_mask` and so on."""
        signature = inspect.signature(self._layer.call)
        given = signature.bind(*args, **kwargs).arguments
        tensors = {key: value for key, value in given.items() if _has_tensor(value)}
        found = {}
        for key, value in tensors.items():
            name = "mask" if len(tensors) == 1 else f"{key}_mask"
            if name in signature.parameters and given.get(name) is None:
                found[name] = keras.tree.map_structure(self._mask, value)
        return found

    def _mask(self, value: Any) -> keras.KerasTensor | None:
        mask = mask_of(value) if isinstance(value, keras.KerasTensor) else None
        return None if mask is None else self.enter(mask)


def _require_weights(layer: keras.Layer, graph: Graph) -> None:
    for leaf in _leaves(graph):
        if isinstance(leaf, keras.Variable):
            raise Untraceable(f"call() uses the weight {leaf.path!r} itself")
    kept = {id(v) for node in graph.nodes if isinstance(node.operation, keras.Layer) for v in node.operation.weights}
    lost = [variable.path for variable in layer.weights if id(variable) not in kept]
    if lost:
        raise Untraceable(f"call() uses weights outside of layers: {', '.join(lost[:3])}")


def _require_constants(layer: keras.Layer, graph: Graph, run: Any) -> None:
    """Refuse numbers that come from weights: they would stay as they are while the weights are trained."""
    before = _constants(graph)
    if sum(array.size for array in before) > _CONSTANTS:
        raise Untraceable(f"it holds constants of more than {_CONSTANTS} numbers")
    if not before or not layer.variables:
        return
    changed = [(variable, _changed(variable)) for variable in layer.variables if "float" in variable.dtype]
    with keras.StatelessScope(state_mapping=changed):
        after = _constants(trace_calls(run(), "", Names(set(), {})))
    same = len(before) == len(after) and all(
        a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(before, after, strict=True)
    )
    if not same:
        raise Untraceable("call() computes with weights outside of layers")


def _changed(variable: keras.Variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype("float32") * 1.5 + 0.25


def _constants(graph: Graph) -> list[np.ndarray]:
    return [
        np.asarray(leaf if isinstance(leaf, float) else keras.ops.convert_to_numpy(leaf))
        for leaf in _leaves(graph)
        if isinstance(leaf, float) or (hasattr(leaf, "shape") and not isinstance(leaf, keras.KerasTensor))
    ]


def _leaves(graph: Graph) -> Iterator[Any]:
    for node in graph.nodes:
        yield from keras.tree.flatten((node.args, node.kwargs))


def _trains_otherwise(
    layer: keras.Layer, args: tuple, kwargs: dict[str, Any], options: dict[str, Any], model: keras.Model
) -> bool:
    if "training" not in inspect.signature(layer.call).parameters or is_of_keras(type(layer)):
        return False
    try:
        training = _run(layer, args, kwargs, options, training=True)[1]
    except Untraceable:
        return True
    return [type(operation) for operation in training.operations] != [type(operation) for operation in model.operations]


def _has_tensor(value: Any) -> bool:
    return any(isinstance(item, keras.KerasTensor) for item in keras.tree.flatten(value))
