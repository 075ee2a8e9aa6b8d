"""Weights and multiply-accumulates of a `.tflite` file, read from its flatbuffer without running it."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.deploy.tflite_sparse import decode_sparse
from compress.errors import ModelError
from compress.measure.weights import Contents

_BUILTINS = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_TYPES = {value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
_FLOATS = {"FLOAT16": np.float16, "FLOAT32": np.float32, "FLOAT64": np.float64}
_INTEGERS = {"INT8": np.int8, "UINT8": np.uint8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64}
_PACKED_BITS = {"INT4": 4, "INT2": 2}
_UNCOUNTED_WORK = {
    "BIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_RNN", "CALL", "CONV_3D", "CONV_3D_TRANSPOSE", "IF",
    "LSTM", "RNN", "STABLEHLO_COMPOSITE", "STABLEHLO_CONVOLUTION", "STABLEHLO_CUSTOM_CALL",
    "STABLEHLO_DOT_GENERAL", "STABLEHLO_WHILE", "SVDF", "UNIDIRECTIONAL_SEQUENCE_LSTM",
    "UNIDIRECTIONAL_SEQUENCE_RNN", "WHILE", "?",
}  # fmt: skip
_OUTPUT_AXES = {"DEPTHWISE_CONV_2D": (3,), "GATHER": (-1,)}
"""Axis of a kernel's output channels by the operator that reads it, where it is not the first."""

_PASSED_ON = {"DENSIFY", "DEQUANTIZE"}
_NO_KERNEL = {"ADD", "CALL", "DIV", "IF", "MUL", "PRELU", "SUB", "WHILE"}
DAMAGED = (
    ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError, struct.error,
)  # fmt: skip


def read_tflite(path: str | Path) -> Contents:
    """Return weights and MACs of one sample of the `.tflite` file at `path`.

    Constant float tensors and quantized integer tensors of rank 1 and up are weights; other integers are
    shapes, axes and indices. A buffer that several tensors share counts once.

    Raises:
        ModelError: the file is not a TFLite model.
    """
    content = Path(path).read_bytes()
    if not schema.Model.ModelBufferHasIdentifier(content, 0):
        raise ModelError(f"{path} is not a TFLite model. Received: {len(content)} bytes without the TFL3 identifier")
    try:
        model = schema.Model.GetRootAs(content)
        contents, seen = Contents(), set()
        for index in range(model.SubgraphsLength()):
            graph = model.Subgraphs(index)
            axes = _kernel_axes(model, graph)
            for position in range(graph.TensorsLength()):
                tensor = graph.Tensors(position)
                weight = _read_weight(model, tensor, content, contents.unread, seen)
                if weight is not None:
                    name = (tensor.Name() or b"").decode(errors="replace")
                    used = axes.get(position)
                    bits = _PACKED_BITS.get(_TYPES.get(tensor.Type(), "?"))
                    contents.weights.add(
                        *weight, kernel=used is not None, name=name, channel_axes=used or (0,), bits=bits
                    )
        _count_macs(model, contents)
    except DAMAGED as error:
        # The generated reader trusts offsets, and those of a damaged file lead anywhere.
        raise ModelError(f"{path} is damaged: its tables cannot be read. Received: {error}") from error
    return contents


def _kernel_axes(model: Any, graph: Any) -> dict[int, tuple[int, ...]]:
    """Return the tensors that some operator does more with than arithmetic by element or passing them on, each with
    the axes of its output channels."""
    axes: dict[int, tuple[int, ...]] = {}
    for index in reversed(range(graph.OperatorsLength())):  # what reads a tensor comes after what makes it
        operator = graph.Operators(index)
        name = operator_name(model, operator)
        if name in _NO_KERNEL:
            continue
        found = _OUTPUT_AXES.get(name, (0,))
        if name in _PASSED_ON and operator.OutputsLength():
            found = axes.get(operator.Outputs(0), found)
        axes.update((operator.Inputs(i), found) for i in range(operator.InputsLength()))
    return axes


def operator_name(model: Any, operator: Any) -> str:
    code = model.OperatorCodes(operator.OpcodeIndex())
    return _BUILTINS.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()), "?")


def _read_weight(
    model: Any, tensor: Any, content: bytes, unread: set[str], seen: set[int]
) -> tuple[np.ndarray, np.ndarray | int] | None:
    """Return values and zero point of a weight; `None` for what is none, was seen, or cannot be read."""
    shape, kind, buffer = _shape(tensor), _TYPES.get(tensor.Type(), "?"), tensor.Buffer()
    quantization = tensor.Quantization()
    quantized = quantization is not None and quantization.ScaleLength() > 0
    raw = _buffer_bytes(model.Buffers(buffer), content)
    if not shape or not len(raw) or buffer in seen or not (kind in _FLOATS or quantized):
        return None
    seen.add(buffer)
    sparse = tensor.Sparsity()
    values = _decode(raw, kind, math.prod(shape) if sparse is None else None)
    if values is None:
        unread.add(f"weights of type {kind}")
        return None
    zero_point = _zero_point(quantization, len(shape)) if quantized else 0
    if sparse is not None:
        return decode_sparse(schema.SparsityParametersT.InitFromObj(sparse), values, shape), zero_point
    return values.reshape(shape), zero_point


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.Shape(i) for i in range(tensor.ShapeLength()))


def _buffer_bytes(buffer: Any, content: bytes) -> np.ndarray:
    """Return the bytes of a buffer, inside the flatbuffer or, in files over 2 GB, behind it."""
    if buffer.DataLength():
        return buffer.DataAsNumpy()
    if buffer.Offset() > 1:
        return np.frombuffer(content, np.uint8, buffer.Size(), buffer.Offset())
    return np.empty(0, np.uint8)


def _decode(raw: np.ndarray, kind: str, size: int | None) -> np.ndarray | None:
    """Return `size` numbers, or all, of type `kind`, or `None` for a type that is not known."""
    if dtype := {**_FLOATS, **_INTEGERS}.get(kind):
        return raw.view(dtype)[:size]
    if bits := _PACKED_BITS.get(kind):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = (raw[:, None] >> shifts) & (2**bits - 1)
        return ((fields.astype(np.int8) ^ (1 << (bits - 1))) - (1 << (bits - 1))).reshape(-1)[:size]
    return None


def _zero_point(quantization: Any, rank: int) -> np.ndarray | int:
    count = quantization.ZeroPointLength()
    if count == 0:
        return 0
    points = np.array([quantization.ZeroPoint(i) for i in range(count)])
    shape = [1] * rank
    shape[quantization.QuantizedDimension() if count > 1 else 0] = count
    return points.reshape(shape)


def _count_macs(model: Any, contents: Contents) -> None:
    """Add the MACs of the main graph; work inside control flow and custom operators is named as uncounted."""
    graph = model.Subgraphs(0)
    shapes = [_shape(graph.Tensors(i)) for i in range(graph.TensorsLength())]
    batch = next((shapes[graph.Inputs(i)][0] for i in range(graph.InputsLength()) if shapes[graph.Inputs(i)]), 1)
    for index in range(graph.OperatorsLength()):
        operator = graph.Operators(index)
        name = operator_name(model, operator)
        inputs = [shapes[operator.Inputs(i)] if operator.Inputs(i) >= 0 else () for i in range(operator.InputsLength())]
        outputs = [shapes[operator.Outputs(i)] for i in range(operator.OutputsLength())]
        macs = _operator_macs(operator, name, inputs, outputs[0] if outputs else ())
        if macs is not None:
            contents.macs += macs // max(batch, 1)
        elif name == "CUSTOM":
            code = model.OperatorCodes(operator.OpcodeIndex()).CustomCode() or b"CUSTOM"
            contents.uncounted.add(code.decode(errors="replace"))
        elif name == "VAR_HANDLE":
            contents.unread.add("weights kept in variables")
        elif name in _UNCOUNTED_WORK:
            contents.uncounted.add(name)


def _operator_macs(operator: Any, name: str, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int | None:
    """Return MACs from static shapes, or `None` for operators without a formula here."""
    if name in ("CONV_2D", "FULLY_CONNECTED"):  # weights (out, kh, kw, in / groups) and (out, in)
        return math.prod(output) * math.prod(inputs[1][1:])
    if name == "DEPTHWISE_CONV_2D":  # weights (1, kh, kw, out)
        return math.prod(output) * math.prod(inputs[1][1:3])
    if name == "TRANSPOSE_CONV":  # inputs: output shape, weights (out, kh, kw, in), values
        return math.prod(inputs[2]) * math.prod(inputs[1][:3])
    if name == "BATCH_MATMUL":
        options = schema.BatchMatMulOptions()
        table = operator.BuiltinOptions()
        options.Init(table.Bytes, table.Pos)
        return math.prod(output) * inputs[0][-2 if options.AdjX() else -1]
    return None
