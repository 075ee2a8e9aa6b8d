"""A SavedModel becomes an ONNX file: frozen, converted by tf2onnx, then named, checked and stamped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
from tf2onnx import tf_loader

import compress
from compress.deploy.conversion import DETACHED, WEIGHT, Places
from compress.deploy.onnx_canonical import canonicalize
from compress.deploy.onnx_weights import add_stand_ins, fold_weights, fuse_scales, without_stand_ins, write_model
from compress.errors import ExportError

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


def to_onnx(
    folder: str,
    endpoint: tuple[str, int | None],
    inputs: list[str],
    outputs: list[str],
    places: Places,
    path: str | Path,
    *,
    opset: int,
) -> int | None:
    """Write the file to `path` and return the batch size that it takes (`None`: any).

    Raises:
        ExportError: an operator has no equivalent in ONNX.
    """
    model, weights = convert_saved_model(folder, endpoint, inputs, outputs, places, opset=opset)
    weights = fold_weights(model.graph, weights)
    fuse_scales(model.graph, weights)
    weights = add_stand_ins(model.graph, weights)
    finish_model(model, places, opset)
    write_model(model, weights, path)
    return endpoint[1]


def convert_saved_model(
    folder: str,
    endpoint: tuple[str, int | None],
    inputs: list[str],
    outputs: list[str],
    places: Places,
    *,
    opset: int,
    handlers: dict[str, Any] | None = None,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return the graph as tf2onnx makes it, with inputs and outputs named and in the model's order, and the weights
    that it takes as further inputs: input -> values.

    Args:
        handlers: TensorFlow operator -> `handler(context, node, name, arguments)` that converts it.

    Raises:
        ExportError: tf2onnx cannot convert the graph.
    """
    name, batch = endpoint
    apart = Path(folder) / DETACHED
    detached = {path.stem: np.load(path, mmap_mode="r") for path in sorted(apart.glob(f"{WEIGHT}*.npy"))}
    loaded = tf.saved_model.load(str(apart) if detached else folder)
    function = loaded.signatures[name]
    given = sorted(function.structured_input_signature[1])  # signatures sort names
    tensors = dict(zip(given, function.inputs, strict=False))  # what was captured comes after them
    plain = [tensor for name, tensor in tensors.items() if name not in detached]
    sources = dict(zip(sorted(inputs), plain, strict=True)) | {name: tensors[name] for name in detached}
    results = dict(zip(sorted(outputs), function.outputs, strict=True))
    new_names = {tensor.name: name for name, tensor in (*sources.items(), *results.items())}
    ordered = [*inputs, *detached]
    try:
        graph = tf_loader.from_function(
            function, [sources[n].name for n in ordered], [results[n].name for n in outputs]
        )
        _fill_captured(graph, function, len(given))
        model, _ = tf2onnx.convert.from_graph_def(
            graph,
            name="model",
            input_names=[sources[n].name for n in ordered],
            output_names=[results[n].name for n in outputs],
            opset=opset,
            tensors_to_rename=new_names,
            custom_op_handlers={kind: (handler, []) for kind, handler in {"Erfc": _erfc, **(handlers or {})}.items()},
        )
    except ExportError:
        raise
    except Exception as error:  # tf2onnx raises many types; each means that it cannot convert this
        raise places.failure("ONNX", error) from error
    values = [_value(model.graph.input, n, sources[n], batch if n in inputs else 0) for n in ordered]
    _set_values(model.graph.input, values)
    _set_values(model.graph.output, [_value(model.graph.output, n, results[n], batch) for n in outputs])
    return model, detached


def finish_model(model: onnx.ModelProto, places: Places, opset: int) -> None:
    """Check the model, bring it into its canonical form and stamp it, in place.

    Raises:
        ExportError: an operator is not one of ONNX, or the model is not valid.
    """
    if found := [(node.op_type, node.name) for node in _nodes(model.graph) if not _is_known(node, opset)]:
        raise places.error("ONNX", found)
    canonicalize(model, places.layer_path)
    _stamp(model, opset)
    try:
        onnx.checker.check_model(without_stand_ins(model))
    except onnx.checker.ValidationError as error:
        raise places.failure("ONNX", error) from error


def _erfc(context: Any, node: Any, _name: str, _arguments: Any) -> None:
    """Convert `Erfc`, which exact GELU uses and tf2onnx does not know, to `1 - Erf`."""
    inner = context.make_node("Erf", [node.input[0]], op_name_scope=node.name)
    one = context.make_const(tf2onnx.utils.make_name(node.name), np.array(1, "float32"))
    node.type = "Sub"
    context.replace_inputs(node, [one.output[0], inner.output[0]])


def _fill_captured(graph: Any, function: Any, count: int) -> None:
    """Turn tensors that the function captured, which freezing leaves open as inputs, into constants."""
    opened = zip(function.inputs[count:], function.captured_inputs, strict=True)
    captured = {tensor.op.name: value for tensor, value in opened if value.dtype != tf.resource}
    for node in graph.node:
        if node.op == "Placeholder" and node.name in captured:
            name, value = node.name, captured[node.name]
            node.Clear()
            node.name, node.op = name, "Const"
            node.attr["dtype"].type = value.dtype.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value.numpy()))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _is_known(node: onnx.NodeProto, opset: int) -> bool:
    if node.domain not in _DOMAINS:
        return False
    return node.domain == "ai.onnx.ml" or onnx.defs.has(node.op_type, opset, "")


def _value(found: Any, name: str, tensor: Any, batch: int | None) -> onnx.ValueInfoProto:
    """Return the description of an input or output: its open first dimension is called `batch`."""
    type_of = next((value.type.tensor_type.elem_type for value in found if value.name == name), None)
    element = type_of or onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype.as_numpy_dtype))
    if tensor.shape.rank is None:
        return onnx.helper.make_tensor_value_info(name, element, None)
    sizes: list[int | str] = []
    for axis, size in enumerate(tensor.shape):
        sizes.append(size if size is not None else "batch" if axis == 0 and batch is None else f"{name}_{axis}")
    return onnx.helper.make_tensor_value_info(name, element, sizes)


def _set_values(target: Any, values: list[onnx.ValueInfoProto]) -> None:
    del target[:]
    target.extend(values)


def _stamp(model: onnx.ModelProto, opset: int) -> None:
    kept = [item for item in model.opset_import if item.domain in _DOMAINS]
    used = {node.domain for node in _nodes(model.graph)} | {""}
    del model.opset_import[:]
    model.opset_import.extend(item for item in kept if item.domain in used)
    versions = {item.domain: item.version for item in model.opset_import}
    if versions.get("") != opset:
        raise ExportError(f"expected a file of ONNX opset {opset}. Received: {versions}")
    model.producer_name, model.producer_version = "bmcompress", compress.__version__
    model.doc_string = f"tf2onnx {tf2onnx.__version__}, TensorFlow {tf.__version__}"
    model.graph.doc_string = ""
