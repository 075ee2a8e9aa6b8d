"""Large weights beside an ONNX graph: tf2onnx converts the model without them, and they join the file at its end.

tf2onnx copies every constant dozens of times. The graph that it gets therefore takes large weights as inputs; what it
does to them (transposes, reshapes) is computed here once, and a float file is written weight by weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_DIGEST = "location"
"""The key of a stand-in's only entry of external data, whose value is the digest of the weight."""


def fold_weights(graph: onnx.GraphProto, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what nodes do to weights alone, take these nodes and the inputs for the weights out of the graph, and
    return name -> values of all that the rest of the graph may read instead.

    Args:
        graph: reads `weights` as inputs; changed in place.
        weights: input -> values.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    found = dict(weights)
    kept = []
    for node in graph.node:  # which stand after their inputs
        values = _fold(node, found, constants) if node.input and node.input[0] in found else None
        if values is None or node.output[0] in outputs:
            kept.append(node)
        else:
            found[node.output[0]] = values
    inputs = [value for value in graph.input if value.name not in weights]
    _replace(graph.node, kept)
    _replace(graph.input, inputs)
    return found


def _fold(node: onnx.NodeProto, weights: dict[str, np.ndarray], constants: dict[str, TensorProto]) -> np.ndarray | None:
    """Return a view of the weight as a node makes it, or `None` where the node does more than move values."""
    values = weights[node.input[0]]
    options = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if any(name not in constants for name in node.input[1:] if name):
        return None
    arguments = [numpy_helper.to_array(constants[name]).tolist() for name in node.input[1:] if name]
    if node.op_type == "Identity":
        return values
    if node.op_type == "Transpose":
        return values.transpose(options.get("perm"))
    if node.op_type == "Reshape":
        sizes = arguments[0]
        if not options.get("allowzero"):
            sizes = [size or values.shape[axis] for axis, size in enumerate(sizes)]
        return values.reshape(sizes)
    if node.op_type == "Unsqueeze":
        return np.expand_dims(values, tuple(arguments[0]))
    if node.op_type == "Squeeze":
        return values.squeeze(tuple(arguments[0]) if arguments else None)
    return None


def fuse_scales(graph: onnx.GraphProto, weights: dict[str, np.ndarray]) -> None:
    """Let convolutions with these weights do the products and sums per channel that follow them, in place.

    TensorFlow does this to constants, such as those of batch normalization, before tf2onnx sees them.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    read = list(_inputs(graph)) + [value.name for value in graph.output]
    readers = {name: node for node in graph.node for name in node.input}
    fused: set[str] = set()
    for conv in graph.node:
        if conv.op_type != "Conv" or conv.input[1] not in weights or read.count(conv.input[1]) > 1:
            continue
        values = weights[conv.input[1]]
        bias = np.zeros(len(values), "float32")
        if len(conv.input) > 2:
            if conv.input[2] not in constants:
                continue
            bias = numpy_helper.to_array(constants[conv.input[2]])
        before = len(fused)
        while read.count(conv.output[0]) == 1 and (node := readers.get(conv.output[0])) is not None:
            other = next((name for name in node.input if name != conv.output[0]), "")
            vector = _per_channel(constants.get(other), values) if node.op_type in ("Add", "Mul") else None
            if vector is None:
                break
            if node.op_type == "Mul":
                values, bias = values * vector.reshape(-1, *[1] * (values.ndim - 1)), bias * vector
            else:
                bias = bias + vector
            fused.add(node.output[0])
            conv.output[0] = node.output[0]
        if len(fused) > before:
            weights[conv.input[1]] = values
            name = f"{conv.output[0]}/bias"
            graph.initializer.append(numpy_helper.from_array(np.broadcast_to(bias, len(values)).copy(), name))
            conv.input[:] = [*conv.input[:2], name]
    _replace(graph.node, [n for n in graph.node if n.op_type == "Conv" or n.output[0] not in fused])


def _per_channel(tensor: TensorProto | None, kernel: np.ndarray) -> np.ndarray | None:
    """Return a constant that has one value, or one for each channel that a convolution makes, as a vector."""
    if tensor is None:
        return None
    place = len(tensor.dims) - (kernel.ndim - 1)  # of the channels, which sizes in space follow
    sizes = [size for axis, size in enumerate(tensor.dims) if axis != place]
    if any(size != 1 for size in sizes) or (place >= 0 and tensor.dims[place] not in (1, len(kernel))):
        return None
    return numpy_helper.to_array(tensor).reshape(-1)


def embed_weights(graph: onnx.GraphProto, weights: dict[str, np.ndarray]) -> None:
    """Add the weights that the graph reads as constants, and take all out of `weights`, which frees their memory."""
    wanted = set(_read(graph, weights))
    for name in list(weights):
        values = weights.pop(name)
        if name in wanted:
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            graph.initializer.add(name=name, dims=values.shape, data_type=kind, raw_data=values.tobytes())


def add_stand_ins(graph: onnx.GraphProto, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add a constant without values for each weight that the graph reads, and return digest -> values.

    A stand-in holds the digest of its weight, so equal weights still count as equal.
    """
    by_digest = {}
    for name in _read(graph, weights):
        values = weights[name]
        digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        stand_in = graph.initializer.add(
            name=name, dims=values.shape, data_type=kind, data_location=TensorProto.EXTERNAL
        )
        stand_in.external_data.add(key=_DIGEST, value=digest)
        by_digest[digest] = values
    return by_digest


def without_stand_ins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with an input for each stand-in, which the checker of ONNX accepts."""
    if not any(map(_is_stand_in, model.graph.initializer)):
        return model
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for tensor in model.graph.initializer:
        if _is_stand_in(tensor):
            plain.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    _replace(plain.graph.initializer, [tensor for tensor in model.graph.initializer if not _is_stand_in(tensor)])
    return plain


def write_model(model: onnx.ModelProto, weights: dict[str, np.ndarray], path: str | Path) -> None:
    """Write the model with the weights in place of their stand-ins, byte for byte as protobuf would.

    Args:
        model: with stand-ins.
        weights: digest -> values.
        path: the file.
    """
    before, after = _split(model, onnx.ModelProto.GRAPH_FIELD_NUMBER)
    graph_before, graph_after = _split(model.graph, onnx.GraphProto.INITIALIZER_FIELD_NUMBER)
    parts = []
    for tensor in model.graph.initializer:
        head, tail = _split(tensor, TensorProto.RAW_DATA_FIELD_NUMBER)
        size = 0
        if _is_stand_in(tensor):
            size = weights[_digest_of(tensor)].nbytes
            head += _tag(TensorProto.RAW_DATA_FIELD_NUMBER) + _varint(size)
        else:
            head, tail = tensor.SerializeToString(deterministic=True), b""
        content = len(head) + size + len(tail)
        parts.append((_tag(onnx.GraphProto.INITIALIZER_FIELD_NUMBER) + _varint(content) + head, size, tail))
    length = len(graph_before) + sum(len(head) + size + len(tail) for head, size, tail in parts) + len(graph_after)
    with open(path, "wb") as file:
        file.write(before + _tag(onnx.ModelProto.GRAPH_FIELD_NUMBER) + _varint(length) + graph_before)
        for tensor, (head, _, tail) in zip(model.graph.initializer, parts, strict=True):
            file.write(head)
            if _is_stand_in(tensor):
                file.write(np.ascontiguousarray(weights[_digest_of(tensor)]).data)
            file.write(tail)
        file.write(graph_after + after)


def _read(graph: onnx.GraphProto, weights: dict[str, np.ndarray]) -> list[str]:
    """Return the weights that the graph reads, also in bodies and as outputs, in their order."""
    names = {value.name for value in graph.output}
    names.update(_inputs(graph))
    return [name for name in weights if name in names]


def _inputs(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _inputs(body)
                yield from (value.name for value in body.output)


def _is_stand_in(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _digest_of(tensor: TensorProto) -> str:
    return tensor.external_data[0].value


def _split(message: onnx.ModelProto | onnx.GraphProto | TensorProto, number: int) -> tuple[bytes, bytes]:
    """Return the bytes of the fields before and after a field, which protobuf writes in the order of their numbers.

    What makes a tensor a stand-in is left out.
    """
    parts = []
    for keep in (lambda other: other < number, lambda other: other > number):
        part = type(message)()
        for field, value in message.ListFields():
            if not keep(field.number) or field.name in ("data_location", "external_data"):
                continue
            if isinstance(value, (str, bytes, int)):
                setattr(part, field.name, value)
            else:
                getattr(part, field.name).MergeFrom(value)
        parts.append(part.SerializeToString(deterministic=True))
    return parts[0], parts[1]


def _tag(number: int) -> bytes:
    return _varint(number << 3 | 2)  # 2: a length and then the content


def _varint(value: int) -> bytes:
    """Return a number as protobuf writes it, seven bits a byte."""
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*content, value])


def _replace(target, items: list) -> None:
    copies = []
    for item in items:
        copy = type(item)()
        copy.CopyFrom(item)
        copies.append(copy)
    del target[:]
    target.extend(copies)
