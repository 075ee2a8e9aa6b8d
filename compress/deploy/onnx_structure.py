"""Exact rewrites of float ONNX graphs into the forms that quantized kernels have.

tf2onnx computes shapes at run time, makes 2-D convolutions out of 1-D ones, and leaves biases behind reshapes and
padding before convolutions. Runtimes fuse none of these with quantization.
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from compress.deploy.onnx_graph import OnnxGraph, attribute, set_attribute
from compress.deploy.onnx_shapes import Shapes

_SLIDING = ("Conv", "MaxPool", "AveragePool")


def simplify_structure(graph: OnnxGraph, shapes: Shapes, *, products: bool) -> None:
    """Apply all rewrites of this module; `products` says whether matrix products with a bias become Gemm."""
    fix_reshapes(graph, shapes)
    for node in list(graph.nodes):
        unsqueeze_last(graph, node, shapes)
    for node in list(graph.nodes):
        narrow_to_one_axis(graph, node, shapes)
    for node in list(graph.nodes):
        merge_padding(graph, node)
    for node in list(graph.nodes):
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) == 2:
            merge_conv_bias(graph, node)
        elif products and node.op_type == "MatMul" and len(shapes.get(node.input[1], ())) == 2:
            merge_product_bias(graph, node, shapes)


def fix_reshapes(graph: OnnxGraph, shapes: Shapes) -> None:
    """Give each Reshape whose result has at most one open size a constant shape."""
    for node in graph.nodes:
        if node.op_type == "Reshape" and node.input[1] not in graph.constants:
            target = _target(shapes.get(node.output[0]))
            if target is not None:
                graph.set_input(node, 1, graph.add_constant(target))


def _target(shape: tuple[int | None, ...] | None) -> np.ndarray | None:
    """Return what Reshape takes for a shape with at most one open size, else `None`."""
    if shape is None or shape.count(None) > 1 or 0 in shape:
        return None
    return np.array([-1 if size is None else size for size in shape], "int64")


def unsqueeze_last(graph: OnnxGraph, node: onnx.NodeProto, shapes: Shapes) -> None:
    """Turn `Unsqueeze, Transpose` into `Transpose, Unsqueeze`, so that the new axis stands where it is used."""
    before = graph.maker(node.input[0]) if node.op_type == "Transpose" else None
    if before is None or before.op_type != "Unsqueeze" or before.input[0] not in shapes:
        return
    order = attribute(node, "perm")
    axis = _single_axis(graph, before, len(shapes[before.input[0]]) + 1)
    if order is None or axis is None:
        return
    inner = [place - (place > axis) for place in order if place != axis]
    moved = graph.add("Transpose", [before.input[0]], name=node.name, perm=inner)
    sizes = shapes[before.input[0]]
    shapes[moved] = tuple(sizes[place] for place in inner)
    axes = graph.add_constant(np.array([order.index(axis)], "int64"))
    graph.remove(node)
    graph.replace(node.output[0], graph.add("Unsqueeze", [moved, axes], outputs=[graph.new_name("tensor")]))


def narrow_to_one_axis(graph: OnnxGraph, node: onnx.NodeProto, shapes: Shapes) -> None:
    """Turn `Unsqueeze, Conv or pooling of height 1, Squeeze` into the operator on one axis."""
    if node.op_type not in _SLIDING:
        return
    before, after = graph.maker(node.input[0]), graph.only_reader(node.output[0])
    if before is None or before.op_type != "Unsqueeze" or after is None or after.op_type != "Squeeze":
        return
    rank = len(shapes.get(before.input[0], ())) + 1
    axes = [_single_axis(graph, other, rank) for other in (before, after)]
    if rank != 4 or axes[0] != axes[1] or axes[0] not in (2, 3):
        return
    place = axes[0] - 2
    if not _is_trivial(node, place):
        return
    if node.op_type == "Conv":
        kernel = graph.value(node.input[1])
        if kernel is None or kernel.shape[axes[0]] != 1:
            return
        graph.set_input(node, 1, graph.add_constant(np.ascontiguousarray(kernel.squeeze(axes[0]))))
    for name in ("kernel_shape", "strides", "dilations"):
        given = attribute(node, name)
        if given is not None:
            set_attribute(node, name, [given[1 - place]])
    pads = attribute(node, "pads")
    if pads is not None:
        set_attribute(node, "pads", [pads[1 - place], pads[3 - place]])
    graph.set_input(node, 0, before.input[0])
    graph.remove(after)
    graph.replace(after.output[0], node.output[0])


def _single_axis(graph: OnnxGraph, node: onnx.NodeProto, rank: int) -> int | None:
    axes = graph.value(node.input[1]) if len(node.input) > 1 else None
    return int(axes[0]) % rank if axes is not None and axes.size == 1 and rank else None


def _is_trivial(node: onnx.NodeProto, place: int) -> bool:
    """Return whether an operator does nothing along one of its two spatial axes."""
    kernel = attribute(node, "kernel_shape")
    strides, pads = attribute(node, "strides", [1, 1]), attribute(node, "pads", [0] * 4)
    explicit = attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    once = kernel is not None and len(kernel) == 2 and kernel[place] == 1 and strides[place] == 1
    return bool(once and explicit and not pads[place] and not pads[place + 2])


def merge_padding(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """Move zeros that a Pad adds to spatial axes into the convolutions that read it."""
    if node.op_type != "Pad" or attribute(node, "mode", b"constant") != b"constant" or len(node.input) > 3:
        return
    pads = graph.value(node.input[1])
    fill = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    if pads is None or fill is None or np.any(fill != 0) or pads.min() < 0:
        return
    rank = pads.size // 2
    if pads[:2].any() or pads[rank : rank + 2].any() or node.output[0] in graph.outputs:
        return
    spatial = [*pads[2:rank], *pads[rank + 2 :]]
    for reader in graph.readers(node.output[0]):
        explicit = attribute(reader, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        if reader.op_type != "Conv" or reader.input[0] != node.output[0] or not explicit:
            continue
        own = attribute(reader, "pads") or [0] * len(spatial)
        set_attribute(reader, "auto_pad", None)
        set_attribute(reader, "pads", [int(a + b) for a, b in zip(own, spatial, strict=True)])
        graph.set_input(reader, 0, node.input[0])


def merge_conv_bias(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """Move the bias behind a convolution into it, also past the Squeeze that ends one on a single axis."""
    squeeze = graph.only_reader(node.output[0])
    if squeeze is None or squeeze.op_type != "Squeeze":
        squeeze = None
    add, bias = _added_constant(graph, squeeze.output[0] if squeeze else node.output[0])
    kernel = graph.value(node.input[1])
    if add is None or kernel is None:
        return
    kernel, rank = kernel.shape, kernel.ndim
    channels = kernel[0] if node.op_type == "Conv" else kernel[1] * attribute(node, "group", 1)
    shape = [1] * (rank - (squeeze is not None) - bias.ndim) + list(bias.shape)
    if squeeze:
        axis = _single_axis(graph, squeeze, rank)
        if axis is None:
            return
        shape.insert(axis, 1)
    if len(shape) != rank or shape[1] != channels or bias.size != channels:
        return
    graph.set_input(node, 2, graph.add_constant(np.ascontiguousarray(bias.reshape(-1))))
    graph.remove(add)
    graph.replace(add.output[0], (squeeze or node).output[0])


def merge_product_bias(graph: OnnxGraph, node: onnx.NodeProto, shapes: Shapes) -> None:
    """Turn `MatMul, [Reshape], Add` into `[Reshape], Gemm, [Reshape]`."""
    kernel, source = shapes[node.input[1]], shapes.get(node.input[0])
    if node.input[1] not in graph.constants or source is None:
        return
    reshape = graph.only_reader(node.output[0])
    if reshape is None or reshape.op_type != "Reshape" or reshape.input[0] != node.output[0]:
        reshape = None
    last = reshape.output[0] if reshape is not None else node.output[0]
    add, bias = _added_constant(graph, last)
    target = graph.value(reshape.input[1]) if reshape is not None else _target(shapes.get(node.output[0]))
    if add is None or target is None or not _is_bias(bias, target, kernel[1]):
        return
    x = node.input[0]
    if len(source) != 2:
        x = graph.add("Reshape", [x, graph.add_constant(np.array([-1, kernel[0]], "int64"))])
    inputs = [x, node.input[1], graph.add_constant(np.ascontiguousarray(bias.reshape(-1)))]
    output = graph.add("Gemm", inputs, name=node.name.replace("MatMul", "Gemm"))
    if len(source) != 2 or reshape is not None:
        output = graph.add("Reshape", [output, graph.add_constant(target)])
    for old in (node, reshape, add):
        if old is not None:
            graph.remove(old)
    graph.replace(add.output[0], output)


def _is_bias(bias: np.ndarray, target: np.ndarray, units: int) -> bool:
    """Return whether a constant, added to a tensor of the shape `target`, adds one number to each unit."""
    shape = tuple(size for i, size in enumerate(bias.shape) if size != 1 or i >= bias.ndim - 1)
    tail = tuple(int(size) for size in target[len(target) - len(shape) :])
    return bias.size == units == math.prod(shape) and shape == tail and bias.ndim <= len(target)


def _added_constant(graph: OnnxGraph, name: str) -> tuple[onnx.NodeProto | None, np.ndarray | None]:
    """Return the Add that alone reads a tensor and the constant that it adds, or two times `None`."""
    add = graph.only_reader(name)
    if add is None or add.op_type != "Add":
        return None, None
    other = add.input[1] if add.input[0] == name else add.input[0]
    value = graph.value(other)
    return (add, value) if value is not None and value.dtype == np.float32 else (None, None)
