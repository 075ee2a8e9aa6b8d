"""A SavedModel of a deployed quantized model becomes an ONNX file that holds integers and computes with them.

The file is standard ONNX: QuantizeLinear and DequantizeLinear around float operators, which runtimes fuse into
integer kernels. Weights are unsigned by default, because signed ones saturate on x86 processors without VNNI.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import onnx
from onnx import version_converter

from compress.deploy.conversion import Places
from compress.deploy.onnx_activations import (
    place_activations,
    quantize_biases,
    quantize_interface,
    shield_bodies,
    shield_floats,
)
from compress.deploy.onnx_conversion import convert_saved_model, finish_model
from compress.deploy.onnx_dynamic import quantize_at_run_time
from compress.deploy.onnx_graph import OnnxGraph
from compress.deploy.onnx_runtime import GRIDS_KEY
from compress.deploy.onnx_shapes import read_shapes
from compress.deploy.onnx_share import float_operators
from compress.deploy.onnx_steps import Step, convert_fake_quantization, forget_axes, read_step, step_of
from compress.deploy.onnx_stored import needs_new_opset, place_tables, store_weights
from compress.deploy.onnx_structure import simplify_structure
from compress.deploy.onnx_weights import embed_weights, fold_weights
from compress.deploy.records import Io, WeightType
from compress.deploy.runtimes import one_line
from compress.errors import ExportError
from compress.quantization.stored import Compute, StoredWeight

__all__ = ["float_operators", "quantize_model", "to_quantized_onnx"]

_OLD_OPSETS = range(13, 19)
_NEW_OPSET = 21

# Readers whose weights keep a DequantizeLinear, per kind of computing. ONNX Runtime 1.32 repeats one for every sample
# where no kernel takes the integers, and fuses some into MatMulNBits, which rounds activations to 8 bits.
_DEQUANTIZED: dict[Compute, tuple[str, ...]] = {
    "integer": ("Add", "Conv", "ConvTranspose", "Gather", "Gemm", "MatMul", "Mul"),
    "dynamic": ("Conv", "Gather", "MatMul"),
    "weights": ("Gather",),
}


def to_quantized_onnx(
    folder: str,
    endpoint: tuple[str, int | None],
    inputs: list[str],
    outputs: list[str],
    places: Places,
    stored: Sequence[StoredWeight],
    *,
    compute: Compute,
    io: Io = "float32",
    weights: WeightType = "uint8",
    opset: int = 17,
) -> tuple[bytes, int | None, list[str]]:
    """Return the ONNX file of a deploy model, the batch size that it takes (`None`: any) and notes for the user.

    Args:
        folder: SavedModel of the deployed model: floats on their grid and one fake-quantization op per activation.
        endpoint: name of the entry point and the batch size that it takes (`None`: any).
        inputs: names of the inputs in the model's order.
        outputs: names of the outputs in the model's order.
        places: names of the layers, for messages.
        stored: the weights that the file is to hold.
        compute: whether the file computes in integers, in integers with grids made at run time, or in float.
        io: type of inputs and outputs that are quantized.
        weights: type of 8-bit weights.
        opset: ONNX operator set, 13 to 18 or 21; weights of 4 bits and activations of 16 take 21.

    Raises:
        ExportError: a weight is not found in the graph, or an operator has no equivalent in ONNX.
    """
    if opset not in (*_OLD_OPSETS, _NEW_OPSET):
        raise ExportError(f"quantized ONNX files have an opset of 13 to 18, or 21. Received: opset={opset}")
    errors: list[ExportError] = []

    def convert_marker(*arguments: Any) -> None:
        try:
            convert_fake_quantization(*arguments)
        except ExportError as error:  # which tf2onnx would only log
            errors.append(error)
            raise

    handlers = {"FakeQuantWithMinMaxVars": convert_marker}
    start = opset if opset in _OLD_OPSETS else 17
    model, floats = convert_saved_model(folder, endpoint, inputs, outputs, places, opset=start, handlers=handlers)
    if errors:
        raise errors[0]
    wide = any(tensor.data_type == onnx.TensorProto.INT16 for tensor in model.graph.initializer)
    upgraded = opset != _NEW_OPSET and (wide or needs_new_opset(stored, compute))
    if upgraded or opset == _NEW_OPSET:
        model, opset = _upgrade(model, places), _NEW_OPSET
    floats = fold_weights(model.graph, floats)
    embed_weights(model.graph, floats)
    notes = quantize_model(model, stored, compute=compute, io=io, weights=weights)
    if upgraded:
        notes.append(
            f"The file has ONNX opset {_NEW_OPSET}, which is the first with {'16' if wide else '4'}-bit tensors."
        )
    finish_model(model, places, opset)
    return model.SerializeToString(deterministic=True), endpoint[1], notes


def _upgrade(model: onnx.ModelProto, places: Places) -> onnx.ModelProto:
    try:
        return version_converter.convert_version(model, _NEW_OPSET)
    except Exception as error:  # the converter raises RuntimeError and others for operators that it cannot adapt
        raise places.failure(f"ONNX opset {_NEW_OPSET}", Exception(one_line(error))) from error


def quantize_model(
    model: onnx.ModelProto, stored: Sequence[StoredWeight], *, compute: Compute, io: Io, weights: WeightType
) -> list[str]:
    """Rewrite a converted float model in place so that it stores and computes with integers; return notes."""
    shapes = read_shapes(model)
    graph = OnnxGraph(model)
    forget_axes(graph)
    simplify_structure(graph, shapes, products=compute == "integer")
    place_activations(graph)
    wide = any(read_step(graph, node) and read_step(graph, node).dtype == "int16" for node in graph.nodes)
    keeps = ("Gather",) if wide else _DEQUANTIZED[compute]
    placed = store_weights(
        graph,
        stored,
        unsigned=weights == "uint8",
        packed=compute == "weights",
        is_folded=lambda operator: operator not in keeps,
    )
    notes = _notes_on_bits(stored, compute)
    if compute == "dynamic":
        left = quantize_at_run_time(graph, placed)
        if left:
            notes.append(f"ONNX has no such integer operators, so these layers compute in float: {_list(left)}.")
    if compute == "weights":
        notes.append(
            "ONNX Runtime turns the weights into floats when it opens the file: it is smaller, but not faster."
        )
    place_tables(graph, placed)
    quantize_biases(graph, placed)
    shield_floats(graph, placed)
    shield_bodies(graph)
    grids = _read_grids(graph)
    if io != "float32":
        left = quantize_interface(graph, io)
        if left:
            notes.append(f"These inputs and outputs stay float32, since nothing quantizes them: {_list(left)}.")
    if wide:
        notes.append("ONNX Runtime computes 16-bit activations in float, so the file is not faster than a float one.")
    _write_grids(graph, grids)
    graph.write()
    return notes


def _notes_on_bits(weights: Sequence[StoredWeight], compute: Compute) -> list[str]:
    """Return a sentence for each number of bits that the file stores in more."""
    layers: dict[tuple[int, int], dict[str, None]] = {}
    for weight in weights:
        stored = 4 if compute == "weights" and weight.bits <= 4 else 8
        if weight.dtype == "int" and weight.bits != stored:
            layers.setdefault((weight.bits, stored), {})[weight.layer] = None
    return [
        f"ONNX stores the {bits}-bit weights of {_list(list(names))} in {stored} bits each."
        for (bits, stored), names in sorted(layers.items())
    ]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _read_grids(graph: OnnxGraph) -> dict[str, dict[str, Step]]:
    """Return the grids of float inputs and outputs by name."""
    inputs = {
        name: [read_step(graph, n) for n in graph.readers(name) if n.op_type == "QuantizeLinear"]
        for name in graph.inputs
    }
    return {
        "inputs": {name: steps[0] for name, steps in inputs.items() if steps and steps[0] is not None},
        "outputs": {name: step for name in graph.outputs if (step := step_of(graph, name)) is not None},
    }


def _write_grids(graph: OnnxGraph, grids: dict[str, dict[str, Step]]) -> None:
    """Note the grids in the file, so that callers can pass integers and count in steps."""
    signed = onnx.TensorProto.INT8
    values = {"inputs": graph.inputs, "outputs": graph.outputs}
    noted = {
        side: {
            name: vars(step.signed() if values[side][name].type.tensor_type.elem_type == signed else step)
            for name, step in steps.items()
        }
        for side, steps in grids.items()
    }
    if noted["inputs"] or noted["outputs"]:
        onnx.helper.set_model_props(graph.model, {GRIDS_KEY: json.dumps(noted, sort_keys=True)})
