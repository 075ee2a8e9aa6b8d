"""A SavedModel becomes an ONNX file: frozen, converted by tf2onnx, then named, checked and stamped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
from tf2onnx import tf_loader

import compress
from compress.deploy.conversion import Places
from compress.deploy.onnx_canonical import canonicalize
from compress.errors import ExportError

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


def to_onnx(
    folder: str,
    endpoint: tuple[str, int | None],
    inputs: list[str],
    outputs: list[str],
    places: Places,
    *,
    opset: int,
) -> tuple[bytes, int | None]:
    """Return the file and the batch size that it takes (`None`: any).

    Raises:
        ExportError: an operator has no equivalent in ONNX.
    """
    model = convert_saved_model(folder, endpoint, inputs, outputs, places, opset=opset)
    return finish_model(model, places, opset), endpoint[1]


def convert_saved_model(
    folder: str,
    endpoint: tuple[str, int | None],
    inputs: list[str],
    outputs: list[str],
    places: Places,
    *,
    opset: int,
    handlers: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    """Return the graph as tf2onnx makes it, with inputs and outputs named and in the model's order.

    Args:
        handlers: TensorFlow operator -> `handler(context, node, name, arguments)` that converts it.

    Raises:
        ExportError: tf2onnx cannot convert the graph.
    """
    name, batch = endpoint
    loaded = tf.saved_model.load(folder)
    function = loaded.signatures[name]
    count = len(function.inputs) - len(function.captured_inputs)
    sources = dict(zip(sorted(inputs), function.inputs[:count], strict=True))  # signatures sort names
    results = dict(zip(sorted(outputs), function.outputs, strict=True))
    new_names = {sources[name].name: name for name in inputs} | {results[name].name: name for name in outputs}
    try:
        graph = tf_loader.from_function(function, [sources[n].name for n in inputs], [results[n].name for n in outputs])
        _fill_captured(graph, function, count)
        model, _ = tf2onnx.convert.from_graph_def(
            graph,
            name="model",
            input_names=[sources[n].name for n in inputs],
            output_names=[results[n].name for n in outputs],
            opset=opset,
            tensors_to_rename=new_names,
            custom_op_handlers={kind: (handler, []) for kind, handler in {"Erfc": _erfc, **(handlers or {})}.items()},
        )
    except ExportError:
        raise
    except Exception as error:  # tf2onnx raises many types; each means that it cannot convert this
        raise places.failure("ONNX", error) from error
    _set_values(model.graph.input, [_value(model.graph.input, n, sources[n], batch) for n in inputs])
    _set_values(model.graph.output, [_value(model.graph.output, n, results[n], batch) for n in outputs])
    return model


def finish_model(model: onnx.ModelProto, places: Places, opset: int) -> bytes:
    """Return the bytes of the file: checked, in canonical form and stamped.

    Raises:
        ExportError: an operator is not one of ONNX, or the model is not valid.
    """
    if found := [(node.op_type, node.name) for node in _nodes(model.graph) if not _is_known(node, opset)]:
        raise places.error("ONNX", found)
    canonicalize(model, places.layer_path)
    _stamp(model, opset)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise places.failure("ONNX", error) from error
    return model.SerializeToString(deterministic=True)


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
