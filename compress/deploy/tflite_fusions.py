"""Biases that the converter leaves beside their operator, put into it, where the integer kernels need them.

It does so for Dense layers on more than two axes whose batch size is open: a product, a RESHAPE and an ADD.
"""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.deploy.tflite_flatbuffer import Op, TfliteFile

_PLAIN = schema.ActivationFunctionType.NONE


def fuse_biases(file: TfliteFile) -> None:
    """Turn FULLY_CONNECTED, RESHAPE and ADD of a constant into FULLY_CONNECTED with a bias and RESHAPE."""
    for graph in file.graphs:
        makers = {int(output): operator for operator in graph.operators or [] for output in operator.outputs}
        readers: dict[int, int] = {}
        for index in [*(i for operator in graph.operators or [] for i in operator.inputs), *graph.outputs]:
            readers[int(index)] = readers.get(int(index), 0) + 1
        kept = []
        for operator in graph.operators or []:
            if not _fuse(file, graph, operator, makers, readers):
                kept.append(operator)
        graph.operators = kept


def _fuse(
    file: TfliteFile,
    graph: schema.SubGraphT,
    add: schema.OperatorT,
    makers: dict[int, schema.OperatorT],
    readers: dict[int, int],
) -> bool:
    """Fuse one ADD with what it reads, or return False."""
    if file.code(add) != Op.ADD:
        return False
    sources = [int(i) for i in add.inputs]
    for data, other in (sources, sources[::-1]):
        bias, reshape = file.constant(graph, other), makers.get(data)
        if bias is None or bias.dtype != "float32" or reshape is None or file.code(reshape) != Op.RESHAPE:
            continue
        product = makers.get(int(reshape.inputs[0]))
        if product is None or file.code(product) != Op.FULLY_CONNECTED or not _is_free(product):
            continue
        if readers[data] > 1 or readers[int(reshape.inputs[0])] > 1:
            continue
        channels = int(graph.tensors[product.inputs[1]].shape[0])
        if bias.size != channels or not _ends_with(graph.tensors[data], bias, channels):
            continue
        tensor = graph.tensors[other]
        index = file.add_tensor(graph, tensor.name, tensor.type, values=bias.reshape(channels))
        product.inputs = [int(product.inputs[0]), int(product.inputs[1]), index]
        product.builtinOptions.fusedActivationFunction = add.builtinOptions.fusedActivationFunction
        reshape.outputs = [int(add.outputs[0])]
        makers[int(add.outputs[0])] = reshape
        return True
    return False


def _is_free(product: schema.OperatorT) -> bool:
    """Return whether an operator has room for a bias."""
    bias = int(product.inputs[2]) if len(product.inputs) > 2 else -1
    return bias < 0 and product.builtinOptions.fusedActivationFunction == _PLAIN


def _ends_with(tensor: schema.TensorT, bias: np.ndarray, channels: int) -> bool:
    """Return whether the last axes of a tensor are the channels, one by one as in the bias."""
    axes = list(bias.shape)
    while axes and axes[0] == 1:
        axes.pop(0)
    sizes = [] if tensor.shape is None else [int(size) for size in tensor.shape]
    return bool(axes) and sizes[len(sizes) - len(axes) :] == axes and int(np.prod(axes)) == channels
