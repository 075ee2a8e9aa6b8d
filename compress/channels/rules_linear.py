"""Rules of layers that make channels: convolutions, dense layers and look-ups."""

from __future__ import annotations

import keras
import numpy as np

from compress.channels.atoms import Atoms, Axes, Axis
from compress.channels.rules import channel_axis, freeze_all, rule_of
from compress.channels.rules_elementwise import activate
from compress.models.graph import Node


@rule_of("Conv1D", "Conv2D", "Conv3D")
def convolution(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    channels = channel_axis(layer, len(x))
    own = x[channels]
    if layer.groups == 1:
        atoms.weight(node.path, layer.kernel, -2, own, "reads")
        out = atoms.new(layer.filters, node.path)
    elif layer.kernel.shape[-2] == 1 and own is not None:  # each output reads one input
        out = np.repeat(own, layer.filters // layer.groups)
        atoms.edit(layer, "groups", own)
    else:  # the same channels of each group go, so that all groups stay alike
        first = atoms.tie_parts(own, layer.groups, f"{node.path} has {layer.groups} groups")
        atoms.weight(node.path, layer.kernel, -2, first, "reads")
        out = atoms.new(layer.filters, node.path)
        atoms.tie_parts(out, layer.groups, f"{node.path} has {layer.groups} groups")
        if layer.filters == layer.groups:
            atoms.freeze(out, f"{node.path} makes one channel of each of its groups")
    atoms.edit(layer, "filters", out)
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
            atoms.read(id(node), 0, data.index(letter), found[letter])
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
    if isinstance(shape, int):
        atoms.edit(layer, "output_shape", out[-1])
        return
    for index, axis in enumerate(out[len(out) - len(shape) :]):
        if shape[index] is not None:
            atoms.edit(layer, f"output_shape/{index}", axis)


@rule_of("Embedding")
def embedding(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    out = atoms.new(layer.output_dim, node.path)
    atoms.edit(layer, "output_dim", out)
    atoms.weight(node.path, layer.embeddings, 1, out, "makes")
    return [[*x, out]]
