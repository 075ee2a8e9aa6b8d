"""Rules of operations that merge tensors, move axes, or work in space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from compress.channels.atoms import Atoms, Axes, Axis
from compress.channels.rules import channel_axis, freeze_all, output_tensors, rule_of
from compress.models.graph import Node


@rule_of(
    "Add", "Arctan2", "Average", "Divide", "Equal", "FloorDivide", "Fmod", "Greater", "GreaterEqual", "Less",
    "LessEqual", "Logaddexp", "LogicalAnd", "LogicalOr", "Maximum", "Minimum", "Mod", "Multiply", "NotEqual", "Power",
    "Subtract", "TrueDivide", "Where",
)  # fmt: skip
def merge(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Operands are aligned from the right, as NumPy does; an axis of length 1 is spread over the others'."""
    (output,) = output_tensors(node)
    constants = [each for each in _constants(node) if np.ndim(each)]
    if len({len(axes) for axes in inputs}) > 1 and isinstance(node.operation, keras.Layer):
        return freeze_all(node, inputs, atoms, f"{node.path} merges tensors of unlike rank")
    result: Axes = []
    for back in range(len(output.shape), 0, -1):
        length = output.shape[-back]
        own = [axes[-back] for axes, tensor in _pairs(node, inputs) if len(axes) >= back and tensor.shape[-back] != 1]
        if length == 1:
            own = [axes[-back] for axes in inputs if len(axes) >= back]
        if any(np.ndim(each) >= back and np.shape(each)[-back] != 1 for each in constants):
            own.append(None)
        merged = own[0] if own else None
        for other in own[1:]:
            merged = atoms.tie(merged, other, f"{node.path} merges it with channels that are fixed")
        result.append(merged)
    return [result]


def _pairs(node: Node, inputs: list[Axes]) -> list[tuple[Axes, keras.KerasTensor]]:
    return list(zip(inputs, node.inputs, strict=True))


def _constants(node: Node) -> list[Any]:
    if isinstance(node.operation, keras.Layer):
        return []
    values = keras.tree.flatten((node.args, node.kwargs))
    return [each for each in values if each is not None and not isinstance(each, keras.KerasTensor)]


@rule_of("Concatenate")
def concatenate(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    rank = len(inputs[0])
    axis = node.operation.axis % rank
    result: Axes = []
    for place in range(rank):
        if place != axis:
            merged = inputs[0][place]
            for other in inputs[1:]:
                merged = atoms.tie(merged, other[place], f"{node.path} merges it with channels that are fixed")
            result.append(merged)
            continue
        if all(axes[axis] is None for axes in inputs):
            result.append(None)
            continue
        parts = []
        for axes, tensor in _pairs(node, inputs):
            own = axes[axis]
            length = tensor.shape[axis]
            parts.append(own if own is not None else atoms.fixed(length, f"{node.path} joins what is fixed"))
        result.append(np.concatenate(parts))
    return [result]


@rule_of(
    "AveragePooling1D", "AveragePooling2D", "AveragePooling3D", "CenterCrop", "Cropping1D", "Cropping2D", "Cropping3D",
    "MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "Resizing", "UpSampling1D", "UpSampling2D", "UpSampling3D",
    "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D",
)  # fmt: skip
def in_space(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    (x,) = inputs
    channels = channel_axis(node.operation, len(x))
    for axis, own in enumerate(x):
        if axis != channels:
            atoms.freeze(own, f"{node.path} works along it")
    return [[own if axis == channels else None for axis, own in enumerate(x)]]


@rule_of(
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D", "GlobalMaxPooling1D",
    "GlobalMaxPooling2D", "GlobalMaxPooling3D",
)  # fmt: skip
def global_pooling(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    x = inputs[0]
    channels = channel_axis(node.operation, len(x))
    for axis, own in enumerate(x):
        if axis != channels:
            atoms.freeze(own, f"{node.path} pools over it")
    if not node.operation.keepdims:
        return [[None, x[channels]]]
    return [[own if axis == channels else None for axis, own in enumerate(x)]]


@rule_of(
    "All", "Any", "Argmax", "Argmin", "CountNonzero", "Logsumexp", "Max", "Mean", "Min", "Prod", "Std", "Sum", "Var"
)
def reduce(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """A sum does without the channels that go; everything else over them changes."""
    (x,) = inputs
    axis = node.operation.axis
    axes = range(len(x)) if axis is None else {each % len(x) for each in keras.tree.flatten(axis)}
    for each in axes:
        if node.kind == "Sum":
            atoms.read(id(node), 0, each, x[each])
        else:
            atoms.freeze(x[each], f"{node.path} reduces over it")
    if node.operation.keepdims:
        return [[None if place in axes else own for place, own in enumerate(x)]]
    return [[own for place, own in enumerate(x) if place not in axes]]


@rule_of("Permute")
def permute(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    (x,) = inputs
    return [[x[0], *(x[place] for place in node.operation.dims)]]


@rule_of("Transpose")
def transpose(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    (x,) = inputs
    order = node.operation.axes or range(len(x))[::-1]
    return [[x[place] for place in order]]


@rule_of("RepeatVector")
def repeat_vector(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    (x,) = inputs
    return [[x[0], None, x[1]]]


@rule_of("ExpandDims")
def expand_dims(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    (x,) = inputs
    if not isinstance(node.operation.axis, int):
        return freeze_all(node, inputs, atoms, f"{node.path} adds several axes")
    result = list(x)
    result.insert(node.operation.axis % (len(x) + 1), None)
    return [result]


@rule_of("Flatten", "Reshape")
def reshape(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Axes may be moved, merged and divided; of those that one axis is divided into, one carries its channels.

    The axes before and after come in blocks of as many places; in each block the axis with the most channels counts.
    """
    (x,) = inputs
    (output,) = output_tensors(node)
    result: Axes = [None] * len(output.shape)
    if getattr(node.operation, "data_format", "channels_last") == "channels_first" and node.kind == "Flatten":
        return freeze_all(node, inputs, atoms, f"{node.path} ({node.kind}) moves channels")
    blocks = _blocks(node.inputs[0].shape, output.shape)
    mapped = {axis for before, _ in blocks for axis in before}
    for axis, own in enumerate(x):
        if axis not in mapped:
            atoms.freeze(own, f"{node.path} ({node.kind}) mixes channels with axes of unknown length")
    for before, after in blocks:
        own = sorted((axis for axis in before if x[axis] is not None), key=lambda axis: -len(x[axis]))
        for axis in own[1:]:
            atoms.freeze(x[axis], f"{node.path} ({node.kind}) merges it with other channels")
        if own:
            lengths = [node.inputs[0].shape[axis] for axis in before]
            line = _stand(x[own[0]], before.index(own[0]), len(before))
            grid = np.broadcast_to(line, lengths).reshape([output.shape[axis] for axis in after])
            axis, values = _carrying(node, own[0], grid, atoms)
            result[after[axis]] = values
            if node.kind == "Reshape":
                _edit_target(node, after[axis], values, atoms)
    return [result]


def _blocks(before: Sequence[int | None], after: Sequence[int | None]) -> list[tuple[list[int], list[int]]]:
    """Return from behind the axes before and after that hold the same numbers, up to the first of unknown length."""
    found: list[tuple[list[int], list[int]]] = []
    own, other = len(before), len(after)
    while own > 0 and other > 0 and before[own - 1] is not None and after[other - 1] is not None:
        block: tuple[list[int], list[int]] = ([own - 1], [other - 1])
        own, other = own - 1, other - 1
        sizes = [before[own], after[other]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                own -= 1
                if own < 0 or before[own] is None:
                    return found
                block[0].insert(0, own)
                sizes[0] *= before[own]
            else:
                other -= 1
                if other < 0 or after[other] is None:
                    return found
                block[1].insert(0, other)
                sizes[1] *= after[other]
        found.append(block)
    return found


def _carrying(node: Node, axis: int, grid: np.ndarray, atoms: Atoms) -> tuple[int, np.ndarray]:
    """Return the axis of the grid that carries its atoms, and those of it."""
    found = _along_one_axis(grid)
    if found is not None:
        return found
    varying = [place for place in range(grid.ndim) if (grid != grid.take([0], place)).any()]
    longest = sorted(varying, key=lambda place: (-grid.shape[place], -place))
    if len(varying) > 2:  # such as rows, columns and channels of an image: channels are last
        longest = [varying[-1], *(place for place in longest if place != varying[-1])]
    return atoms.split(node.path, axis, longest, grid)


def _along_one_axis(grid: np.ndarray) -> tuple[int, np.ndarray] | None:
    """Return the axis along which all values of `grid` vary, and the values, or `None` where there is not one."""
    for axis in range(grid.ndim):
        line = grid[tuple(slice(None) if each == axis else 0 for each in range(grid.ndim))]
        if np.array_equal(np.broadcast_to(_stand(line, axis, grid.ndim), grid.shape), grid):
            return axis, line.copy()
    return None


def _stand(line: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return line.reshape([-1 if each == axis else 1 for each in range(rank)])


def _edit_target(node: Node, axis: int, values: Axis, atoms: Atoms) -> None:
    """Let the shape that is asked for follow the channels; -1 follows by itself."""
    config = node.operation.get_config()
    key = next(name for name in ("target_shape", "newshape", "shape") if name in config)
    place = axis - (1 if key == "target_shape" else 0)  # the layer's has no batch axis
    if config[key][place] != -1:
        atoms.edit(node.operation, f"{key}/{place}", values)
