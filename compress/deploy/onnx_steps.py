"""Grids of quantized activations in ONNX graphs: from TensorFlow's fake-quantization op to QuantizeLinear and back.

Jacob et al. 2018, arXiv:1712.05877 (affine grids that hold 0 exactly).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import tf2onnx

from compress.deploy.onnx_graph import OnnxGraph
from compress.errors import ExportError

_UNUSED_AXIS = 1
"""Set on pairs while tf2onnx works, because its own optimizer then leaves them where they are."""


@dataclass(frozen=True)
class Step:
    """The grid `scale * (q - zero_point)` of one tensor.

    Args:
        scale: distance of neighbouring values.
        zero_point: the integer that stands for 0.
        dtype: `"uint8"`, `"int8"` or `"int16"`.
    """

    scale: float
    zero_point: int
    dtype: str

    def quantize(self, value: float) -> int:
        """Return the integer that a value becomes."""
        limits = np.iinfo(self.dtype)
        found = np.rint(np.float32(value) / np.float32(self.scale)) + self.zero_point
        return int(np.clip(found, limits.min, limits.max))

    def signed(self) -> Step:
        """Return the same grid in int8."""
        return Step(self.scale, self.zero_point - 128, "int8") if self.dtype == "uint8" else self


def convert_fake_quantization(context: Any, node: Any, _name: str, _arguments: Any) -> None:
    """Convert `FakeQuantWithMinMaxVars` to a QuantizeLinear and a DequantizeLinear; called by tf2onnx.

    Eight bits become uint8, sixteen int16 around 0.

    Raises:
        ExportError: the range is no constant, empty or not finite, or the bits are others.
    """
    if not all(source.is_const() for source in node.inputs[1:3]):
        raise ExportError(
            f"expected a fixed range of quantized activations. Received: {node.name!r} with a computed one"
        )
    low, high = (np.float32(source.get_tensor_value()) for source in node.inputs[1:3])
    step = _nudged(
        low, high, int(node.get_attr_value("num_bits")), bool(node.get_attr_value("narrow_range")), node.name
    )
    x, shape = node.input[0], context.get_shape(node.input[0])
    scale = context.make_const(tf2onnx.utils.make_name(node.name), np.array(step.scale, "float32")).output[0]
    zero = context.make_const(tf2onnx.utils.make_name(node.name), np.array(step.zero_point, step.dtype)).output[0]
    integer = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(step.dtype))
    options = {"op_name_scope": node.name, "attr": {"axis": _UNUSED_AXIS}, "shapes": [shape]}
    output = node.output[0]
    context.remove_node(node.name)
    quantized = context.make_node("QuantizeLinear", [x, scale, zero], dtypes=[integer], **options)
    kind = onnx.TensorProto.FLOAT
    context.make_node(
        "DequantizeLinear", [quantized.output[0], scale, zero], outputs=[output], dtypes=[kind], **options
    )


def _nudged(low: np.float32, high: np.float32, bits: int, narrow: bool, name: str) -> Step:
    """Return the grid that TensorFlow's op computes with, in its own arithmetic."""
    if bits not in (8, 16):
        raise ExportError(
            f"ONNX files hold activations of 8 or 16 bits. Received: {bits} bits at {name!r}",
            "Quantize activations to 8 bits; weights may have fewer.",
        )
    scale = (high - low) / np.float32(2**bits - 1 - narrow)
    if not (np.isfinite(scale) and scale >= np.finfo("float32").tiny and low <= 0 <= high):
        raise ExportError(
            f"expected a range of activations that holds 0 and more. Received: {low:g} to {high:g} at {name!r}",
            "Calibrate the model on data that reaches this layer.",
        )
    lowest = np.float32(narrow)
    zero = int(np.clip(np.floor(lowest - low / scale + np.float32(0.5)), lowest, 2**bits - 1))
    if bits == 8:
        return Step(float(scale), zero, "uint8")
    return Step(float(scale), zero - 2**15, "int16")


def forget_axes(graph: OnnxGraph) -> None:
    """Remove the axis of pairs with one scale, which was set for tf2onnx alone."""
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            del node.attribute[:]


def read_step(graph: OnnxGraph, node: onnx.NodeProto | None) -> Step | None:
    """Return the grid of a QuantizeLinear or DequantizeLinear with one scale, or `None` for any other node."""
    if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    scale, zero = graph.value(node.input[1]), graph.value(node.input[2])
    if scale is None or zero is None or scale.size != 1:
        return None
    return Step(float(scale.reshape(())), int(zero.reshape(())), zero.dtype.name)


def step_of(graph: OnnxGraph, name: str) -> Step | None:
    """Return the grid that a float activation lies on, known from the DequantizeLinear that makes it."""
    node = graph.maker(name)
    if node is None or node.op_type != "DequantizeLinear" or node.input[0] in graph.constants:
        return None
    return read_step(graph, node)


def readers_step(graph: OnnxGraph, name: str) -> Step | None:
    """Return the one grid on which all readers of a float tensor put it, or `None`."""
    readers = graph.readers(name)
    steps = {read_step(graph, node) if node.op_type == "QuantizeLinear" else None for node in readers}
    return steps.pop() if len(steps) == 1 and name not in graph.outputs else None


def add_quantize(graph: OnnxGraph, name: str, step: Step, output: str | None = None) -> str:
    """Add a QuantizeLinear and return its output, which is new unless it is given."""
    return graph.add("QuantizeLinear", [name, *_parameters(graph, step)], outputs=[output] if output else 1)


def add_dequantize(graph: OnnxGraph, name: str, step: Step, output: str | None = None) -> str:
    """Add a DequantizeLinear and return its output, which is new unless it is given."""
    return graph.add("DequantizeLinear", [name, *_parameters(graph, step)], outputs=[output] if output else 1)


def add_pair(graph: OnnxGraph, name: str, step: Step) -> str:
    """Put a tensor on a grid and return the float tensor that lies on it."""
    return add_dequantize(graph, add_quantize(graph, name, step), step)


def _parameters(graph: OnnxGraph, step: Step) -> list[str]:
    return [
        graph.add_constant(np.array(step.scale, "float32")),
        graph.add_constant(np.array(step.zero_point, step.dtype)),
    ]
