"""Layers that compute a kernel times their input plus a bias: which channel each weight belongs to, in one table.

With that, a factor (and an offset) per channel before or after a layer goes into its weights, exactly. Such a layer
is built anew, since others may share the one that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_DENSE = (layers.Dense,)
_EINSUM = (layers.EinsumDense,)
_KNOWN = (*_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE, *_SEPARABLE, *_DENSE, *_EINSUM)
_CONSTRAINTS = ("kernel_constraint", "bias_constraint", "depthwise_constraint", "pointwise_constraint")


@dataclass(frozen=True)
class Channels:
    """The channel of each weight of a kernel.

    Args:
        ids: integers that broadcast against the kernel.
        count: how many channels there are.
        kernel: index of the kernel among the layer's weights.
    """

    ids: np.ndarray
    count: int
    kernel: int = 0

    def reduce(self, values: np.ndarray, function: np.ufunc) -> np.ndarray:
        """Return `np.add` or `np.maximum` over the weights of each channel; maxima are of non-negative values."""
        axes = tuple(axis for axis, size in enumerate(self.ids.shape) if size == 1)
        partial = function.reduce(values, axis=axes, keepdims=True)
        result = np.zeros(self.count)
        function.at(result, np.broadcast_to(self.ids, partial.shape), partial)
        return result


def is_affine(layer: Any) -> bool:
    """Return whether a layer is in the table; subclasses and layers that Keras quantized or LoRA changed are not."""
    return (
        type(layer) in _KNOWN
        and getattr(layer, "quantization_mode", None) is None
        and not getattr(layer, "lora_enabled", False)
    )


def is_linear(layer: keras.Layer) -> bool:
    """Return whether no activation follows inside the layer."""
    return layer.activation is None or layer.activation is keras.activations.linear


def output_channels(layer: keras.Layer, rank: int, axis: int) -> Channels | None:
    """Return which output channel each weight makes, or `None` where the kernel cannot scale them one by one.

    Args:
        layer: a layer that is built.
        rank: rank of its output tensor, batch included.
        axis: the channel axis of that tensor.
    """
    if not is_affine(layer) or (channel_axis(layer, rank) not in (None, axis)):
        return None
    shape = tuple(layer.weights[0].shape)
    if isinstance(layer, _SEPARABLE):
        return _along(tuple(layer.weights[1].shape), -1, kernel=1)
    if isinstance(layer, _TRANSPOSED):
        return _along(shape, -2)
    if isinstance(layer, _DEPTHWISE):  # output channel = input channel * multiplier + number of the filter
        return Channels(
            _shaped(np.arange(shape[-2] * shape[-1]).reshape(shape[-2:]), len(shape)), shape[-2] * shape[-1]
        )
    if isinstance(layer, _EINSUM):
        _, kernel, output = _letters(layer)
        letter = _letter_at(layer, output, rank, axis)
        return _along(shape, kernel.index(letter)) if letter and letter in kernel else None
    return _along(shape, -1)


def input_channels(layer: keras.Layer, rank: int, axis: int, count: int) -> Channels | None:
    """Return which input channel each weight reads, or `None` where the kernel cannot scale them one by one.

    Args:
        layer: a layer that is built.
        rank: rank of its input tensor, batch included.
        axis: the channel axis of that tensor.
        count: number of channels; after `Flatten`, feature i belongs to channel `i % count`.
    """
    if not is_affine(layer) or isinstance(layer, _SEPARABLE) or (channel_axis(layer, rank) not in (None, axis)):
        return None
    shape = tuple(layer.weights[0].shape)
    if isinstance(layer, _CONVOLUTIONS):
        groups, (inputs, outputs) = layer.groups, shape[-2:]
        group = np.arange(outputs) // (outputs // groups)
        ids = _shaped(np.arange(inputs)[:, None] + inputs * group, len(shape))
        found = Channels(ids, inputs * groups) if groups > 1 else _along(shape, -2)
    elif isinstance(layer, _TRANSPOSED):
        found = _along(shape, -1)
    elif isinstance(layer, _DEPTHWISE):
        found = _along(shape, -2)
    elif isinstance(layer, _EINSUM):
        inputs, kernel, output = _letters(layer)
        letter = _letter_at(layer, inputs, rank, axis)
        if not letter or letter not in kernel or letter in output:
            return None
        found = _along(shape, kernel.index(letter))
    else:
        found = _along(shape, -2)
    return Channels(found.ids % count, count) if found.count % count == 0 else None


def scale_outputs(
    input_shape: Sequence[int | None],
    layer: keras.Layer,
    channels: Channels,
    rank: int,
    axis: int,
    scale: np.ndarray,
    offset: np.ndarray | None = None,
) -> keras.Layer:
    """Return a layer that gives `scale * y + offset` where `layer` gives `y`.

    Args:
        input_shape: shape of the layer's input, batch included.
        layer: a layer whose activation commutes with this.
        channels: its output channels.
        rank: rank of its output, batch included.
        axis: channel axis of its output.
        scale: a factor for each channel.
        offset: an addend for each channel, or `None` for zero; the new layer has a bias then.
    """
    weights = layer.get_weights()
    weights[channels.kernel] = weights[channels.kernel] * scale[channels.ids]
    kernels = 2 if isinstance(layer, _SEPARABLE) else 1
    bias = weights.pop() if len(weights) > kernels else None
    if bias is None and offset is None:
        return _rebuild(input_shape, layer, weights, {})
    along = [1] * rank
    along[axis] = -1
    if not isinstance(layer, _EINSUM):
        along = [-1]
    addend = np.zeros(channels.count) if offset is None else offset
    value = (0.0 if bias is None else bias) * scale.reshape(along) + addend.reshape(along)
    return _rebuild(input_shape, layer, [*weights, value], _with_bias(layer, rank, axis))


def scale_inputs(
    input_shape: Sequence[int | None],
    layer: keras.Layer,
    channels: Channels,
    scale: np.ndarray,
    offset: np.ndarray | None = None,
) -> keras.Layer:
    """Return a layer that gives for `x` what `layer` gives for `scale * x + offset`.

    Args:
        input_shape: shape of the layer's input, batch included.
        layer: the layer; with an offset it must be one of which `takes_offset` holds.
        channels: its input channels.
        scale: a factor for each channel.
        offset: an addend for each channel, or `None` for zero.
    """
    weights = layer.get_weights()
    if offset is None:
        return _rebuild(input_shape, layer, [weights[0] * scale[channels.ids], *weights[1:]], {})
    rank = len(input_shape)
    axis = channel_axis(layer, rank)
    made = output_channels(layer, rank, axis)
    shift = made.reduce(weights[0] * offset[channels.ids], np.add)
    bias = shift + (weights[1] if len(weights) > 1 else 0.0)
    return _rebuild(input_shape, layer, [weights[0] * scale[channels.ids], bias], _with_bias(layer, rank, axis))


def with_activation(input_shape: Sequence[int | None], layer: keras.Layer, activation: Any) -> keras.Layer:
    """Return a layer with the same weights and another activation."""
    return _rebuild(input_shape, layer, layer.get_weights(), {"activation": activation})


def takes_offset(layer: keras.Layer) -> bool:
    """Return whether a constant added to each input channel adds a constant to each output channel.

    At a border that the layer pads itself it does not, and transposed convolutions overlap unevenly.
    """
    padded = getattr(layer, "padding", "valid") != "valid"
    return isinstance(layer, (*_CONVOLUTIONS, *_DEPTHWISE, *_DENSE)) and not padded


def channel_axis(layer: keras.Layer, rank: int) -> int | None:
    """Return the channel axis of a layer's tensors, or `None` where its equation decides."""
    if isinstance(layer, _EINSUM):
        return None
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def _rebuild(
    shape: Sequence[int | None], layer: keras.Layer, weights: list[np.ndarray], changes: dict[str, Any]
) -> keras.Layer:
    """Return a layer of the same options with other weights; constraints would fit the old ones and are left out."""
    config = layer.get_config()
    for key, value in config.items():
        if isinstance(value, dict) and key != "dtype" and hasattr(layer, key):
            config[key] = getattr(layer, key)  # the object itself: custom ones need not be registered
    config.update({key: None for key in _CONSTRAINTS if key in config}, **changes)
    new = type(layer).from_config(config)
    new.build(shape)
    targets = new.weights
    new.set_weights(
        [np.reshape(value, target.shape).astype(target.dtype) for value, target in zip(weights, targets, strict=True)]
    )
    for index, target in enumerate(targets):
        target.trainable = layer.weights[min(index, len(layer.weights) - 1)].trainable
    return new


def _with_bias(layer: keras.Layer, rank: int, axis: int) -> dict[str, Any]:
    """Return the option that gives the layer a bias with an entry for each channel."""
    if not isinstance(layer, _EINSUM):
        return {"use_bias": True}
    _, _, output = _letters(layer)
    needed = {*(layer.bias_axes or ""), _letter_at(layer, output, rank, axis)}
    return {"bias_axes": "".join(letter for letter in output if letter in needed)}


def _along(shape: tuple[int, ...], axis: int, kernel: int = 0) -> Channels:
    axis %= len(shape)
    ids = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return Channels(ids, shape[axis], kernel)


def _shaped(ids: np.ndarray, rank: int) -> np.ndarray:
    return ids.reshape((1,) * (rank - ids.ndim) + ids.shape)


def _letters(layer: keras.layers.EinsumDense) -> tuple[str, str, str]:
    """Return the letters of input, kernel and output in an equation, without the dots."""
    sources, output = layer.equation.replace("...", "").split("->")
    inputs, kernel = sources.split(",")
    return inputs.strip(), kernel.strip(), output.strip()


def _letter_at(layer: keras.layers.EinsumDense, letters: str, rank: int, axis: int) -> str | None:
    """Return the letter of one axis of a tensor, or `None` where the dots stand for it."""
    position = axis - (rank - len(letters)) if layer.equation.startswith("...") else axis
    return letters[position] if 0 <= position < len(letters) else None
