"""How single Keras layers are split into parts that compute the same: one row per layer type.

A rule takes what it needs to make calls, the layer's path, the layer and the arguments of one call, and returns
the outputs, or `None` where the layer stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np

from compress.models.graph import copy_operation

FUSED = ("linear", "relu", "relu6")
"""Activations that runtimes compute inside the layer before them."""

_FUSED_FUNCTIONS = [getattr(keras.activations, name) for name in FUSED] + [keras.ops.relu, keras.ops.relu6]
_SUMMED = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)


class Steps(Protocol):
    """What a rule makes its calls with."""

    def emit(self, path: str, operation: keras.Operation, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of a call."""

    def once(self, operation: keras.Operation, part: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, the same at every call of a shared operation."""

    def claim(self, path: str, part: str, operation: keras.Operation) -> tuple[str, keras.Operation]:
        """Call a new operation after the layer that it is part of, and return its path and itself."""

    def compute(self, path: str, function: Callable[..., Any], *tensors: keras.KerasTensor) -> Any:
        """Return what `function` makes of `tensors` with Keras operations, which are called after `path`."""


def _split_activation(steps: Steps, path: str, layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
    if layer.activation is None or layer.activation in _FUSED_FUNCTIONS:
        return None
    plain = steps.once(layer, "linear", lambda: _without_activation(layer))
    activation_path, activation = steps.once(layer, "activation", lambda: _activation_of(steps, path, layer))
    return steps.emit(activation_path, activation, steps.emit(path, plain, *args, **kwargs))


def _without_activation(layer: keras.Layer) -> keras.Layer:
    plain = copy_operation(layer, activation="linear")
    plain.activity_regularizer = None  # it looks at what the activation returns
    return plain


def _activation_of(steps: Steps, path: str, layer: keras.Layer) -> tuple[str, keras.Operation]:
    function = layer.activation
    if isinstance(function, keras.Layer):
        return steps.claim(path, function.name, function)
    name = re.sub(r"\W", "", getattr(function, "__name__", "")).replace("lambda", "") or "activation"
    activation = keras.layers.Activation(
        function, dtype=layer.dtype_policy, activity_regularizer=layer.activity_regularizer
    )
    return steps.claim(path, name, activation)


def _split_activation_layer(steps: Steps, path: str, layer: keras.Layer, inputs: Any, **kwargs: Any) -> Any:
    if layer.activity_regularizer is not None:
        return None
    if layer.activation in (keras.activations.silu, keras.ops.silu):
        return _split_silu(steps, path, layer, inputs)
    if layer.activation in (keras.activations.hard_sigmoid, keras.ops.hard_sigmoid):
        return _split_hard_sigmoid(steps, path, layer, inputs)
    return None


def _split_silu(steps: Steps, path: str, operation: keras.Operation, inputs: Any, **_: Any) -> Any:
    """SiLU is `x * sigmoid(x)`; integer runtimes need the scale of the sigmoid."""
    policy = operation.dtype_policy if isinstance(operation, keras.Layer) else inputs.dtype
    gate_path, gate = steps.once(
        operation, "sigmoid", lambda: steps.claim(path, "sigmoid", keras.layers.Activation("sigmoid", dtype=policy))
    )
    product_path, product = steps.once(
        operation, "multiply", lambda: steps.claim(path, "multiply", keras.layers.Multiply(dtype=policy))
    )
    return steps.emit(product_path, product, [inputs, steps.emit(gate_path, gate, inputs)])


def _split_hard_sigmoid(steps: Steps, path: str, operation: keras.Operation, inputs: Any, **_: Any) -> Any:
    """Hard sigmoid is `relu6(x + 3) / 6`; as a whole, TFLite computes it in float. Hard SiLU has a kernel."""
    if isinstance(operation, keras.Layer) and operation.compute_dtype != inputs.dtype:
        return None
    return steps.compute(path, lambda x: keras.ops.multiply(keras.ops.relu6(keras.ops.add(x, 3.0)), 1 / 6), inputs)


def _split_rescaling(steps: Steps, path: str, layer: keras.Layer, inputs: Any, **_: Any) -> Any:
    """Scaling by one number is a product and a sum, for which runtimes have integer kernels.

    With a number for each feature it stays: before it, features may be too different for one grid.
    """
    if np.ndim(layer.scale) or np.ndim(layer.offset) or layer.compute_dtype != inputs.dtype:
        return None
    scale, offset = float(layer.scale), float(layer.offset)

    def rescale(x: Any) -> Any:
        product = keras.ops.multiply(x, scale)
        return keras.ops.add(product, offset) if offset else product

    return steps.compute(path, rescale, inputs)


def _split_separable(steps: Steps, path: str, layer: keras.Layer, inputs: Any) -> Any:
    """A separable convolution is a depthwise one and one over channels (Chollet 2017, arXiv:1610.02357)."""
    depthwise_path, depthwise = steps.once(layer, "depthwise", lambda: _depthwise_of(steps, path, layer, inputs))
    middle = steps.emit(depthwise_path, depthwise, inputs)
    pointwise_path, pointwise = steps.once(layer, "pointwise", lambda: _pointwise_of(steps, path, layer, middle))
    return steps.emit(pointwise_path, pointwise, middle)


def _depthwise_of(steps: Steps, path: str, layer: keras.Layer, inputs: Any) -> tuple[str, keras.Operation]:
    one_d = isinstance(layer, keras.layers.SeparableConv1D)
    part = (keras.layers.DepthwiseConv1D if one_d else keras.layers.DepthwiseConv2D)(
        _size(layer.kernel_size, one_d),
        strides=_size(layer.strides, one_d),
        padding=layer.padding,
        depth_multiplier=layer.depth_multiplier,
        data_format=layer.data_format,
        dilation_rate=_size(layer.dilation_rate, one_d),
        use_bias=False,
        depthwise_initializer=layer.depthwise_initializer,
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
        trainable=layer.trainable,
        dtype=layer.dtype_policy,
    )
    part.build(inputs.shape)
    _copy_weight(layer.depthwise_kernel, part.kernel)
    return steps.claim(path, "depthwise", part)


def _pointwise_of(steps: Steps, path: str, layer: keras.Layer, inputs: Any) -> tuple[str, keras.Operation]:
    one_d = isinstance(layer, keras.layers.SeparableConv1D)
    part = (keras.layers.Conv1D if one_d else keras.layers.Conv2D)(
        layer.filters,
        1,
        data_format=layer.data_format,
        activation=layer.activation,
        use_bias=layer.use_bias,
        kernel_initializer=layer.pointwise_initializer,
        bias_initializer=layer.bias_initializer,
        kernel_regularizer=layer.pointwise_regularizer,
        bias_regularizer=layer.bias_regularizer,
        activity_regularizer=layer.activity_regularizer,
        kernel_constraint=layer.pointwise_constraint,
        bias_constraint=layer.bias_constraint,
        trainable=layer.trainable,
        dtype=layer.dtype_policy,
    )
    part.build(inputs.shape)
    _copy_weight(layer.pointwise_kernel, part.kernel)
    if layer.use_bias:
        _copy_weight(layer.bias, part.bias)
    return steps.claim(path, "pointwise", part)


def _size(value: Any, one_d: bool) -> Any:
    return value[0] if one_d and isinstance(value, (tuple, list)) else value


def _distribute(steps: Steps, path: str, layer: keras.Layer, inputs: Any, **_: Any) -> Any:
    """A dense layer treats all axes but the last alike, so that it needs no loop over time."""
    inner = layer.layer
    if type(inner) is not keras.layers.Dense or layer.activity_regularizer or inner.activity_regularizer:
        return None
    inner_path, inner = steps.once(layer, "inner", lambda: steps.claim(path, inner.name, inner))
    return steps.emit(inner_path, inner, inputs)


def _einsum_to_dense(steps: Steps, path: str, layer: keras.Layer, inputs: Any) -> Any:
    """A product over the last axes is one matrix product, for which all runtimes have a quantized kernel."""
    if (split := _split_activation(steps, path, layer, inputs)) is not None:
        return split
    contracted = _contracted_axes(layer)
    if contracted is None or layer.kernel_constraint or layer.activity_regularizer:
        return None
    if type(layer.kernel_regularizer) not in (type(None), *_SUMMED):  # others look at the shape
        return None
    if layer.bias_constraint or type(layer.bias_regularizer) not in (type(None), *_SUMMED):
        return None
    free = inputs.shape[1 : len(inputs.shape) - contracted]
    units = tuple(layer.kernel.shape[contracted:])
    reshapes = contracted > 1 or len(units) > 1
    if reshapes and free.count(None) > 1:
        return None
    free = tuple(-1 if size is None else size for size in free)
    dense = steps.once(layer, "dense", lambda: _dense_of(layer, contracted))
    if contracted > 1:
        inputs = _reshape(steps, path, "merge", inputs, (*free, dense.kernel.shape[0]))
    outputs = steps.emit(path, dense, inputs)
    return _reshape(steps, path, "split", outputs, (*free, *units)) if len(units) > 1 else outputs


def _contracted_axes(layer: keras.Layer) -> int | None:
    """Return how many last axes of the input the layer sums over, or `None` if it is no matrix product."""
    parts = re.fullmatch(r"(\.\.\.)?(\w+),(\w+)->(\.\.\.)?(\w+)", layer.equation.replace(" ", ""))
    if parts is None:
        return None
    dots, source, kernel, output_dots, target = parts.groups()
    for count in range(1, len(source) + 1):
        free, summed, units = source[:-count], source[-count:], kernel[count:]
        if kernel.startswith(summed) and target == free + units and units and not set(units) & set(source):
            has_batch = bool(dots) or bool(free)
            plain_bias = layer.bias is None or layer.bias_axes == units
            return count if has_batch and plain_bias and dots == output_dots else None
    return None


def _dense_of(layer: keras.Layer, contracted: int) -> keras.layers.Dense:
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    rows = 1
    for size in kernel.shape[:contracted]:
        rows *= size
    kernel = kernel.reshape(rows, -1)
    dense = keras.layers.Dense(
        kernel.shape[1],
        activation=layer.activation,
        use_bias=layer.bias is not None,
        kernel_initializer=layer.kernel_initializer,
        bias_initializer=layer.bias_initializer,
        kernel_regularizer=layer.kernel_regularizer,
        bias_regularizer=layer.bias_regularizer,
        trainable=layer.trainable,
        dtype=layer.dtype_policy,
        name=layer.name,
    )
    dense.build((None, rows))
    dense.kernel.assign(kernel)
    dense.kernel.trainable = layer.kernel.trainable
    if layer.bias is not None:
        dense.bias.assign(keras.ops.convert_to_numpy(layer.bias).reshape(-1))
        dense.bias.trainable = layer.bias.trainable
    return dense


def _reshape(steps: Steps, path: str, part: str, tensor: Any, shape: tuple[int, ...]) -> Any:
    layer_path, layer = steps.claim(path, part, keras.layers.Reshape(shape, dtype=tensor.dtype))
    return steps.emit(layer_path, layer, tensor)


def _copy_weight(source: keras.Variable, target: keras.Variable) -> None:
    target.assign(keras.ops.copy(source))  # on JAX they would share a buffer, which training gives away
    target.trainable = source.trainable


LAYER_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("Dense", "Conv1D", "Conv2D", "Conv3D"), _split_activation),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _split_activation),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _split_activation),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _split_separable),
    "EinsumDense": _einsum_to_dense,
    "TimeDistributed": _distribute,
    "Activation": _split_activation_layer,
    "Silu": _split_silu,
    "HardSigmoid": _split_hard_sigmoid,
    "Rescaling": _split_rescaling,
}
"""The rule of each Keras layer or operation, by the name of its class."""
