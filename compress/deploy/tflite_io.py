"""Integer inputs and outputs of a TFLite file whose activations are integers."""

from __future__ import annotations

from typing import Literal

from ai_edge_litert import schema_py_generated as schema

from compress.deploy.tflite_flatbuffer import Op, TfliteFile, Type, quantization, read_grid
from compress.errors import ExportError


def set_io(file: TfliteFile, io: Literal["int8", "uint8"]) -> None:
    """Make every float input and output of the main graph an integer one; inputs that are indices stay.

    Raises:
        ExportError: an input or output is not quantized, or to 16 bits.
    """
    graph = file.graphs[0]
    names = {entry.tensorIndex: entry.name.decode() for item in _signatures(file) for entry in _entries(item)}
    changed: dict[int, int] = {}
    for index in dict.fromkeys(int(i) for i in graph.inputs):
        if graph.tensors[index].type == Type.FLOAT32:
            changed[index] = _open_input(file, graph, index, io, names.get(index, ""))
    for index in dict.fromkeys(int(i) for i in graph.outputs):
        if graph.tensors[index].type == Type.FLOAT32 and index not in changed:
            changed[index] = _open_output(file, graph, index, io, names.get(index, ""))
    graph.inputs = [changed.get(int(i), int(i)) for i in graph.inputs]
    graph.outputs = [changed.get(int(i), int(i)) for i in graph.outputs]
    for item in _signatures(file):
        for entry in _entries(item):
            entry.tensorIndex = changed.get(entry.tensorIndex, entry.tensorIndex)


def _open_input(file: TfliteFile, graph: schema.SubGraphT, index: int, io: str, name: str) -> int:
    readers = [operator for operator in graph.operators if index in [int(i) for i in operator.inputs]]
    held = {int(reader.outputs[0]) for reader in readers if file.code(reader) == Op.QUANTIZE}
    grids = {(graph.tensors[i].type, read_grid(graph.tensors[i])) for i in held}
    if (
        len(grids) != 1
        or any(file.code(reader) != Op.QUANTIZE for reader in readers)
        or index in map(int, graph.outputs)
    ):
        raise _refusal("input", name, io, "it is read in float")
    kind, (scale, zero_point) = grids.pop()
    if kind != Type.INT8:
        raise _refusal("input", name, io, "its activations have 16 bits")
    tensor = graph.tensors[index]
    first = min(held)
    graph.operators = [operator for operator in graph.operators if operator not in readers]
    for operator in graph.operators:
        operator.inputs = [first if int(i) in held else int(i) for i in operator.inputs]
    graph.tensors[first].name = tensor.name
    if io == "int8":
        return first
    outer = file.add_tensor(graph, tensor.name, Type.UINT8, tensor, quantization(scale, zero_point + 128))
    graph.operators = [file.operator(Op.QUANTIZE, [outer], [first]), *graph.operators]
    return outer


def _open_output(file: TfliteFile, graph: schema.SubGraphT, index: int, io: str, name: str) -> int:
    maker = next((operator for operator in graph.operators if index in [int(i) for i in operator.outputs]), None)
    readers = [operator for operator in graph.operators if index in [int(i) for i in operator.inputs]]
    if maker is None or file.code(maker) != Op.DEQUANTIZE:
        raise _refusal("output", name, io, "it is computed in float")
    held = int(maker.inputs[0])
    if graph.tensors[held].type != Type.INT8:
        raise _refusal("output", name, io, "its activations have 16 bits")
    tensor = graph.tensors[index]
    if not readers:
        graph.operators = [operator for operator in graph.operators if operator is not maker]
    if io == "int8":
        return held
    scale, zero_point = read_grid(graph.tensors[held])
    outer = file.add_tensor(graph, tensor.name, Type.UINT8, tensor, quantization(scale, zero_point + 128))
    graph.operators = [*graph.operators, file.operator(Op.QUANTIZE, [held], [outer])]
    return outer


def _refusal(kind: str, name: str, io: str, reason: str) -> ExportError:
    return ExportError(
        f"expected 8-bit activations at every input and output for io={io!r}. Received: {kind} {name!r}, but {reason}",
        "Export with io float32.",
    )


def _signatures(file: TfliteFile) -> list[schema.SignatureDefT]:
    return [item for item in file.model.signatureDefs or [] if item.subgraphIndex == 0]


def _entries(item: schema.SignatureDefT) -> list[schema.TensorMapT]:
    return [*item.inputs, *item.outputs]
