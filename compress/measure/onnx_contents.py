"""Weights and multiply-accumulates of an `.onnx` file, read from its graph without running it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from compress.errors import ModelError
from compress.measure.weights import Contents

_PACKED_BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
# Per quantized operator: positions of values and their zero point, and the axis of a zero point per channel.
_QUANTIZED: dict[str, tuple[tuple[int, int | None, int], ...]] = {
    "DequantizeLinear": ((0, 2, 1),),
    "ConvInteger": ((0, 2, 1), (1, 3, 0)),
    "MatMulInteger": ((0, 2, -2), (1, 3, -1)),
    "QLinearConv": ((0, 2, 1), (3, 5, 0), (8, None, 0)),
    "QLinearMatMul": ((0, 2, -2), (3, 5, -1)),
}
# Positions of scales and zero points.
_PARAMETERS = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
}
_STORED_INTEGERS = {
    onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4,
}  # fmt: skip
_PASSED_ON = {"Gather": (0,), "Mul": (0, 1), "Reshape": (0,)}  # of a scale, before it is multiplied
_OUTPUT_AXES = {
    "Conv": (0,), "ConvInteger": (0,), "QLinearConv": (0,), "ConvTranspose": (1,),
    "LSTM": (1,), "GRU": (1,), "RNN": (1,),
}  # fmt: skip
"""Axis of a kernel's output channels by the operator that reads it, where it is not the last."""

_SAME_LAYOUT = {"Cast", "DequantizeLinear", "Identity"}
_NO_KERNEL = {"Add", "Div", "If", "Loop", "Mul", "PRelu", "Scan", "Sub"}
_RECURRENT_KERNELS = {"GRU": (1, 2), "LSTM": (1, 2), "RNN": (1, 2)}  # what follows are biases and states
_STANDARD_DOMAINS = ("", "ai.onnx")
_UNCOUNTED_WORK = {
    "Attention", "DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan", "Col2Im", "DFT",
}  # fmt: skip


def read_onnx(path: str | Path) -> Contents:
    """Return weights and MACs of one sample of the `.onnx` file at `path`.

    Float constants of rank 1 and up and quantized integers are weights, except scales and zero points; other
    integers are shapes, axes and indices.

    Raises:
        ModelError: the file is not an ONNX model, or keeps weights in other files.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX model. Received: {error}") from error
    constants = dict(_constants(model.graph))
    for name, tensor in constants.items():
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(
                f"{path} keeps weights in another file, which is never opened. Received: {name!r}",
                "Save the model as one file.",
            )
    contents = Contents()
    nodes = list(_nodes(model.graph))
    _count_weights(nodes, constants, contents)
    _count_macs(model, contents)
    return contents


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield nodes in order, those of inner graphs (If, Loop, Scan) too."""
    for node in graph.node:
        yield node
        for inner in _inner_graphs(node):
            yield from _nodes(inner)


def _inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield the name and tensor of each initializer and Constant node, those of inner graphs too."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], attribute.t
        for inner in _inner_graphs(node):
            yield from _constants(inner)


def _count_weights(nodes: list[onnx.NodeProto], constants: dict[str, Any], contents: Contents) -> None:
    zero_points, parameters = _quantization(nodes)
    parameters |= _factors(nodes, constants)
    axes = _kernel_axes(nodes)
    for name, tensor in constants.items():
        if name in parameters or not tensor.dims:
            continue
        try:
            values = numpy_helper.to_array(tensor)
        except (TypeError, ValueError) as error:
            raise ModelError(f"the tensor {name!r} is damaged. Received: {error}") from error
        bits = _PACKED_BITS.get(tensor.data_type, 8 * values.dtype.itemsize)
        whole = values.dtype.kind in "iu"
        wide = whole and values.dtype.itemsize > 2
        if values.dtype.kind in "bOUS" or (whole and name not in zero_points and (values.ndim < 2 or wide)):
            continue
        if not whole:
            values = values.astype(np.float64) if values.dtype.kind != "f" else values
        else:
            values = values.astype(np.int64)  # 4-bit types are not NumPy's own
        point, axis = zero_points.get(name, (None, 0))
        zero_point = _zero_point(constants.get(point), values.shape, axis)
        used = axes.get(name)
        contents.weights.add(
            values, zero_point, kernel=used is not None, name=name, channel_axes=used or (0,), bits=bits
        )


def _kernel_axes(nodes: list[onnx.NodeProto]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that are kernels, each with the axes of its output channels."""
    axes: dict[str, tuple[int, ...]] = {}
    for node in reversed(nodes):  # what reads a tensor comes after what makes it
        found = _output_axes(node)
        if node.op_type in _SAME_LAYOUT and node.output:
            found = axes.get(node.output[0], found)
        axes.update((name, found) for name in _kernel_inputs(node))
    return axes


def _output_axes(node: onnx.NodeProto) -> tuple[int, ...]:
    """Return the axes of the output channels of what `node` reads as a kernel."""
    if node.op_type == "Gemm":
        return (0,) if any(attribute.name == "transB" and attribute.i for attribute in node.attribute) else (-1,)
    return _OUTPUT_AXES.get(node.op_type, (-1,))


def _kernel_inputs(node: onnx.NodeProto) -> list[str]:
    """Return the inputs that the operator does more with than arithmetic by element or passing them on."""
    if node.op_type in _NO_KERNEL:
        return []
    places = _RECURRENT_KERNELS.get(node.op_type, range(len(node.input)))
    return [node.input[place] for place in places]


def _quantization(nodes: list[onnx.NodeProto]) -> tuple[dict[str, tuple[str | None, int]], set[str]]:
    """Return each quantized tensor's zero point and its axis, and the names of scales and zero points."""
    zero_points: dict[str, tuple[str | None, int]] = {}
    parameters: set[str] = set()
    for node in nodes:
        given = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
        for values, point, axis in _QUANTIZED.get(node.op_type, ()):
            if values < len(node.input):
                name = node.input[point] if point is not None and point < len(node.input) else None
                zero_points[node.input[values]] = (name, axis if given is None else given)
        parameters.update(node.input[i] for i in _PARAMETERS.get(node.op_type, ()) if i < len(node.input))
    return zero_points, parameters - {""}


def _factors(nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> set[str]:
    """Return the names of scales that integers, stored or summed by an integer kernel, are multiplied by as floats."""
    makers = {name: node for node in nodes for name in node.output}

    def is_whole(name: str) -> bool:
        cast = makers.get(name)
        if cast is None or cast.op_type != "Cast":
            return False
        held, maker = constants.get(cast.input[0]), makers.get(cast.input[0])
        if held is not None:
            return held.data_type in _STORED_INTEGERS
        return maker is not None and maker.op_type in ("ConvInteger", "MatMulInteger")

    def held_in(name: str) -> set[str]:
        if name in constants:
            return {name}
        maker = makers.get(name)
        places = _PASSED_ON.get(maker.op_type, ()) if maker else ()
        return {found for place in places for found in held_in(maker.input[place])}

    products = [node for node in nodes if node.op_type == "Mul"]
    pairs = [pair for node in products for pair in (node.input, node.input[::-1]) if is_whole(pair[0])]
    return {name for _, factor in pairs for name in held_in(factor)}


def _zero_point(tensor: onnx.TensorProto | None, shape: tuple[int, ...], axis: int) -> np.ndarray | int:
    """Return the zero point as what broadcasts to `shape`: one number, one per channel or one per block."""
    if tensor is None:
        return 0
    points = numpy_helper.to_array(tensor).astype(np.int64)
    if points.size == 1:
        return int(points.reshape(-1)[0])
    if points.ndim == 1:
        return np.moveaxis(points.reshape(-1, *[1] * (len(shape) - 1)), 0, axis)
    block = -(-shape[axis] // points.shape[axis])
    return np.repeat(points, block, axis).take(range(shape[axis]), axis)


def _count_macs(model: onnx.ModelProto, contents: Contents) -> None:
    shapes = _shapes_for_one_sample(model)
    for node in model.graph.node:
        if node.domain not in _STANDARD_DOMAINS:
            contents.uncounted.add(f"{node.domain}.{node.op_type}")
        elif node.op_type in _UNCOUNTED_WORK:
            contents.uncounted.add(node.op_type)
        elif node.op_type in _MACS:
            output, *inputs = (shapes.get(name) for name in (node.output[0], *node.input))
            macs = None if output is None else _MACS[node.op_type](output, inputs)
            if macs is None:
                contents.uncounted.add(f"{node.op_type} of unknown shape")
            else:
                contents.macs += macs


def _shapes_for_one_sample(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the known shapes of tensors where the first axis of each input is 1."""
    known = onnx.ModelProto()
    known.CopyFrom(model)
    fixed = {tensor.name for tensor in known.graph.initializer}
    for value in known.graph.input:
        if value.name not in fixed and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in [*known.graph.output, *known.graph.value_info]:
        value.type.tensor_type.ClearField("shape")  # what was noted there may hold another batch
    with contextlib.suppress(onnx.shape_inference.InferenceError):  # then shapes stay unknown, which is said
        known = onnx.shape_inference.infer_shapes(known, data_prop=True)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in known.graph.initializer}
    for value in [*known.graph.input, *known.graph.output, *known.graph.value_info]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(d.dim_value for d in dims)
    return shapes


def _conv_macs(output: tuple[int, ...], inputs: list[tuple[int, ...] | None], weights: int = 1) -> int | None:
    """Weights are (out, in / groups, *kernel)."""
    return None if inputs[weights] is None else math.prod(output) * math.prod(inputs[weights][1:])


def _transposed_conv_macs(output: tuple[int, ...], inputs: list[tuple[int, ...] | None]) -> int | None:
    """Weights are (in, out / groups, *kernel): each input value meets all of them but the first axis."""
    return None if None in inputs[:2] else math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _matmul_macs(output: tuple[int, ...], inputs: list[tuple[int, ...] | None]) -> int | None:
    return math.prod(output) * inputs[0][-1] if inputs[0] else None


def _gemm_macs(output: tuple[int, ...], inputs: list[tuple[int, ...] | None]) -> int | None:
    """The inner size is what the first factor has besides its rows, whether transposed or not."""
    return math.prod(inputs[0]) * output[1] if inputs[0] else None


_MACS = {
    "Conv": _conv_macs,
    "ConvInteger": _conv_macs,
    "QLinearConv": lambda output, inputs: _conv_macs(output, inputs, 3),
    "ConvTranspose": _transposed_conv_macs,
    "Gemm": _gemm_macs,
    "MatMul": _matmul_macs,
    "MatMulInteger": _matmul_macs,
    "QLinearMatMul": _matmul_macs,
}
