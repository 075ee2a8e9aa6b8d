"""Learning by trial how a layer that has no rule treats its channels.

The layer is built again for fewer input channels: the axes of its weights, and of its output, that follow are those
that carry the channels. The guess counts only if the smaller layer, with the weights cut so, then computes what the
original does for the channels that are left.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from compress.channels.atoms import Atoms, Axes
from compress.channels.rules import channel_axis, output_tensors
from compress.models.graph import Node

_BATCH, _OPEN_SIZE = 2, 8
_TOLERANCE = 1e-5


def probe_layer(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes] | None:
    """Return the axes of the output of a layer with one input, or `None` where trials do not tell.

    The layer must follow the number of its input channels without a change of its configuration.
    """
    if not isinstance(node.operation, keras.Layer) or len(inputs) != 1 or len(output_tensors(node)) != 1:
        return None
    layer, (x,), tensor = node.operation, inputs, node.inputs[0]
    axis = channel_axis(layer, len(x))
    count = tensor.shape[axis]
    if x[axis] is None or count is None or count < 2 or node.args[1:] or node.kwargs:
        return None
    try:
        found = _try(layer, tuple(tensor.shape), axis, count)
    except Exception:  # user code runs here, on shapes that it was not made for: then nothing is known
        return None
    if found is None:
        return None
    places, out_axis = found
    for index, variable in enumerate(layer.variables):
        for place in places[index]:
            atoms.weight(node.path, variable, place, x[axis], "passes")
    atoms.read(id(node), 0, axis, x[axis])
    for other, own in enumerate(x):
        if other != axis:
            atoms.freeze(own, f"{node.path} was probed along its channels only")
    result: Axes = [None] * len(output_tensors(node)[0].shape)
    if out_axis is not None:
        result[out_axis] = x[axis]
    return [result]


def _try(
    layer: keras.Layer, shape: tuple[int | None, ...], axis: int, count: int
) -> tuple[list[list[int]], int | None] | None:
    """Return the axes of each weight that follow the channels, and that of the output, if the layer proves them."""
    generator = np.random.default_rng(0)
    keep = np.sort(generator.permutation(count)[: count // 2])
    full = (_BATCH, *(size or _OPEN_SIZE for size in shape[1:]))
    x = generator.standard_normal(full).astype("float32")
    kept = np.zeros(count, bool)
    kept[keep] = True
    x = np.where(kept.reshape([-1 if each == axis else 1 for each in range(len(full))]), x, np.float32(0))
    small = type(layer).from_config(layer.get_config())
    less = np.take(x, keep, axis)
    small(less)
    places = []
    for before, after in zip(layer.variables, small.variables, strict=True):
        moved = [each for each, pair in enumerate(zip(before.shape, after.shape, strict=True)) if pair[0] != pair[1]]
        if any((before.shape[each], after.shape[each]) != (count, len(keep)) for each in moved):
            return None
        values = keras.ops.convert_to_numpy(before)
        for each in moved:
            values = np.take(values, keep, each)
        after.assign(values)
        places.append(moved)
    big, little = (_call(each, values) for each, values in ((layer, x), (small, less)))
    moved = [each for each, pair in enumerate(zip(big.shape, little.shape, strict=True)) if pair[0] != pair[1]]
    if len(moved) > 1 or (moved and (big.shape[moved[0]], little.shape[moved[0]]) != (count, len(keep))):
        return None
    for each in moved:
        big = np.take(big, keep, each)
    if not np.abs(big - little).max() <= _TOLERANCE * max(1.0, float(np.abs(big).max())):
        return None
    return places, moved[0] if moved else None


def _call(layer: keras.Layer, x: np.ndarray) -> Any:
    return keras.ops.convert_to_numpy(layer(keras.ops.convert_to_tensor(x))).astype("float64")
