"""Multiply-accumulate operations of the calls in a traced graph, with the formulas of `compress.models.macs`."""

from __future__ import annotations

import keras

from compress.models.graph import Node, is_of_keras
from compress.models.layer_table import KERNEL_NAMES
from compress.models.macs import LayerCall, count_macs


def count_call_macs(node: Node, operation: keras.Operation | None = None) -> int | None:
    """Return the multiply-accumulates of one call for one sample, or `None` if unknown.

    Args:
        node: the call.
        operation: what computes, where `node` only wraps it.
    """
    operation = operation or node.operation
    variables = operation.weights if isinstance(operation, keras.Layer) else []
    kernels = tuple(
        (variable.path.partition(f"{operation.name}/")[2] or variable.name, tuple(variable.shape))
        for variable in variables
        if variable.name in KERNEL_NAMES
    )
    try:
        options = operation.get_config()
    except Exception:  # user code runs here: the get_config of a custom layer
        return None
    shapes = [tuple(tensor.shape) for tensor in node.inputs]
    kind = type(operation).__name__
    return count_macs(LayerCall(kind, options, shapes, kernels, bool(variables), is_of_keras(type(operation))))
