"""Digests of what tensors of an ONNX graph compute, whatever their names, and an order of loop variables from
them.

Two tensors have one digest when the same operators compute them from the same inputs and constants.
"""

from __future__ import annotations

import hashlib
from typing import Any

import onnx

_LOOP_INPUTS, _BODY_INPUTS = 2, 2  # the trip count and the condition; the iteration and the condition


def bodies(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """Return the graphs in an attribute: the body of a loop or a branch."""
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def sort_loops(graph: onnx.GraphProto, known: dict[str, str]) -> dict[str, str]:
    """Sort, in place, the variables that each loop in `graph` carries; return name -> digest of each tensor.

    Args:
        graph: a graph whose nodes stand after their inputs.
        known: digests of the tensors that the graph is given.
    """
    digests = dict(known)
    for tensor in graph.initializer:
        digests[tensor.name] = _digest(tensor.data_type, *tensor.dims, _content(tensor))
    for node in graph.node:
        parts: list[Any] = [node.op_type]
        for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
            if attribute.HasField("t"):
                attribute.t.name = ""
            if found := bodies(attribute):
                sort = _sort_loop if node.op_type == "Loop" else _digest_body
                parts.extend(digest for body in found for digest in sort(node, body, digests))
            else:
                parts.append(attribute.SerializeToString(deterministic=True))
        parts.extend(digests.get(name, "") for name in node.input)
        for i, name in enumerate(node.output):
            digests[name] = digests[node.input[0]] if node.op_type == "Identity" else _digest(*parts, i)
    return digests


def _content(tensor: onnx.TensorProto) -> bytes:
    """Return a constant's values, or the digest of them that it holds in their place."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return tensor.external_data[0].value.encode()
    return onnx.numpy_helper.to_array(tensor).tobytes()


def _sort_loop(loop: onnx.NodeProto, body: onnx.GraphProto, digests: dict[str, str]) -> list[str]:
    """Sort a loop's variables and what it collects, in place; return the digests of its body's outputs."""
    carried = len(body.input) - _BODY_INPUTS
    starts = [digests.get(name, "") for name in loop.input[_LOOP_INPUTS:]]
    given = {value.name: _digest("body", i) for i, value in enumerate(body.input[:_BODY_INPUTS])}
    for value, start in zip(body.input[_BODY_INPUTS:], starts, strict=True):
        given[value.name] = _digest("carried", start, value.type.SerializeToString(deterministic=True))
    inner = sort_loops(body, digests | given)
    updates = [inner[value.name] for value in body.output[1:]]
    order = sorted(range(carried), key=lambda k: (starts[k], updates[k]))
    collected = sorted(range(carried, len(updates)), key=lambda k: updates[k])
    _permute(loop.input, order, _LOOP_INPUTS)
    _permute(body.input, order, _BODY_INPUTS)
    _permute(body.output, order + collected, 1)
    _permute(loop.output, order + collected, 0)
    _settle_copies(body)
    return [inner[value.name] for value in body.output]


def _settle_copies(body: onnx.GraphProto) -> None:
    """Of several outputs that are one tensor, let the first be it and the others its copies, in place."""
    sources = {node.output[0]: node.input[0] for node in body.node if node.op_type == "Identity"}
    groups: dict[str, list[onnx.ValueInfoProto]] = {}
    for value in body.output:
        root = value.name
        while root in sources:
            root = sources[root]
        groups.setdefault(root, []).append(value)
    for root, values in groups.items():
        names = sorted((value.name for value in values), key=lambda name: name != root)
        for value, name in zip(values, names, strict=True):
            value.name = name


def _digest_body(node: onnx.NodeProto, body: onnx.GraphProto, digests: dict[str, str]) -> list[str]:
    given = {value.name: _digest("body", i) for i, value in enumerate(body.input)}
    inner = sort_loops(body, digests | given)
    return [inner[value.name] for value in body.output]


def _permute(items: Any, order: list[int], offset: int) -> None:
    kept, moved = list(items[:offset]), list(items[offset:])
    del items[:]
    items.extend([*kept, *(moved[k] for k in order)])


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
