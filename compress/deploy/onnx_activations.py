"""Quantized activations in ONNX graphs, placed so that runtimes find `DequantizeLinear, operator, QuantizeLinear`.

Everything here keeps the numbers as they are: pairs are added only where values lie on their grid already, and
operators are dropped only where the grid clips the same way.
"""

from __future__ import annotations

import numpy as np
import onnx

from compress.deploy.onnx_graph import OnnxGraph, attribute
from compress.deploy.onnx_steps import (
    Step,
    add_dequantize,
    add_pair,
    add_quantize,
    read_step,
    readers_step,
    step_of,
)
from compress.deploy.onnx_stored import Placed
from compress.errors import ExportError

_MOVING = {
    "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool", "Pad",
    "ReduceMax", "ReduceMin", "Reshape", "ReverseSequence", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators whose outputs hold values of their first input, or its zeros, so that one grid serves both."""

_NOT_FLOAT = {
    "And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor", "Shape",
    "Size", "ArgMax", "ArgMin", "NonZero",
}  # fmt: skip
"""Operators that make truth values or sizes."""

_BIASED = ("Conv", "ConvTranspose", "Gemm")
_INT32_LIMIT = 2**31 - 1


def place_activations(graph: OnnxGraph) -> None:
    """Spread grids over operators that move values, and bring constants and clipping onto them."""
    _spread(graph)
    for node in list(graph.nodes):
        _quantize_scalar(graph, node)
    for node in list(graph.nodes):
        _drop_clipping(graph, node)
    for node in list(graph.nodes):
        _pad_integers(graph, node)


def _spread(graph: OnnxGraph) -> None:
    """Add pairs behind and before operators that move values, until no more can be added."""
    waiting = list(graph.nodes)
    while waiting:
        node = waiting.pop()
        if node.op_type == "Concat":
            waiting.extend(_quantize_inputs(graph, node, range(len(node.input))))
        elif _moves(graph, node):
            step = step_of(graph, node.input[0])
            if step is None:
                waiting.extend(_quantize_inputs(graph, node, range(1)))
                continue
            for name in node.output:
                if name and readers_step(graph, name) != step:
                    waiting.extend(graph.readers(name))
                    _quantize_tensor(graph, name, step)


def _quantize_inputs(graph: OnnxGraph, node: onnx.NodeProto, places: range) -> list[onnx.NodeProto]:
    """Put inputs of a node on the grid that its only output is put on; return the nodes that made them."""
    step = readers_step(graph, node.output[0]) if len(node.output) == 1 else None
    makers = []
    for place in places if step is not None else ():
        if step_of(graph, node.input[place]) is None:
            makers.append(graph.maker(node.input[place]))
            graph.set_input(node, place, add_pair(graph, node.input[place], step))
    return [maker for maker in makers if maker is not None]


def _moves(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    if node.op_type == "Pad":
        fill = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
        return attribute(node, "mode", b"constant") != b"constant" or (fill is not None and not np.any(fill))
    if node.op_type == "Resize":
        return attribute(node, "mode", b"nearest") == b"nearest"
    if node.op_type == "MaxPool" and len([name for name in node.output if name]) != 1:
        return False
    return node.op_type in _MOVING and node.input[0] not in graph.constants


def _quantize_tensor(graph: OnnxGraph, name: str, step: Step) -> None:
    """Put a tensor on a grid that it lies on already, for all its readers and the graph's output."""
    source = graph.rename_output(name) if name in graph.outputs else name
    integers = add_quantize(graph, source, step)
    floats = add_dequantize(graph, integers, step, name if source != name else None)
    graph.move_readers(source, floats, but=graph.maker(integers))


def _quantize_scalar(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """Write a number that is added to or multiplied with a quantized tensor as one step of its own grid."""
    if node.op_type not in ("Add", "Mul", "Sub", "Div") or readers_step(graph, node.output[0]) is None:
        return
    values = [graph.value(name) for name in node.input]
    place = next((i for i, value in enumerate(values) if value is not None and value.size == 1), None)
    if place is None or step_of(graph, node.input[1 - place]) is None or values[place].dtype != np.float32:
        return
    value = float(values[place].reshape(()))
    if node.op_type in ("Sub", "Div"):
        if place == 0 or value == 0:
            return
        value = -value if node.op_type == "Sub" else 1 / value
        node.op_type = {"Sub": "Add", "Div": "Mul"}[node.op_type]
    step = Step(abs(value) or 1.0, int(value < 0), "uint8")
    stored = np.full(values[place].shape, value > 0, "uint8")
    graph.set_input(node, place, add_dequantize(graph, graph.add_constant(stored), step))


def _drop_clipping(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """Take out a Relu or Clip whose limits are those of the grid that its values are put on."""
    if node.op_type not in ("Relu", "Clip"):
        return
    step = readers_step(graph, node.output[0])
    if step is None:
        return
    limits = np.iinfo(step.dtype)
    low, high = 0.0 if node.op_type == "Relu" else -np.inf, np.inf
    if node.op_type == "Clip":
        names = (*node.input[1:], "", "")[:2]
        found = [graph.value(name) for name in names]
        if any(value is None for name, value in zip(names, found, strict=True) if name):
            return
        low, high = (limit if value is None else float(value) for value, limit in zip(found, (low, high), strict=True))
    if (np.isinf(low) or step.quantize(low) == limits.min) and (np.isinf(high) or step.quantize(high) == limits.max):
        graph.remove(node)
        graph.replace(node.output[0], node.input[0])
    elif node.op_type == "Relu" and step.dtype == "uint8":
        # The grid goes on below zero, as it is shared with other tensors. Its part from zero on clamps as ReLU does,
        # and lets the operator before run in integers.
        upper = add_pair(graph, node.input[0], Step(step.scale, 0, "uint8"))
        graph.remove(node)
        graph.replace(node.output[0], upper)


def _pad_integers(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """Let a Pad between two pairs of one grid add zero points to integers, since no runtime fuses it."""
    if node.op_type != "Pad" or attribute(node, "mode", b"constant") != b"constant":
        return
    step = step_of(graph, node.input[0])
    if step is None or step.dtype == "int16" or readers_step(graph, node.output[0]) != step:
        return
    integers = graph.maker(node.input[0]).input[0]
    while len(node.input) < 3:
        graph.set_input(node, len(node.input), "")
    graph.set_input(node, 2, graph.add_constant(np.array(step.zero_point, step.dtype)))
    graph.set_input(node, 0, integers)
    for reader in graph.readers(node.output[0]):
        graph.remove(reader)
        graph.replace(reader.output[0], node.output[0])


def quantize_biases(graph: OnnxGraph, placed: dict[str, Placed]) -> None:
    """Store the bias of each operator with quantized input and weights as int32, on the grid of its products.

    Raises:
        ExportError: a bias is more than 2**31 steps.
    """
    for node in list(graph.nodes):
        weight = placed.get(node.input[1]) if node.op_type in _BIASED and len(node.input) > 2 else None
        bias = graph.value(node.input[2]) if weight is not None else None
        step = step_of(graph, node.input[0]) if weight is not None else None
        if bias is None or step is None or step.dtype == "int16" or weight.scale is None:
            continue
        if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
            continue  # a Gemm whose bias has another grid
        if weight.scale.size > 1 and weight.scale.size != bias.size:
            continue  # as for grouped transposed convolutions, whose weight scales belong to another axis
        scale = np.array(np.float32(step.scale) * weight.scale, "float32")
        values = np.rint(bias.reshape(-1).astype("float64") / scale)
        if not np.all(np.abs(values) <= _INT32_LIMIT):
            raise ExportError(
                f"expected a bias within 2**31 steps of its grid. Received: {np.abs(bias).max():g} in layer "
                f"{weight.weight.layer!r}, whose smallest step is {scale.min():g}",
                f"Leave layer {weight.weight.layer!r} out of the quantization.",
            )
        inputs = [graph.add_constant(values.astype("int32")), graph.add_constant(scale)]
        options = {"axis": 0} if scale.ndim else {}
        name = f"{weight.weight.layer}/DequantizeLinear_bias"
        inputs.append(graph.add_constant(np.zeros(scale.shape, "int32")))
        graph.set_input(node, 2, graph.add("DequantizeLinear", inputs, name=name, **options))


def shield_bodies(graph: OnnxGraph) -> None:
    """Keep pairs away from tensors that bodies of loops read without listing them.

    ONNX Runtime 1.32 carries a DequantizeLinear past a Transpose or Reshape to its readers, and aborts the process when
    one of them is such a body.
    """
    for node in list(graph.nodes):
        for name in graph.implicit_reads(node):
            if name not in graph.constants and name not in graph.inputs and _may_be_float(graph, name):
                _shield(graph, name, graph.readers(name))


def shield_floats(graph: OnnxGraph, placed: dict[str, Placed]) -> None:
    """Keep operators with float weights float where their inputs are quantized.

    ONNX Runtime quantizes such weights by itself, also those of layers that were left out of the quantization, and
    rounds activations of 16 bits to 8 for its matrix products.
    """
    kept = {name for name, held in placed.items() if held.scale is not None}
    for node in list(graph.nodes):
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and not kept & set(node.input):
            for name in dict.fromkeys(node.input[:2]):
                step = step_of(graph, name)
                if step is not None and (step.dtype == "int16" or (node.input[1] != name and _is_fixed(graph, node))):
                    _shield(graph, name, [node])


def _is_fixed(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Return whether the weights of an operator are the same for all inputs."""
    waiting = [node.input[1]]
    while waiting:
        name = waiting.pop()
        maker = graph.maker(name)
        if maker is None and name not in graph.constants:
            return False
        waiting.extend(maker.input if maker is not None else ())
    return True


def _may_be_float(graph: OnnxGraph, name: str) -> bool:
    """Return whether a tensor may hold floats; masks and sizes do not, and are never quantized."""
    maker = graph.maker(name)
    while maker is not None and maker.op_type in _MOVING:
        maker = graph.maker(maker.input[0])
    if maker is not None and maker.op_type == "Cast":
        return attribute(maker, "to", onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
    return maker is None or maker.op_type not in _NOT_FLOAT


def _shield(graph: OnnxGraph, name: str, readers: list[onnx.NodeProto]) -> None:
    """Let nodes read a tensor through a Sum of it alone, which is the same and past which nothing is carried."""
    shield = graph.add("Sum", [name])
    for node in readers:
        graph.rename_reads(node, name, shield)


def quantize_interface(graph: OnnxGraph, io: str) -> list[str]:
    """Let the graph take and return integers in place of floats that are quantized first and dequantized last.

    Args:
        graph: the graph.
        io: `"int8"` or `"uint8"`.

    Returns:
        The names of the float inputs and outputs that have no grid and stay float.
    """
    left = []
    for name, value in graph.inputs.items():
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and not _quantize_input(graph, name, io):
            left.append(name)
    for name, value in graph.outputs.items():
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and not _quantize_output(graph, name, io):
            left.append(name)
    return left


def _quantize_input(graph: OnnxGraph, name: str, io: str) -> bool:
    readers = graph.readers(name)
    steps = [read_step(graph, node) for node in readers if node.op_type == "QuantizeLinear"]
    step = next((step for step in steps if step is not None and step.dtype == "uint8"), None)
    if step is None:
        return False
    graph.inputs[name].type.tensor_type.elem_type = _ELEMENTS[io]
    floats = add_dequantize(graph, name, step.signed() if io == "int8" else step)
    graph.move_readers(name, floats, but=graph.maker(floats))
    for reader in readers if io == "uint8" else ():
        if read_step(graph, reader) == step:
            graph.remove(reader)
            graph.replace(reader.output[0], name)
    return True


def _quantize_output(graph: OnnxGraph, name: str, io: str) -> bool:
    step = step_of(graph, name)
    if step is None or step.dtype != "uint8":
        return False
    graph.outputs[name].type.tensor_type.elem_type = _ELEMENTS[io]
    floats = graph.rename_output(name)
    if io == "int8":
        add_quantize(graph, floats, step.signed(), name)
    else:
        graph.expose(graph.maker(floats).input[0], name)
    return True


_ELEMENTS = {"int8": onnx.TensorProto.INT8, "uint8": onnx.TensorProto.UINT8}
