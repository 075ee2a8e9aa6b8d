"""How each operation treats quantized numbers, in one table: one more operation is one more row.

Names are those of classes, of layers and of the operations behind `keras.ops`. An operation that is not in
the table stays float between quantized ones, and is reported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import keras

from compress.models.graph import Node, is_of_keras
from compress.models.masks import SetMask
from compress.quantization.layers import FakeQuant, QuantizedLayer

Kind = Literal["kernel", "table", "value", "fixed", "relu", "same", "average", "join", "float"]
"""What an operation does with quantized numbers.

- `kernel`: computes with a kernel in integers; its output gets a scale of its own, after a ReLU that is fused into it.
- `table`: looks up rows of a weight; its output has the scale of that weight.
- `value`: computes new values in integers; its output gets a scale of its own.
- `fixed`: as `value`, with a range that is known beforehand.
- `relu`: fused into the operation before it where that is its only reader, else as `value`.
- `same`: moves numbers around; its output has the scale of its input and needs no rounding.
- `average`: its output has the scale of its input and is rounded anew.
- `join`: puts its inputs side by side; all of them and the output share one scale.
- `float`: not known, or without an integer kernel in the runtimes.
"""

_KERNEL = (
    "Dense", "EinsumDense", "Conv1D", "Conv2D", "Conv1DTranspose", "Conv2DTranspose", "DepthwiseConv1D",
    "DepthwiseConv2D",
)  # fmt: skip
_VALUE = (
    "Add", "Subtract", "Multiply", "Maximum", "Minimum", "Average", "Dot", "Matmul", "Einsum", "Mean", "Sum",
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D", "LeakyReLU", "LeakyRelu",
)  # fmt: skip
_SAME = (
    "MaxPooling1D", "MaxPooling2D", "MaxPool", "GlobalMaxPooling1D", "GlobalMaxPooling2D", "Max",
    "Flatten", "Reshape", "Permute", "Transpose", "Swapaxes", "Moveaxis", "Squeeze", "ExpandDims", "GetItem", "Split",
    "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D", "Cropping1D", "Cropping2D", "Cropping3D", "RepeatVector",
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout", "GaussianNoise",
    "AlphaDropout", "Identity", "ActivityRegularization", "UpSampling1D", "Repeat", "Tile", "BroadcastTo",
    "StopGradient",
)  # fmt: skip

_RULES: dict[str, Kind] = {
    **dict.fromkeys(_KERNEL, "kernel"),
    "Embedding": "table",
    **dict.fromkeys(_VALUE, "value"),
    **dict.fromkeys(("Softmax", "Sigmoid", "Tanh"), "fixed"),
    **dict.fromkeys(("Relu", "Relu6"), "relu"),
    **dict.fromkeys(_SAME, "same"),
    **dict.fromkeys(("AveragePooling1D", "AveragePooling2D", "AveragePool"), "average"),
    **dict.fromkeys(("Concatenate", "Stack"), "join"),
}

_ACTIVATIONS: dict[str, Kind] = {
    "linear": "same",
    "relu": "relu",
    "relu6": "relu",
    "leaky_relu": "value",
    "gelu": "value",
    "hard_silu": "value",
    "softmax": "fixed",
    "sigmoid": "fixed",
    "tanh": "fixed",
}

FIXED_RANGES: dict[str, tuple[float, float]] = {
    "softmax": (0.0, 255 / 256),
    "sigmoid": (0.0, 255 / 256),
    "tanh": (-1.0, 127 / 128),
}
"""Range of operations whose scale the runtimes prescribe: 1/256 and 1/128."""


def kind_of(node: Node) -> Kind:
    """Return what a call does with quantized numbers."""
    operation = node.operation
    if isinstance(operation, QuantizedLayer):
        return kind_of(replace(node, operation=operation.layer))
    if isinstance(operation, (FakeQuant, SetMask)):
        return "same"
    if isinstance(operation, keras.layers.Activation):
        return _ACTIVATIONS.get(_activation(operation), "float")
    if isinstance(operation, keras.layers.ReLU):
        plain = operation.max_value in (None, 6) and not operation.negative_slope and not operation.threshold
        return "relu" if plain else "value"
    if isinstance(operation, keras.layers.UpSampling2D):
        return "same" if operation.interpolation == "nearest" else "average"
    if not is_of_keras(type(operation)):
        return "float"  # somebody's class that happens to have the name of one of Keras
    return _RULES.get(node.kind, "float")


def fixed_range(node: Node) -> tuple[float, float] | None:
    """Return the range that the runtimes prescribe for the output of a call, or `None`."""
    if kind_of(node) != "fixed":
        return None
    is_activation = isinstance(node.operation, keras.layers.Activation)
    return FIXED_RANGES[_activation(node.operation) if is_activation else node.kind.lower()]


def why_float(operation: keras.Operation) -> str:
    """Return why `kind_of` a call of `operation` is float."""
    kind = type(operation).__name__
    if not is_of_keras(type(operation)):
        return f"{kind} is a class of its own, which is not known"
    if isinstance(operation, keras.layers.Activation):
        return f"the activation {_activation(operation) or '?'} has no integer kernel"
    return f"{kind} has no integer kernel"


def _activation(layer: keras.layers.Activation) -> str:
    return getattr(layer.activation, "__name__", "")


def channel_axes(layer: keras.Layer, name: str, rank: int) -> tuple[int, ...]:
    """Return the axes of a weight along which each entry has a scale of its own.

    Args:
        layer: the layer that owns the weight.
        name: name of the weight, such as `"kernel"`.
        rank: its number of axes.
    """
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, _ = _equation(layer.equation)
        return tuple(axis for axis, letter in enumerate(kernel) if letter not in inputs) or (rank - 1,)
    if isinstance(layer, (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)):
        return (rank - 2,)
    if isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)) or name == "depthwise_kernel":
        return (rank - 2, rank - 1)
    return (rank - 1,)


def input_axis(layer: keras.Layer, name: str, rank: int) -> int | None:
    """Return the axis of a weight over which products are summed, for groups; `None` where there are several."""
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, output = _equation(layer.equation)
        summed = [axis for axis, letter in enumerate(kernel) if letter in inputs and letter not in output]
        return summed[0] if len(summed) == 1 else None
    return 0 if isinstance(layer, keras.layers.Dense) or (rank == 2 and name == "kernel") else None


def _equation(equation: str) -> tuple[str, str, str]:
    inputs, _, rest = equation.replace(" ", "").partition(",")
    kernel, _, output = rest.partition("->")
    return inputs, kernel, output
