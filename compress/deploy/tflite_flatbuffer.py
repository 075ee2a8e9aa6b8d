"""Editing of TFLite files: tensors, constants and operators of a loaded flatbuffer, and the bytes of the result.

Bytes depend on nothing but the model: unused tensors and buffers are left out and every table keeps its order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.deploy.tflite_versions import operator_version

Type, Op = schema.TensorType, schema.BuiltinOperator
INTEGER_TYPES = (Type.INT4, Type.INT8, Type.INT16)
_NUMPY = {
    Type.FLOAT32: "float32", Type.FLOAT16: "float16", Type.INT8: "int8", Type.UINT8: "uint8", Type.INT16: "int16",
    Type.UINT16: "uint16", Type.INT32: "int32", Type.INT64: "int64", Type.BOOL: "bool",
}  # fmt: skip
_ALIGNMENT = 16  # bytes; kernels read constants in place
_STALE = b"min_runtime_version"


class TfliteFile:
    """A TFLite file that is open for changes.

    Attributes:
        model: the file as objects of the schema.
        graphs: its subgraphs; the first is the main one.
    """

    def __init__(self, content: bytes):
        self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content))
        self.graphs = self.model.subgraphs
        self._codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in self.model.operatorCodes]

    def code(self, operator: schema.OperatorT) -> int:
        """Return the `Op` of an operator."""
        return self._codes[operator.opcodeIndex]

    def operator_name(self, operator: schema.OperatorT) -> str:
        """Return the name of an operator's kind, such as `"CONV_2D"`."""
        return _OPERATOR_NAMES[self.code(operator)]

    def constant(self, graph: schema.SubGraphT, index: int) -> np.ndarray | None:
        """Return the values of a tensor that the file holds, or `None` for one that is computed or of another type."""
        tensor = graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        if data is None or tensor.type not in _NUMPY:
            return None
        shape = () if tensor.shape is None else tuple(tensor.shape)
        return np.asarray(data, "uint8").view(_NUMPY[tensor.type]).reshape(shape)

    def add_tensor(
        self,
        graph: schema.SubGraphT,
        name: bytes,
        kind: int,
        like: schema.TensorT | None = None,
        quantization: schema.QuantizationParametersT | None = None,
        values: np.ndarray | None = None,
        shape: list[int] | None = None,
    ) -> int:
        """Add a tensor of type `kind` and return its index.

        Args:
            like: the tensor whose shape it has.
            values: its values if it is constant, which give the shape then. INT4 values are int8 here.
            shape: its shape, where neither of these gives it.
        """
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.quantization, tensor.hasRank = name, kind, quantization, True
        tensor.shape = shape if shape is not None else list(values.shape) if like is None else like.shape
        tensor.shapeSignature = None if like is None else like.shapeSignature
        tensor.buffer = 0
        if values is not None:
            buffer = schema.BufferT()
            packed = _pack_int4(values) if kind == Type.INT4 else np.ascontiguousarray(values)
            buffer.data = packed.reshape(-1).view("uint8")
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def operator(self, code: int, inputs: Iterable[int], outputs: Iterable[int]) -> schema.OperatorT:
        """Return a new operator without options, which the caller puts into a graph."""
        operator = schema.OperatorT()
        operator.opcodeIndex = self._code_index(code, 1)
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        return operator

    def twin(self, operator: schema.OperatorT, inputs: Iterable[int], outputs: Iterable[int]) -> schema.OperatorT:
        """Return a copy of an operator that reads and writes other tensors."""
        twin = copy.copy(operator)
        twin.inputs, twin.outputs = list(inputs), list(outputs)
        return twin

    def to_bytes(self) -> bytes:
        """Return the file, with operator versions that fit its tensors and without what nothing uses."""
        for graph in self.graphs:
            for operator in graph.operators or []:
                version = operator_version(self, graph, operator)
                kept = self.model.operatorCodes[operator.opcodeIndex].version
                operator.opcodeIndex = self._code_index(self.code(operator), max(version, kept), operator.opcodeIndex)
        self._drop_codes()
        for i, graph in enumerate(self.graphs):
            self._drop_tensors(i, graph)
        # what the converter wrote there holds for the float file only
        self.model.metadata = [item for item in self.model.metadata or [] if item.name != _STALE] or None
        self._drop_buffers()
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _code_index(self, code: int, version: int, like: int | None = None) -> int:
        for i, entry in enumerate(self.model.operatorCodes):
            if self._codes[i] == code and entry.version == version and (like is None or self._is_plain(like)):
                return i
        if like is not None and not self._is_plain(like):
            return like  # custom operators have names and versions of their own
        entry = schema.OperatorCodeT()
        entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), version
        self.model.operatorCodes.append(entry)
        self._codes.append(code)
        return len(self._codes) - 1

    def _is_plain(self, index: int) -> bool:
        return self._codes[index] != Op.CUSTOM

    def _drop_codes(self) -> None:
        used = sorted({operator.opcodeIndex for graph in self.graphs for operator in graph.operators or []})
        for graph in self.graphs:
            for operator in graph.operators or []:
                operator.opcodeIndex = used.index(operator.opcodeIndex)
        self.model.operatorCodes = [self.model.operatorCodes[i] for i in used]
        self._codes = [self._codes[i] for i in used]

    def _drop_tensors(self, number: int, graph: schema.SubGraphT) -> None:
        operators = graph.operators or []
        signatures = [item for item in self.model.signatureDefs or [] if item.subgraphIndex == number]
        maps = [entry for item in signatures for entry in (*item.inputs, *item.outputs)]
        used = {int(i) for op in operators for i in (*op.inputs, *op.outputs, *_listed(op.intermediates)) if i >= 0}
        used |= {int(i) for i in (*graph.inputs, *graph.outputs)} | {entry.tensorIndex for entry in maps}
        places = {old: new for new, old in enumerate(sorted(used))} | {-1: -1}
        for op in operators:
            op.inputs, op.outputs = [places[int(i)] for i in op.inputs], [places[int(i)] for i in op.outputs]
            if op.intermediates is not None:
                op.intermediates = [places[int(i)] for i in op.intermediates]
        graph.inputs, graph.outputs = [places[int(i)] for i in graph.inputs], [places[int(i)] for i in graph.outputs]
        for entry in maps:
            entry.tensorIndex = places[entry.tensorIndex]
        graph.tensors = [graph.tensors[i] for i in sorted(used)]

    def _drop_buffers(self) -> None:
        holders = [tensor for graph in self.graphs for tensor in graph.tensors] + list(self.model.metadata or [])
        used = sorted({0} | {holder.buffer for holder in holders})
        places = {old: new for new, old in enumerate(used)}
        for holder in holders:
            holder.buffer = places[holder.buffer]
        self.model.buffers = [_AlignedBuffer.of(self.model.buffers[i]) for i in used]


class _AlignedBuffer(schema.BufferT):
    """A buffer whose bytes start at a multiple of 16, as the schema asks and the Python builder does not do."""

    @classmethod
    def of(cls, buffer: schema.BufferT) -> _AlignedBuffer:
        aligned = cls()
        aligned.__dict__.update(buffer.__dict__)
        return aligned

    def Pack(self, builder: flatbuffers.Builder) -> int:
        if self.data is not None:
            builder.Prep(_ALIGNMENT, len(self.data))
        return super().Pack(builder)


def quantization(scale: Any, zero_point: int = 0, axis: int = 0) -> schema.QuantizationParametersT:
    """Return the parameters of a tensor with these scales, along `axis` if there are several."""
    found = schema.QuantizationParametersT()
    found.scale = np.asarray(scale, "float32").reshape(-1)
    found.zeroPoint = np.full(found.scale.size, zero_point, "int64")
    found.quantizedDimension = axis
    return found


def read_grid(tensor: schema.TensorT) -> tuple[float, int]:
    """Return the scale and the zero point of a tensor that has one of each."""
    return float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])


def has_grid(tensor: schema.TensorT) -> bool:
    """Return whether a tensor has one scale for all of its values."""
    found = tensor.quantization
    return found is not None and found.scale is not None and len(found.scale) == 1


def _pack_int4(values: np.ndarray) -> np.ndarray:
    """Return two values per byte, the first in the lower half."""
    flat = values.reshape(-1).astype("uint8") & 15
    flat = np.append(flat, np.zeros(flat.size % 2, "uint8"))
    return flat[0::2] | flat[1::2] << 4


def _listed(values: Any) -> Any:
    return () if values is None else values


_OPERATOR_NAMES = {value: name for name, value in vars(Op).items() if name.isupper()}
