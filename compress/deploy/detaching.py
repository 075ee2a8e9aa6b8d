"""A model's graph with its large weights as inputs, so that tf2onnx, which copies constants many times, has none.

Only weights that matrix products, convolutions and look-ups take whole are detached: converters look at the values of
all others, such as those of recurrent layers and of normalization.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras

from compress.deploy.conversion import WEIGHT

_LARGE_BYTES = 2**18
_MOVES = ("ExpandDims", "Identity", "Reshape", "Squeeze", "Transpose")
_TAKES = (
    "BatchMatMulV2",
    "Conv2D",
    "Conv2DBackpropInput",
    "Conv3D",
    "Conv3DBackpropInputV2",
    "DepthwiseConv2dNative",
    "Einsum",
    "GatherV2",
    "MatMul",
)


def detach_weights(
    model: keras.Model, serve: Callable[..., Any], specs: list[Any]
) -> tuple[Any, list[keras.Variable]] | None:
    """Return a traced `tf.function` that takes weights after the inputs of `serve`, and these weights in order; or
    `None` where the model has no large ones.

    Args:
        model: whose float32 weights of 256 KiB and more are detached.
        serve: computes the outputs from inputs, reading the model's variables.
        specs: a `tf.TensorSpec` for each of its inputs.
    """
    weights = [v for v in model.variables if v.dtype == "float32" and 4 * math.prod(v.shape) >= _LARGE_BYTES]
    while weights:
        function = _trace(serve, specs, weights)
        tensors = function.get_concrete_function().inputs[len(specs) :]
        fitting = [weight for weight, tensor in zip(weights, tensors, strict=False) if _is_taken_whole(tensor)]
        if len(fitting) == len(weights):
            return function, weights
        weights = fitting
    return None


def _trace(serve: Callable[..., Any], specs: list[Any], weights: list[keras.Variable]) -> Any:
    import tensorflow as tf

    def serve_detached(*flat: Any) -> dict[str, Any]:
        with keras.StatelessScope(state_mapping=list(zip(weights, flat[len(specs) :], strict=True))):
            return serve(*flat[: len(specs)])

    wanted = [tf.TensorSpec(weight.shape, weight.dtype, name=f"{WEIGHT}{i}") for i, weight in enumerate(weights)]
    return tf.function(serve_detached, input_signature=[*specs, *wanted], autograph=False)


def _is_taken_whole(tensor: Any) -> bool:
    """Return whether only operators that take a weight read the tensor, after perhaps moving its values."""
    readers = tensor.consumers()
    return bool(readers) and all(
        reader.type in _TAKES or (reader.type in _MOVES and _is_taken_whole(reader.outputs[0])) for reader in readers
    )
