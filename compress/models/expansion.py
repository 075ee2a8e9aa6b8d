"""Layers that hold several quantizable tensors are replaced by the operations that they are made of.

Runtimes quantize inside an attention layer, behind a softmax or between the halves of a separable convolution;
fake quantization reaches only what stands between two calls. The new graph computes the same, up to the order of
float operations. What cannot be opened stays and is listed.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from compress.models.copying import custom_objects_of
from compress.models.graph import Graph, Names, Node, is_of_keras, new_input, replay, trace_graph
from compress.models.layer_expansion import LAYER_RULES
from compress.models.masks import SetMask, mask_of
from compress.models.symbolic_calls import OpenedCall, Untraceable, open_call, sublayers
from compress.models.walking import Skipped

_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


@dataclass(frozen=True)
class Expansion:
    """A graph whose layers are opened, as far as that is possible.

    Args:
        graph: the new graph; layers that did not change are shared with the old one.
        left: layers that stay closed, and those that train otherwise now, with the reason.
    """

    graph: Graph
    left: tuple[Skipped, ...]


def expand(graph: Graph) -> Graph:
    """Return the graph of `expand_graph(graph)`."""
    return expand_graph(graph).graph


def expand_graph(graph: Graph) -> Expansion:
    """Return an equal graph in which layers are replaced by the operations that they are made of.

    Opened are custom layers and subclassed models that hold layers, and attention; split are activations that
    runtimes do not fuse, SiLU, hard sigmoid, rescaling by one number and separable convolutions; einsum layers and
    time-distributed ones become dense layers where that is the same.

    Args:
        graph: a graph of your own, as from `copy_graph`: layers inside its layers get other names.
    """
    closed: dict[int, str] = {}
    with warnings.catch_warnings(), keras.saving.custom_object_scope(_custom_objects(graph)):
        warnings.filterwarnings("ignore", message=".*does not support masking.*")
        while True:
            try:
                return _Expander(graph, closed).run()
            except _StaysClosed:
                continue


class _StaysClosed(Exception):
    """A shared layer was opened where it is called first, and cannot be where it is called again."""


class _Expander:
    def __init__(self, graph: Graph, closed: dict[int, str]):
        self._graph, self._closed = graph, closed
        self._names = Names({tensor.name for tensor in keras.tree.flatten(graph.inputs)}, graph.paths)
        for node in graph.nodes:
            self._names.settle(node.operation, node.path)
        self._opened: set[int] = set()
        self._made: dict[tuple[int, str], tuple[keras.Operation, Any]] = {}
        self._left: dict[str, str] = {}

    def run(self) -> Expansion:
        inputs = keras.tree.map_structure(new_input, self._graph.inputs)
        outputs = replay(self._graph, inputs, self._call)
        graph = trace_graph(keras.Model(inputs, outputs, name=self._graph.name), self._names.paths)
        return Expansion(graph, tuple(Skipped(path, reason) for path, reason in self._left.items()))

    def emit(self, path: str, operation: keras.Operation, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of a call, with the operation replaced by its parts where that helps."""
        outputs = self._replace(path, operation, args, kwargs)
        return operation(*args, **kwargs) if outputs is None else outputs

    def once(self, operation: keras.Operation, part: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, the same at every call of a shared operation."""
        key = id(operation), part
        if key not in self._made:
            self._made[key] = operation, make()  # held, so that no later operation gets its id
        return self._made[key][1]

    def claim(self, path: str, part: str, operation: keras.Operation) -> tuple[str, keras.Operation]:
        """Call a new operation after the layer that it is part of, and return its path and itself."""
        return self._names.claim(operation, f"{path}/", part), operation

    def compute(self, path: str, function: Callable[..., Any], *tensors: keras.KerasTensor) -> Any:
        """Return what `function` makes of `tensors` with Keras operations, which are called after `path`."""
        result = function(*tensors)
        for operation in keras.Function(list(tensors), result).operations:
            if not isinstance(operation, keras.layers.InputLayer):
                self._names.claim(operation, f"{path}/", re.sub(r"_\d+$", "", operation.name))
        return result

    def _call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        if node.kind == SetMask.__name__ and len(args[0]) > 1 and mask_of(args[0][0]) is not None:
            return args[0][0]  # the entry of an opened call, whose tensor carries its mask itself
        return self.emit(node.path, node.operation, *args, **kwargs)

    def _call_of_fused(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        outputs = self._call(node, *args, **kwargs)
        mask = kwargs.get("mask")
        if node.kind != "Softmax" or mask is None or not _may_be_empty(mask):
            return outputs
        if args[0].shape[-1] is None:
            raise Untraceable("its mask may leave nothing to attend to, among tensors of unknown length")
        # Softmax returns zeros where a mask allows nothing, as for padding; the fused operation spreads evenly.
        share = 1.0 / args[0].shape[-1]
        return self.compute(node.path, lambda some, allowed: _fill_empty(some, allowed, share), outputs, mask)

    def _replace(self, path: str, operation: keras.Operation, args: tuple, kwargs: dict[str, Any]) -> Any:
        if getattr(operation, "quantization_mode", None) or getattr(operation, "lora_enabled", False):
            self._left[path] = "it is quantized or adapted by Keras itself"
            return None
        rule = LAYER_RULES.get(type(operation).__name__) if is_of_keras(type(operation)) else None
        if rule:
            outputs = rule(self, path, operation, *args, **kwargs)
        elif _is_composite(operation):
            return self._open(path, operation, args, kwargs)
        else:
            return None
        if outputs is None or not any(_has_mask(value) for value in keras.tree.flatten((args, kwargs))):
            return outputs
        return self._keep_masks(path, outputs, operation(*args, **kwargs))

    def _open(self, path: str, layer: keras.Layer, args: tuple, kwargs: dict[str, Any]) -> Any:
        if id(layer) in self._closed:
            self._left[path] = self._closed[id(layer)]
            return None
        expected = layer(*args, **kwargs)
        try:
            opened, outputs = self._open_call(path, layer, args, kwargs, expected)
        except Untraceable as error:
            self._closed[id(layer)] = str(error)
            if id(layer) in self._opened:
                raise _StaysClosed from error
            self._left[path] = str(error)
            return None
        self._opened.add(id(layer))
        if opened.trains_otherwise:
            self._left[path] = "opened as it predicts: what its call() does otherwise in training is left out"
        return self._keep_masks(path, outputs, expected)

    def _open_call(
        self, path: str, layer: keras.Layer, args: tuple, kwargs: dict[str, Any], expected: Any
    ) -> tuple[OpenedCall, Any]:
        is_attention = isinstance(layer, _ATTENTION)
        options = _attention_options(layer, args, kwargs) if is_attention else {}
        opened = open_call(layer, args, kwargs, path, self._names, **options)
        only_first = is_attention and not kwargs.get("return_attention_scores")
        found = opened.graph.outputs[0] if only_first else opened.graph.outputs
        if [_kind(tensor) for tensor in keras.tree.flatten(found)] != [
            _kind(tensor) for tensor in keras.tree.flatten(expected)
        ]:
            raise Untraceable("its call() returns other tensors than the layer does")
        with_rest = is_attention and _is_fused(layer, opened.inputs, kwargs)
        outputs = replay(opened.graph, opened.inputs, self._call_of_fused if with_rest else self._call)
        outputs = outputs[0] if only_first else outputs
        flat = keras.tree.flatten(outputs)
        return opened, keras.tree.pack_sequence_as(expected, flat)

    def _keep_masks(self, path: str, outputs: Any, expected: Any) -> Any:
        """Return `outputs` with the masks of `expected`, which layers further on may read."""

        def keep(output: keras.KerasTensor, original: keras.KerasTensor) -> keras.KerasTensor:
            mask = mask_of(original)
            if mask_of(output) is mask:
                return output
            _, layer = self.claim(path, "mask", SetMask())
            return layer([output] if mask is None else [output, mask])

        return keras.tree.map_structure(keep, outputs, expected)


def _is_composite(operation: keras.Operation) -> bool:
    if not isinstance(operation, keras.Layer):
        return False
    if is_of_keras(type(operation)):
        return type(operation) in _ATTENTION
    return next(sublayers(operation), None) is not None


def _attention_options(layer: keras.Layer, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which attention computes with visible operations: it has to return its scores."""
    options: dict[str, Any] = {"return_attention_scores": True}
    given = inspect.signature(layer.call).bind(*args, **kwargs).arguments
    sizes = given["query"].shape[1], given["value"].shape[1]
    if given.get("use_causal_mask") and given.get("attention_mask") is None and None not in sizes:
        # With a mask, even one that allows all, Keras makes the causal one here, where the sizes are known.
        options["attention_mask"] = keras.ops.ones((1, *sizes), dtype="bool")
    return options


def _is_fused(layer: keras.Layer, inputs: list[keras.KerasTensor], kwargs: dict[str, Any]) -> bool:
    """Return whether an attention layer computes in one operation, unless it is asked for its scores."""
    return not (layer.dropout or kwargs.get("return_attention_scores") or len(inputs[0].shape) != 3)


def _fill_empty(shares: keras.KerasTensor, mask: Any, share: float) -> keras.KerasTensor:
    return keras.ops.where(keras.ops.any(mask, axis=-1, keepdims=True), shares, share)


def _may_be_empty(mask: Any) -> bool:
    """Return whether there may be a row in which `mask` allows nothing."""
    return isinstance(mask, keras.KerasTensor) or not keras.ops.convert_to_numpy(mask).any(axis=-1).all()


def _custom_objects(graph: Graph) -> dict[str, Any]:
    return custom_objects_of(keras.Model(graph.inputs, graph.outputs))


def _has_mask(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor) and mask_of(value) is not None


def _kind(tensor: keras.KerasTensor) -> tuple[str, int]:
    return tensor.dtype, len(tensor.shape)
