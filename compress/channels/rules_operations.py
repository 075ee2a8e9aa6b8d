"""Rules of what people write with `keras.ops`, operators and slices: parts, stacks, and products that sum."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from compress.channels.atoms import Atoms, Axes
from compress.channels.rules import fixed_outputs, freeze_all, output_tensors, rule_of
from compress.models.graph import Node


@rule_of("Split")
def sections(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Equal parts stay equal; parts of unlike lengths keep all their channels."""
    (x,) = inputs
    axis = node.operation.axis % len(x)
    outputs = output_tensors(node)
    lengths = [tensor.shape[axis] for tensor in outputs]
    own = x[axis]
    if own is None or len(set(lengths)) > 1:
        atoms.freeze(own, f"{node.path} (Split) makes parts of unlike lengths")
        return [_with(x, axis, None) for _ in outputs]
    atoms.tie_parts(own, len(lengths), f"{node.path} (Split) makes parts of the same length")
    if not isinstance(node.operation.indices_or_sections, int):
        for index in range(len(lengths) - 1):
            key = f"indices_or_sections/{index}"
            atoms.edit(node.operation, key, own, lambda count, index=index: (index + 1) * count // len(lengths))
    return [_with(x, axis, part) for part in np.split(own, len(lengths))]


@rule_of("Glu")
def gated(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """The first half, times a gate from the second."""
    (x,) = inputs
    axis = node.operation.axis % len(x)
    return [_with(x, axis, atoms.tie_parts(x[axis], 2, f"{node.path} (Glu) has halves"))]


@rule_of("Unstack")
def unstack(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    (x,) = inputs
    axis = node.operation.axis % len(x)
    atoms.freeze(x[axis], f"{node.path} (Unstack) takes it apart")
    return [[own for place, own in enumerate(x) if place != axis] for _ in output_tensors(node)]


@rule_of("Stack")
def stacked(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    merged = list(inputs[0])
    for other in inputs[1:]:
        for place, own in enumerate(other):
            merged[place] = atoms.tie(merged[place], own, f"{node.path} stacks it with channels that are fixed")
    merged.insert(node.operation.axis % (len(merged) + 1), None)
    return [merged]


@rule_of("Squeeze")
def squeeze(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    (x,) = inputs
    shape = node.inputs[0].shape
    axis = node.operation.axis
    if axis is None:
        gone = {place for place, length in enumerate(shape) if length == 1}
    else:
        gone = {each % len(x) for each in keras.tree.flatten(axis)}
    for place in gone:
        atoms.freeze(x[place], f"{node.path} (Squeeze) needs its one channel")
    return [[own for place, own in enumerate(x) if place not in gone]]


@rule_of("GetItem")
def take(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Axes that are taken whole pass; of which only a part is taken, all channels stay."""
    x = inputs[0]
    key = inspect.signature(node.operation.call).bind(*node.args, **node.kwargs).arguments["key"]
    parts = list(key) if isinstance(key, (tuple, list)) else [key]
    if len(inputs) > 1 or any(
        not (each is None or each is Ellipsis or isinstance(each, (int, slice))) for each in parts
    ):
        return freeze_all(node, inputs, atoms, f"{node.path} (GetItem) has a key that is computed")
    if not any(each is Ellipsis for each in parts):
        parts.append(Ellipsis)
    rest = len(x) - sum(each is not None and each is not Ellipsis for each in parts)
    result: Axes = []
    axis = 0
    for part in parts:
        if part is Ellipsis:
            result += x[axis : axis + rest]
            axis += rest
        elif part is None:
            result.append(None)
        else:
            whole = part == slice(None)
            if not whole:
                atoms.freeze(x[axis], f"{node.path} (GetItem) takes a part of it")
            if isinstance(part, slice):
                result.append(x[axis] if whole else None)
            axis += 1
    return [result]


@rule_of("Swapaxes")
def swap_axes(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    result = list(inputs[0])
    first, second = node.operation.axis1, node.operation.axis2
    result[first], result[second] = result[second], result[first]
    return [result]


@rule_of("Moveaxis")
def move_axes(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    (x,) = inputs
    moved = {
        target % len(x): source % len(x)
        for source, target in zip(node.operation.source, node.operation.destination, strict=True)
    }
    rest = iter(place for place in range(len(x)) if place not in moved.values())
    return [[x[moved[place] if place in moved else next(rest)] for place in range(len(x))]]


@rule_of("Cumsum", "Cumprod", "Flip")
def along(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    (x,) = inputs
    axis = node.operation.axis
    places = range(len(x)) if axis is None else {each % len(x) for each in keras.tree.flatten(axis)}
    for place in places:
        atoms.freeze(x[place], f"{node.path} ({node.kind}) works along it")
    if len(node.output.shape) != len(x):
        return freeze_all(node, inputs, atoms, f"{node.path} ({node.kind}) flattens its input")
    return [[None if place in places else own for place, own in enumerate(x)]]


@rule_of("Pad")
def pad(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    x = inputs[0]
    widths = list(node.operation.pad_width)
    widths = widths * len(x) if len(widths) == 1 else widths
    result: Axes = []
    for own, width in zip(x, widths, strict=True):
        changed = any(width)
        if changed:
            atoms.freeze(own, f"{node.path} (Pad) adds to it")
        result.append(None if changed else own)
    return [result]


@rule_of("Matmul")
def matmul(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    first, second = node.args if len(node.args) == 2 else (node.kwargs["x1"], node.kwargs["x2"])
    ranks = [len(each.shape) for each in (first, second)]
    if min(ranks) < 2:
        return freeze_all(node, inputs, atoms, f"{node.path} (Matmul) has a vector")
    batch = "abcdefghijklmnopqrstuvw"[: max(ranks) - 2]
    letters = [batch[len(batch) - (rank - 2) :] + end for rank, end in zip(ranks, ("xy", "yz"), strict=True)]
    return _contract(node, inputs, (first, second), letters, batch + "xz", atoms)


@rule_of("Einsum")
def einsum(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    operands, arrow, result = node.operation.subscripts.replace(" ", "").partition("->")
    letters = operands.split(",")
    if not arrow or not ("".join(letters) + result).isalpha() or any(len(set(each)) < len(each) for each in letters):
        return freeze_all(node, inputs, atoms, f"{node.path} has the equation {node.operation.subscripts}")
    return _contract(node, inputs, node.args, letters, result, atoms)


@rule_of("Dot")
def dot(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """A product of two tensors sample by sample, which sums over an axis of each."""
    layer = node.operation
    if layer.normalize:
        return freeze_all(node, inputs, atoms, f"{node.path} (Dot) normalises channels")
    ranks = [len(axes) for axes in inputs]
    axes = [layer.axes, layer.axes] if isinstance(layer.axes, int) else list(layer.axes)
    summed = [axis % rank for axis, rank in zip(axes, ranks, strict=True)]
    if max(ranks) > 3 or 0 in summed:
        return freeze_all(node, inputs, atoms, f"{node.path} (Dot) has more axes than two and the batch's")
    names = iter("abcd")
    letters = ["z" + "".join("y" if axis == own else next(names) for axis in range(1, rank))
               for rank, own in zip(ranks, summed, strict=True)]  # fmt: skip
    result = "".join(letters).replace("z", "").replace("y", "")
    if not result:
        for index, (own, axis) in enumerate(zip(inputs, summed, strict=True)):
            atoms.tie(inputs[0][summed[0]], own[axis], f"{node.path} compares it with channels that are fixed")
            if index == 0:
                atoms.read(id(node), 0, axis, own[axis])
        return [[None, None]]
    return _contract(node, inputs, node.inputs, letters, "z" + result, atoms)


def _contract(
    node: Node, inputs: list[Axes], operands: Sequence[Any], letters: Sequence[str], result: str, atoms: Atoms
) -> list[Axes]:
    """Return the axes of a sum of products: axes with one letter are tied, and those that are not left are summed over.

    Args:
        operands: its tensors and constants.
        letters: of the axes of each operand; those of length 1 may be spread over others of the same letter.
        result: letters of the output.
    """
    queue = iter(range(len(inputs)))
    places = [next(queue) if isinstance(each, keras.KerasTensor) else None for each in operands]
    found: dict[str, Any] = {}
    for operand, place, names in zip(operands, places, letters, strict=True):
        for axis, letter in enumerate(names):
            own = None if place is None else inputs[place][axis]
            if letter not in found:
                found[letter] = own
            elif operand.shape[axis] != 1 or own is not None:
                reason = f"{node.path} multiplies it with channels that are fixed"
                found[letter] = atoms.tie(found[letter], own, reason)
    for place, names in zip(places, letters, strict=True):
        for axis, letter in enumerate(names):
            if place is not None and letter not in result:
                atoms.read(id(node), place, axis, inputs[place][axis])
    return [[found[letter] for letter in result]]


@rule_of("DotProductAttention")
def dot_product_attention(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Heads are tied, and widths, which JAX wants alike; they stay unless the scale of the scores is given."""
    bound = inspect.signature(node.operation.call).bind(*node.args, **node.kwargs).arguments
    tensors = [bound[name] for name in ("query", "key", "value")]
    by_tensor = dict(zip(map(id, node.inputs), inputs, strict=True))
    query, key, value = (by_tensor[id(each)] for each in tensors)
    if len(inputs) > len(tensors):
        return freeze_all(node, inputs, atoms, f"{node.path} (DotProductAttention) has masks that are computed")
    if bound.get("bias") is not None or bound.get("mask") is not None or tensors[0].shape[2] != tensors[1].shape[2]:
        heads = None
        for axes in (query, key, value):
            atoms.freeze(axes[2], f"{node.path} has heads of its own kind")
    else:
        reason = f"{node.path} compares it with channels that are fixed"
        heads = atoms.tie(atoms.tie(query[2], key[2], reason), value[2], reason)
    reason = f"{node.path} compares it with channels that are fixed"
    width = atoms.tie(atoms.tie(query[3], key[3], reason), value[3], reason)
    if bound.get("scale") is None:
        atoms.freeze(width, f"{node.path} scales its scores by it")
    else:
        atoms.read(id(node), [id(each) for each in node.inputs].index(id(tensors[0])), 3, width)
    for axes in (query, key, value):
        atoms.freeze(axes[1], f"{node.path} attends along it")
    return [[query[0], None, heads, width], *fixed_outputs(node)[1:]]


def _with(x: Axes, axis: int, own: np.ndarray | None) -> Axes:
    return [own if place == axis else each for place, each in enumerate(x)]
