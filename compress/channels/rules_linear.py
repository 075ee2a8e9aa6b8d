"""Rules of layers that make channels: convolutions, dense layers, look-ups, recurrent layers and attention."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np

from compress.channels.atoms import Atoms, Axes, Axis
from compress.channels.rules import channel_axis, fixed_outputs, freeze_all, output_tensors, rule_of
from compress.channels.rules_elementwise import activate
from compress.models.graph import Node


@rule_of("Conv1D", "Conv2D", "Conv3D")
def convolution(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    channels = channel_axis(layer, len(x))
    if layer.groups == 1:
        atoms.weight(node.path, layer.kernel, -2, x[channels], "reads")
        out = atoms.new(layer.filters, node.path)
        atoms.edit(layer, "filters", out)
    elif layer.kernel.shape[-2] == 1 and x[channels] is not None:  # each output reads one input
        out = np.repeat(x[channels], layer.filters // layer.groups)
        atoms.edit(layer, "filters", out)
        atoms.edit(layer, "groups", x[channels])
    else:
        atoms.freeze(x[channels], f"{node.path} has {layer.groups} groups")
        out = None
    atoms.weight(node.path, layer.kernel, -1, out, "makes")
    return [_with_bias(node, x, channels, out, atoms)]


@rule_of("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def transposed_convolution(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    channels = channel_axis(layer, len(x))
    atoms.weight(node.path, layer.kernel, -1, x[channels], "reads")
    out = atoms.new(layer.filters, node.path)
    atoms.edit(layer, "filters", out)
    atoms.weight(node.path, layer.kernel, -2, out, "makes")
    return [_with_bias(node, x, channels, out, atoms)]


@rule_of("DepthwiseConv1D", "DepthwiseConv2D")
def depthwise_convolution(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    channels = channel_axis(layer, len(x))
    atoms.weight(node.path, layer.kernel, -2, x[channels], "passes")
    out = None if x[channels] is None else np.repeat(x[channels], layer.depth_multiplier)
    return [_with_bias(node, x, channels, out, atoms)]


@rule_of("SeparableConv1D", "SeparableConv2D")
def separable_convolution(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    channels = channel_axis(layer, len(x))
    middle = None if x[channels] is None else np.repeat(x[channels], layer.depth_multiplier)
    atoms.weight(node.path, layer.depthwise_kernel, -2, x[channels], "passes")
    atoms.weight(node.path, layer.pointwise_kernel, -2, middle, "reads")
    out = atoms.new(layer.filters, node.path)
    atoms.edit(layer, "filters", out)
    atoms.weight(node.path, layer.pointwise_kernel, -1, out, "makes")
    return [_with_bias(node, x, channels, out, atoms)]


def _with_bias(node: Node, x: Axes, channels: int, out: Axis, atoms: Atoms) -> Axes:
    """Return the axes behind a convolution: its places in space are fixed."""
    layer = node.operation
    if layer.bias is not None:
        atoms.weight(node.path, layer.bias, 0, out, "makes")
    for axis, own in enumerate(x):
        if axis not in (0, channels):
            atoms.freeze(own, f"{node.path} reads neighbours along it")
    result: Axes = [None] * len(x)
    result[channels] = out
    return activate(node, result, atoms)


@rule_of("Dense")
def dense(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    atoms.weight(node.path, layer.kernel, 0, x[-1], "reads")
    out = atoms.new(layer.units, node.path)
    atoms.edit(layer, "units", out)
    atoms.weight(node.path, layer.kernel, 1, out, "makes")
    if layer.bias is not None:
        atoms.weight(node.path, layer.bias, 0, out, "makes")
    return [activate(node, [*x[:-1], out], atoms)]


@rule_of("EinsumDense")
def einsum_dense(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Axes that the equation sums over are read, axes that only the output has are made, all others pass through."""
    layer, (x,) = node.operation, inputs
    operands, _, result = layer.equation.replace(" ", "").partition("->")
    data, _, kernel = operands.partition(",")
    places = list(x)
    if "..." in layer.equation:
        free = len(x) - len(data.replace("...", ""))
        data, result = (each.replace("...", "0123456789"[:free]) for each in (data, result))
    if len(data) != len(x) or not (data + kernel + result).isalnum():
        return freeze_all(node, inputs, atoms, f"{node.path} has the equation {layer.equation}")
    found = dict(zip(data, places, strict=True))
    for letter in data:
        if letter not in kernel and letter not in result:
            atoms.freeze(found[letter], f"{node.path} sums over it without weights")
    for letter in result:
        if letter not in found:
            found[letter] = atoms.new(layer.kernel.shape[kernel.index(letter)], node.path)
    for axis, letter in enumerate(kernel):
        role = "reads" if letter not in result else "makes" if letter not in data else "passes"
        atoms.weight(node.path, layer.kernel, axis, found[letter], role)
    if layer.bias is not None:
        for axis, letter in zip(range(1, len(layer.bias.shape) + 1), _bias_letters(layer, result), strict=True):
            atoms.weight(node.path, layer.bias, axis - 1, found[letter] if letter else None, "makes")
    out = [found[letter] for letter in result]
    _edit_output_shape(layer, out, atoms)
    return [activate(node, out, atoms)]


def _bias_letters(layer: keras.Layer, result: str) -> list[str]:
    """Return for each axis of the bias the letter of the output that it lies along, or nothing for an axis of 1."""
    wanted = layer.bias_axes
    first = min(result.index(letter) for letter in wanted)
    return [letter if letter in wanted else "" for letter in result[first:]]


def _edit_output_shape(layer: keras.Layer, out: Axes, atoms: Atoms) -> None:
    """Let `output_shape`, which has an entry for each axis but the batch's, follow the axes that may get shorter."""
    shape = layer.get_config()["output_shape"]
    shape = list(shape) if isinstance(shape, (list, tuple)) else [shape]
    variable = [(index, axis) for index, axis in enumerate(out[len(out) - len(shape) :]) if axis is not None]
    if not variable:
        return
    for _, axis in variable[:-1]:  # one entry of the configuration follows one axis
        atoms.freeze(axis, "one axis of an EinsumDense at a time can get shorter")
    index, last = variable[-1]
    atoms.edit(layer, "output_shape", last, lambda count: (*shape[:index], count, *shape[index + 1 :]))


@rule_of("Embedding")
def embedding(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    out = atoms.new(layer.output_dim, node.path)
    atoms.edit(layer, "output_dim", out)
    atoms.weight(node.path, layer.embeddings, 1, out, "makes")
    return [[*x, out]]


_GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}


@rule_of(*_GATES)
def recurrent(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x, *states) = node.operation, inputs
    out = _cell(node, layer, x[-1], atoms)
    atoms.edit(layer, "units", out)
    for state in states:
        out = atoms.tie(out, state[-1], f"{node.path} has a state of fixed length")
    atoms.freeze(x[1], f"{node.path} reads it step by step")
    return [[*([None] * (len(tensor.shape) - 1)), out] for tensor in output_tensors(node)]


def _cell(node: Node, layer: keras.Layer, x: Axis, atoms: Atoms) -> np.ndarray:
    gates = _GATES[type(layer).__name__]
    out = atoms.new(layer.units, node.path)
    atoms.weight(node.path, layer.cell.kernel, 0, x, "reads")
    atoms.weight(node.path, layer.cell.kernel, 1, np.tile(out, gates), "makes")
    atoms.weight(node.path, layer.cell.recurrent_kernel, 0, out, "reads")
    atoms.weight(node.path, layer.cell.recurrent_kernel, 1, np.tile(out, gates), "makes")
    if layer.cell.bias is not None:
        atoms.weight(node.path, layer.cell.bias, -1, np.tile(out, gates), "makes")
    return out


@rule_of("Bidirectional")
def bidirectional(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Only what is read can get shorter: the layers inside have configurations of their own."""
    layer = node.operation
    x = inputs[0]
    both = (layer.forward_layer, layer.backward_layer)
    if len(inputs) > 1 or any(type(each).__name__ not in _GATES for each in both):
        return freeze_all(
            node, inputs, atoms, f"{node.path} (Bidirectional) is known around one LSTM, GRU or SimpleRNN"
        )
    for each in both:
        atoms.weight(node.path, each.cell.kernel, 0, x[-1], "reads")
    atoms.freeze(x[1], f"{node.path} reads it step by step")
    return fixed_outputs(node)


@rule_of("MultiHeadAttention")
def attention(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Whole heads can go, and what the queries, keys and values are made of; the width of a head stays."""
    layer = node.operation
    sources = _attention_sources(node, inputs)
    if sources is None or len(layer.get_config().get("output_shape") or ()) > 1:
        return freeze_all(node, inputs, atoms, f"{node.path} (MultiHeadAttention) is called in an unknown way")
    heads = atoms.new(layer.num_heads, f"{node.path}/heads")
    projections = (layer.query_dense, layer.key_dense, layer.value_dense)
    for projection, source in zip(projections, sources, strict=True):
        atoms.weight(node.path, projection.kernel, 0, source[-1], "reads")
        atoms.weight(node.path, projection.kernel, 1, heads, "makes")
        if projection.bias is not None:
            atoms.weight(node.path, projection.bias, 0, heads, "makes")
    kernel, bias = layer.output_dense.kernel, layer.output_dense.bias
    out = atoms.new(kernel.shape[-1], node.path)
    atoms.weight(node.path, kernel, 0, heads, "reads")
    atoms.weight(node.path, kernel, -1, out, "makes")
    if bias is not None:
        atoms.weight(node.path, bias, 0, out, "makes")
    atoms.edit(layer, "num_heads", heads)
    atoms.edit(layer, "output_shape", out, lambda count: (count,))
    for axes in inputs:
        for axis in axes[1:-1]:
            atoms.freeze(axis, f"{node.path} attends along it")
    query = sources[0]
    results = [[*query[:-1], out]]
    if len(output_tensors(node)) > 1:
        atoms.freeze(heads, f"{node.path} returns its scores")
        results += fixed_outputs(node)[1:]
    return results


def _attention_sources(node: Node, inputs: list[Axes]) -> list[Axes] | None:
    """Return the axes of query, value and key as the layer's projections read them: query, key, value."""
    bound = inspect.signature(node.operation.call).bind(*node.args, **node.kwargs).arguments
    by_tensor: dict[int, Axes] = dict(zip(map(id, node.inputs), inputs, strict=True))
    found: dict[str, Any] = {name: bound.get(name) for name in ("query", "value", "key")}
    if found["key"] is None:
        found["key"] = found["value"]
    tensors = [found[name] for name in ("query", "key", "value")]
    return [by_tensor[id(each)] for each in tensors] if all(id(each) in by_tensor for each in tensors) else None
