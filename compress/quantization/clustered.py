"""Clustered kernels in integers: as few integers as clusters, in every channel the same ones.

Folding batch norm gives each output channel of a kernel a factor of its own. Scales with the same factors take it back,
so that the integers are those of the kernel before: that is what makes a quantized file small once it is compressed.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

from compress.models.clusters import find_clusters, merge_values
from compress.models.kernel_layout import find_layouts
from compress.models.walking import list_kernels
from compress.quantization.arithmetic import exact_scale, spread_scale, weight_scale
from compress.quantization.layers import QuantizedLayer
from compress.quantization.scale_search import round_weight
from compress.quantization.weight_format import WeightFormat

_FEW_BITS = 6
_SHRINKS = np.linspace(1.0, 0.2, 41, dtype="float32")
_WEAKEST = 2.0**-16  # of the largest scale, as `weight_scale` has it


class ClusteredKernels:
    """The clustered kernels of a float model, to be known again once each output channel has a factor of its own.

    Args:
        model: the model before anything is folded.
    """

    def __init__(self, model: keras.Model):
        kernels = list_kernels(model)
        layouts = find_layouts(model, [kernel.variable for kernel in kernels])
        self._per_tensor: list[np.ndarray] = []
        self._per_channel: list[np.ndarray] = []
        for kernel, layout in zip(kernels, layouts, strict=True):
            values = _to_float32(kernel.variable)
            clusters = find_clusters(values, layout.outputs)
            if clusters is not None:
                (self._per_channel if clusters.axes else self._per_tensor).append(values)

    @property
    def any_shared(self) -> bool:
        """Whether a kernel as a whole was clustered."""
        return bool(self._per_tensor)

    def knows(self, kernel: np.ndarray, axes: Sequence[int]) -> bool:
        """Return whether `kernel` is one of them, but for a factor for each place along `axes`."""
        return any(_factors(kernel, each, axes) is not None for each in (*self._per_tensor, *self._per_channel))

    def shared_scale(self, kernel: np.ndarray, form: WeightFormat) -> np.ndarray | None:
        """Return scales, shaped as `weight_scale` has them, under which all channels of a kernel share their integers.

        Args:
            kernel: float32 weights.
            form: bits, and which weights share a scale.

        Returns:
            `None` where the kernel as a whole was not clustered, or the format has too few scales.
        """
        if form.dtype != "int":
            return None
        for source in self._per_tensor:
            factors = _factors(kernel, source, form.channel_axes)
            if factors is not None:
                return _scale(kernel, form, factors * np.abs(source).max())
        return None


def share_integers(layer: QuantizedLayer, name: str, scale: np.ndarray) -> None:
    """Give a weight with `"stored"` scales those of `shared_scale`, and each cluster one integer in all channels."""
    form, variable = layer.formats[name], layer.weight_variable(name)
    unit = spread_scale(scale, variable.shape, form.group_size, form.axis)
    # Divided by scales of 16 bits, a cluster near the middle between two integers would be rounded to both.
    variable.assign(merge_values(_to_float32(variable) / unit) * unit)
    layer.set_rounding(name, round_weight(_to_float32(variable), form, scale), scale)


def is_clustered(layer: QuantizedLayer, name: str) -> bool:
    """Return whether a weight of a quantized layer is clustered, whatever factors its channels have."""
    values = _to_float32(layer.weight_variable(name))
    unit = cluster_unit(layer, name)
    axes = layer.formats[name].channel_axes
    return find_clusters(values if unit is None else merge_values(values / unit), axes) is not None


def cluster_unit(layer: QuantizedLayer, name: str) -> np.ndarray | None:
    """Return what the weights of a clustered kernel are to be divided by for channels to share their values.

    It broadcasts against the weight; `None` where the layer derives its scales from the weights.
    """
    form = layer.formats[name]
    if form.scale != "stored":
        return None
    return spread_scale(layer.scales()[name], layer.weight_variable(name).shape, form.group_size, form.axis)


def _factors(kernel: np.ndarray, source: np.ndarray, axes: Sequence[int]) -> np.ndarray | None:
    """Return the magnitude of what `source` was multiplied by for each place along `axes`, or `None`."""
    if kernel.shape != source.shape:
        return None
    others = tuple(axis for axis in range(kernel.ndim) if axis not in {each % kernel.ndim for each in axes})
    wide = source.astype("float64")
    squares = (wide * wide).sum(axis=others, keepdims=True)
    factors = (kernel * wide).sum(axis=others, keepdims=True) / np.where(squares > 0, squares, 1.0)
    if not np.allclose(kernel, factors * wide, rtol=1e-5, atol=1e-9 * float(np.abs(kernel).max(initial=0))):
        return None
    return np.abs(factors) if np.any(factors) else None


def _scale(kernel: np.ndarray, form: WeightFormat, largest: np.ndarray) -> np.ndarray:
    """Return scales for channels whose largest weights are `largest`, were each centroid in every channel."""
    shape = weight_scale(kernel, form.channel_axes, form.bits, form.group_size, form.axis).shape
    scale = np.broadcast_to(largest / (2 ** (form.bits - 1) - 1), shape)
    scale = np.maximum(scale, _WEAKEST * scale.max()).astype("float32")
    if form.bits > _FEW_BITS:
        return exact_scale(scale)
    tried = [exact_scale(scale * shrink) for shrink in _SHRINKS]
    return min(tried, key=lambda each: float(np.square(round_weight(kernel, form, each) - kernel).sum()))


def _to_float32(variable: keras.Variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), "float32")
