"""Shapes of the tensors of an ONNX graph, with open sizes told apart from fixed ones."""

from __future__ import annotations

import contextlib

import onnx

_FIRST, _SECOND = (5, 7, 11, 13, 17, 19), (23, 29, 31, 37, 41, 43)
_LARGE = 64

Shapes = dict[str, tuple[int | None, ...]]


def read_shapes(model: onnx.ModelProto) -> Shapes:
    """Return the shape of each tensor of the main graph that can be known; open sizes are `None`.

    tf2onnx computes shapes inside the graph, so symbols do not reach far. Here the open sizes of the inputs are set to
    numbers, twice: what differs depends on them.
    """
    small = _without_large_constants(model)
    first, second = (_infer(small, numbers) for numbers in (_FIRST, _SECOND))
    shapes: Shapes = {}
    for name, sizes in first.items():
        others = second.get(name)
        if others is not None and len(others) == len(sizes):
            shapes[name] = tuple(one if one == two else None for one, two in zip(sizes, others, strict=True))
    return shapes


def read_sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the main graph that can be known, where every open size is 1."""
    return _infer(_without_large_constants(model), (1,))


def _without_large_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which large floating-point constants are inputs, since only their shapes matter."""
    small = onnx.ModelProto()
    small.opset_import.extend(model.opset_import)
    small.ir_version = model.ir_version
    graph = model.graph
    small.graph.name = "shapes"
    small.graph.node.extend(graph.node)
    small.graph.input.extend(graph.input)
    small.graph.output.extend(graph.output)
    for value in small.graph.output:
        value.type.tensor_type.ClearField("shape")
    for tensor in graph.initializer:
        size = 1
        for dimension in tensor.dims:
            size *= dimension
        if size > _LARGE and tensor.data_type == onnx.TensorProto.FLOAT:
            small.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            small.graph.initializer.append(tensor)
    return small


def _infer(model: onnx.ModelProto, numbers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    filled = onnx.ModelProto()
    filled.CopyFrom(model)
    known: dict[str, int] = {}
    for value in filled.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if not size.HasField("dim_value"):
                key = size.dim_param or f"open {len(known)}"
                size.dim_value = known.setdefault(key, numbers[len(known) % len(numbers)])
    with contextlib.suppress(onnx.shape_inference.InferenceError):  # then fewer shapes are known
        filled = onnx.shape_inference.infer_shapes(filled, data_prop=True)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in filled.graph.initializer}
    for value in (*filled.graph.input, *filled.graph.value_info, *filled.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(size.HasField("dim_value") for size in dims):
            shapes[value.name] = tuple(size.dim_value for size in dims)
    return shapes
