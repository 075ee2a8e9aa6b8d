"""Kernels that must not get factors along their inputs: a clustered one would lose its clusters."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np

from compress.quantization.affine import Channels
from compress.quantization.rules import channel_axes

Keeps = Callable[[np.ndarray, tuple[int, ...]], bool]
"""`keeps(kernel, axes of its outputs)` says whether a kernel is to keep its clusters."""


def breaks_clusters(layer: keras.Layer, channels: Channels, keeps: Keeps) -> bool:
    """Return whether factors for input channels of a layer would split clusters that it is to keep.

    Factors of a depthwise kernel's inputs are those of its outputs, and split nothing.
    """
    variable = layer.weights[channels.kernel]
    outputs = channel_axes(layer, variable.name, len(variable.shape))
    changed = {axis for axis, size in enumerate(channels.ids.shape) if size > 1}
    return not changed <= set(outputs) and keeps(keras.ops.convert_to_numpy(variable), outputs)
