"""Integer products in ONNX graphs whose activations get their grid at run time, from each tensor's own range.

`y = (q - z) * (w - 128)`, summed in int32, times `s * s_w`: DynamicQuantizeLinear makes the uint8 tensor `q`, one scale
`s` and one zero point `z` out of the whole float tensor, all samples of the batch together, and `s_w` is the scale of
each output channel. These are the operators that onnxruntime.quantization.quantize_dynamic writes.
"""

from __future__ import annotations

import numpy as np
import onnx

from compress.deploy.onnx_graph import OnnxGraph
from compress.deploy.onnx_stored import Placed


def quantize_at_run_time(graph: OnnxGraph, placed: dict[str, Placed]) -> list[str]:
    """Let matrix products and convolutions with stored weights compute in integers.

    Returns:
        The layers that compute in float, since no such operator exists for them.
    """
    made: dict[str, list[str]] = {}
    left: dict[str, None] = {}
    for name, weight in placed.items():
        for node in graph.readers(name):
            place = _channel_axis(node)
            fits = node.input[1:2] == [name] and weight.scale is not None and weight.axis in (None, place)
            if place is None or not fits:
                left[weight.weight.layer] = None
                continue
            x = node.input[0]
            if x not in made:
                made[x] = [graph.new_name("tensor") for _ in range(3)]
                graph.add("DynamicQuantizeLinear", [x], outputs=made[x])
            _replace(graph, node, made[x], weight)
    return list(left)


def _channel_axis(node: onnx.NodeProto) -> int | None:
    """Return the axis of the weights that output channels lie on, or `None` for operators without an integer form."""
    if node.op_type == "MatMul":
        return 1
    if node.op_type == "Conv":
        return 0
    return None


def _replace(graph: OnnxGraph, node: onnx.NodeProto, quantized: list[str], weight: Placed) -> None:
    integers, scale, zero = quantized
    layer = weight.weight.layer
    convolves = node.op_type == "Conv"
    dtype = "uint8" if graph.constants[weight.integers].data_type == onnx.TensorProto.UINT8 else "int8"
    weight_zero = graph.add_constant(np.array(128 if dtype == "uint8" else 0, dtype))
    options = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute} if convolves else {}
    kind = "ConvInteger" if convolves else "MatMulInteger"
    total = graph.add(kind, [integers, weight.integers, zero, weight_zero], name=f"{layer}/{kind}", **options)
    floats = graph.add("Cast", [total], to=onnx.TensorProto.FLOAT)
    factors = weight.scale
    spread = (1, -1) + (1,) * (len(graph.constants[weight.integers].dims) - 2)
    if convolves and factors.ndim:
        factors = factors.reshape(spread)
    product = graph.add("Mul", [scale, graph.add_constant(factors)])
    output = graph.add("Mul", [floats, product])
    if convolves and len(node.input) > 2:
        bias = graph.value(node.input[2])
        bias_name = (
            graph.add_constant(bias.reshape(spread))
            if bias is not None
            else graph.add("Reshape", [node.input[2], graph.add_constant(np.array(spread, "int64"))])
        )
        output = graph.add("Add", [output, bias_name], name=f"{layer}/Add")
    graph.remove(node)
    graph.replace(node.output[0], output)
