"""The `hard_sigmoid` of recurrent gates, which is another function in Keras 3: its weights take the difference.

Keras 2 computes `clip(0.2 x + 0.5, 0, 1)` and Keras 3 `clip(x / 6 + 0.5, 0, 1)`. A gate's `x` is linear in its weights,
so weights that are 1.2 times as large give the same gate. Zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from compress.models.graph import is_of_keras

HARD_SIGMOID = "hard_sigmoid"
_SCALE = 1.2
_LSTM, _GRU = (4, (0, 1, 3)), (3, (0, 1))
_GATES: dict[str, tuple[int, tuple[int, ...]]] = {"LSTMCell": _LSTM, "ConvLSTMCell": _LSTM, "GRUCell": _GRU}
"""Class of a cell -> into how many parts its weights' last axis falls, and which of them make gates."""


def scale_gates(layer: Any) -> None:
    """Scale the weights of gates with a `hard_sigmoid` in a layer of Keras that was translated and filled."""
    for cell in _cells(layer):
        parts, gates = _GATES[type(cell).__name__]
        for variable in (cell.kernel, cell.recurrent_kernel, cell.bias):
            if variable is not None:
                value = keras.ops.convert_to_numpy(variable)
                blocks = np.split(value, parts, axis=-1)
                scaled = [block * np.float32(_SCALE) if i in gates else block for i, block in enumerate(blocks)]
                variable.assign(np.concatenate(scaled, axis=-1).astype(value.dtype))


def _cells(layer: Any) -> Iterator[Any]:
    """Yield the cells with such gates in a recurrent layer or a wrapper of one; a user's own classes are not opened."""
    if not (isinstance(layer, keras.layers.Layer) and is_of_keras(type(layer))):
        return
    if type(layer).__name__ in _GATES:
        if layer.recurrent_activation is keras.activations.hard_sigmoid:
            yield layer
        return
    for name in ("cell", "layer", "forward_layer", "backward_layer", "cells"):
        inner = getattr(layer, name, None)
        for each in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from _cells(each)
