"""Which layer may take over a division of its output channels, exactly: the other half of AWQ's scaling.

Norms with a gain and linear layers whose activation commutes with positive factors do; anything else does not, and
its successors stay unscaled.
"""

from __future__ import annotations

import keras
import numpy as np

from compress.errors import ModelError

_NORMS = (
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
)
_LINEAR = (keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_HOMOGENEOUS = {"linear", "relu", "leaky_relu"}  # f(x / s) = f(x) / s for every s > 0


def absorbing_weights(layer: keras.layers.Layer, features: int) -> list[tuple[keras.Variable, int]]:
    """Return the variables, each with its axis, that divide the layer's last output axis when they are divided.

    Empty if the layer cannot absorb a division. The caller must know that everything that reads the layer's output
    is multiplied in turn.

    Args:
        layer: a built layer.
        features: the size of its last output axis.
    """
    if type(layer) in _NORMS:
        found = _norm_weights(layer)
    elif type(layer) in _LINEAR:
        found = _linear_weights(layer, -1)
    elif type(layer) is keras.layers.EinsumDense:
        axis = _feature_axis(layer.equation)
        found = [] if axis is None else _linear_weights(layer, axis)
    else:
        found = []
    fits = all(isinstance(variable, keras.Variable) and variable.shape[axis] == features for variable, axis in found)
    return found if fits else []


def divide_outputs(layer: keras.layers.Layer, factors: np.ndarray) -> None:
    """Divide the layer's last output axis by positive `factors` `(features,)`, in place.

    Raises:
        ModelError: the layer cannot absorb it; ask `absorbing_weights` first.
    """
    weights = absorbing_weights(layer, len(factors))
    if not weights:
        raise ModelError(f"a norm with a gain or a linear layer can be divided. Received: layer {layer.name!r}")
    for variable, axis in weights:
        shape = [1] * len(variable.shape)
        shape[axis] = len(factors)
        values = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
        variable.assign(values / np.reshape(factors, shape))


def _norm_weights(layer: keras.layers.Layer) -> list[tuple[keras.Variable, int]]:
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    rank = getattr(layer.input_spec, "ndim", None)
    if len(axes) != 1 or axes[0] not in (-1, rank - 1 if rank else -1):
        return []
    gain = layer.scale if isinstance(layer, keras.layers.RMSNormalization) else layer.gamma
    if gain is None:
        return []
    offset = getattr(layer, "beta", None)
    return [(variable, -1) for variable in (gain, offset) if variable is not None]


def _linear_weights(layer: keras.layers.Layer, kernel_axis: int) -> list[tuple[keras.Variable, int]]:
    channels_first = getattr(layer, "data_format", None) == "channels_first"
    if keras.activations.serialize(layer.activation) not in _HOMOGENEOUS or channels_first:
        return []
    if getattr(layer, "lora_enabled", False) or layer.quantization_mode is not None:
        return []
    return [(layer.kernel, kernel_axis)] + ([(layer.bias, -1)] if layer.bias is not None else [])


def _feature_axis(equation: str) -> int | None:
    """Return the kernel's axis that becomes the output's last axis, or `None` if that comes from the input."""
    operands, output = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    letter = output[-1:]
    return kernel.index(letter) if letter in kernel and letter not in inputs else None
