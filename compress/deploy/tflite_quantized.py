"""TFLite files of quantized models: the file of the float model, rewritten with the stored weights.

The converter only traces and fuses. Every scale and every integer in the result comes from the model, so the file
computes what the fake-quantized model computes; what stays float is listed by `float_operators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ai_edge_litert import schema_py_generated as schema

from compress.deploy.conversion import Places
from compress.deploy.tflite_cleanup import clean_up
from compress.deploy.tflite_conversion import to_tflite
from compress.deploy.tflite_flatbuffer import Op, TfliteFile, Type
from compress.deploy.tflite_fusions import fuse_biases
from compress.deploy.tflite_integer import IntegerGraph
from compress.deploy.tflite_io import set_io
from compress.deploy.tflite_rescaled import find_rescaled
from compress.deploy.tflite_stored import store_weights
from compress.deploy.tflite_weights import FileWeight, WeightTensors, find_weights
from compress.errors import ExportError
from compress.quantization.stored import Compute, StoredWeight

_CONTROL_FLOW = {Op.WHILE, Op.IF, Op.CALL, Op.CALL_ONCE}
_NO_COMPUTATION = {Op.QUANTIZE, Op.DEQUANTIZE, Op.SHAPE, *_CONTROL_FLOW}


def to_quantized_tflite(
    folder: str,
    endpoints: list[tuple[str, int | None]],
    inputs: list[str],
    outputs: list[str],
    places: Places,
    weights: Sequence[StoredWeight],
    *,
    compute: Compute,
    io: Literal["float32", "int8", "uint8"] = "float32",
    int4: Literal["packed", "int8"] | None = None,
    single: bool | None = None,
) -> tuple[bytes, int | None, list[str]]:
    """Return the file, the batch size that it takes (`None`: any) and notes for the user.

    Args:
        folder: SavedModel of the deploy model.
        endpoints: `(name, batch)` of its entry points, the preferred one first.
        inputs: names of the inputs in the model's order.
        outputs: names of the outputs in the model's order.
        places: where operators come from.
        weights: the weights that the file is to hold.
        compute: what the file computes with.
        io: type of inputs and outputs; others than `"float32"` only with `compute="integer"`.
        int4: whether weights of at most 4 bits take half a byte where a kernel reads that, or one; `None` means half
            a byte with `compute="weights"` only, as integer kernels for it are slower than those for int8.
        single: whether the file takes one sample at a time, which spares it the operators that compute shapes; `None`
            means for `compute="integer"` only.

    Raises:
        ExportError: an operation has no equivalent, a weight is not in the file, or `io` is not possible.
    """
    if compute == "integer" if single is None else single:
        endpoints = sorted(endpoints, key=lambda endpoint: endpoint[1] is None)
    content, batch = to_tflite(folder, endpoints, inputs, outputs, places)
    content, notes = quantize_file(content, weights, compute=compute, io=io, int4=int4)
    return content, batch, notes


def quantize_file(
    content: bytes,
    weights: Sequence[StoredWeight],
    *,
    compute: Compute,
    io: Literal["float32", "int8", "uint8"] = "float32",
    int4: Literal["packed", "int8"] | None = None,
) -> tuple[bytes, list[str]]:
    """Return the quantized form of the float file of a deploy model, and notes for the user.

    Raises:
        ExportError: a weight is not in the file, or `io` is not possible.
    """
    if io != "float32" and compute != "integer":
        raise ExportError(
            f"integer inputs and outputs need integer activations. Received: io={io!r} with {compute!r} computation",
            "Export with io float32, or quantize the activations too.",
        )
    file = TfliteFile(content)
    found, missing = find_weights(file, weights)
    if missing := find_rescaled(file, missing, found):
        raise ExportError(
            f"expected every quantized weight as a constant of the TFLite file. Received: none for "
            f"{', '.join(repr(weight.path) for weight in missing[:5])}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}",
            "The converter has merged the weight with others: exclude the layer from quantization.",
        )
    fuse_biases(file)
    tensors = WeightTensors(file, int4 == "packed" or (int4 is None and compute == "weights"))
    if compute == "integer":
        for number in range(len(file.graphs)):
            held = {tensor: weight for (owner, tensor), weight in found.items() if owner == number}
            IntegerGraph(file, number, held, tensors).lower()
    store_weights(file, found, tensors, hybrid=compute == "dynamic")
    clean_up(file)
    if io != "float32":
        set_io(file, io)
    return file.to_bytes(), _notes(found, tensors)


def float_operators(content: bytes, places: Places) -> list[tuple[str, str]]:
    """Return `(operator, layer)` of everything in a file that computes on float tensors, once each and in order.

    QUANTIZE, DEQUANTIZE and control flow compute nothing. The layer is a path such as `"block/conv"`, or `""` for an
    operator outside all layers.
    """
    file = TfliteFile(content)
    owners: dict[int, str] = {}  # subgraph -> the layer that calls it
    found: dict[tuple[str, str], None] = {}
    for number, graph in enumerate(file.graphs):
        named = _output_names(file, number)
        for operator in graph.operators or []:
            layer = owners.get(number) or _layer(graph, operator, named, places)
            code = file.code(operator)
            if code in _CONTROL_FLOW:
                owners.update(dict.fromkeys(_called(operator), layer))
            if code in _NO_COMPUTATION:
                continue
            held = [int(i) for i in (*operator.inputs, *operator.outputs) if i >= 0]
            if any(graph.tensors[i].type == Type.FLOAT32 for i in held):
                found[file.operator_name(operator), layer] = None
    return list(found)


def _output_names(file: TfliteFile, number: int) -> dict[int, str]:
    """Return the names of a graph's outputs, whose tensors the converter renames; Keras names them after layers."""
    signatures = [item for item in file.model.signatureDefs or [] if item.subgraphIndex == number]
    return {entry.tensorIndex: entry.name.decode() for item in signatures for entry in item.outputs}


def _layer(graph: schema.SubGraphT, operator: schema.OperatorT, named: dict[int, str], places: Places) -> str:
    for output in map(int, operator.outputs):
        for name in (*graph.tensors[output].name.decode().split(";"), named.get(output, "")):
            if path := places.layer_path(name):
                return path
    return ""


def _called(operator: schema.OperatorT) -> list[int]:
    """Return the subgraphs that an operator runs."""
    options = operator.builtinOptions
    names = ("condSubgraphIndex", "bodySubgraphIndex", "thenSubgraphIndex", "elseSubgraphIndex", "subgraph")
    return [getattr(options, name) for name in names if hasattr(options, name)]


def _notes(found: dict[tuple[int, int], FileWeight], tensors: WeightTensors) -> list[str]:
    """Return a sentence for each layer whose weights take more bits than they have, and for slow types."""
    notes = {}
    for weight in found.values():
        source = weight.source
        if source.dtype == "int" and source.bits < 8 and Type.INT8 in tensors.kinds.get(source.path, ()):
            notes[source.path] = f"Layer {source.layer!r}: TFLite stores its {source.bits}-bit weights in 8 bits each."
    sentences = list(dict.fromkeys(notes[path] for path in sorted(notes)))
    if any(Type.BFLOAT16 in kinds for kinds in tensors.kinds.values()):
        sentences.append("LiteRT widens bfloat16 weights to float32 at each inference; float16 is widened once.")
    return sentences
