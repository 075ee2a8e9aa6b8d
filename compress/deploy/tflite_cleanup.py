"""Operators that a rewritten TFLite graph does not need: reshapes in a row, and what nobody reads."""

from __future__ import annotations

from ai_edge_litert import schema_py_generated as schema

from compress.deploy.tflite_flatbuffer import Op, TfliteFile

_PURE = {Op.QUANTIZE, Op.DEQUANTIZE, Op.RESHAPE, Op.TRANSPOSE}


def clean_up(file: TfliteFile) -> None:
    """Let a RESHAPE of a RESHAPE read what the first one reads, and drop operators without readers."""
    for graph in file.graphs:
        _merge_reshapes(file, graph)
        _drop_unread(file, graph)


def _merge_reshapes(file: TfliteFile, graph: schema.SubGraphT) -> None:
    sources: dict[int, int] = {}  # output of a RESHAPE -> what it reshapes
    equal: dict[int, int] = {}
    kept = []
    outputs = {int(i) for i in graph.outputs}
    for operator in graph.operators or []:
        operator.inputs = [equal.get(int(i), int(i)) for i in operator.inputs]
        kept.append(operator)
        if file.code(operator) != Op.RESHAPE:
            continue
        source, output = sources.get(operator.inputs[0], operator.inputs[0]), int(operator.outputs[0])
        operator.inputs = [source, *operator.inputs[1:]]
        sources[output] = source
        if output not in outputs and _static_shape(graph, output) == _static_shape(graph, source) is not None:
            equal[output] = source
            kept.pop()
    graph.operators = kept


def _static_shape(graph: schema.SubGraphT, index: int) -> tuple[int, ...] | None:
    """Return the shape of a tensor whose every size is known."""
    tensor = graph.tensors[index]
    signature = tensor.shapeSignature
    if tensor.shape is None or (signature is not None and any(size < 0 for size in signature)):
        return None
    return tuple(int(size) for size in tensor.shape)


def _drop_unread(file: TfliteFile, graph: schema.SubGraphT) -> None:
    read = {int(i) for i in graph.outputs}
    kept = []
    for operator in reversed(graph.operators or []):
        if file.code(operator) in _PURE and not read & {int(i) for i in operator.outputs}:
            continue
        read.update(int(i) for i in operator.inputs)
        kept.append(operator)
    graph.operators = kept[::-1]
