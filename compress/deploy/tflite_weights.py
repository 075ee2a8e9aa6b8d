"""Where the weights of a model are in a TFLite file: found by their content, whatever the converter did to their axes.

The converter names and orders constants in ways of its own, but it keeps every value. A checksum that does not depend
on the order finds the constant that a weight became; the order of the axes is then found by trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.deploy.tflite_flatbuffer import TfliteFile, Type, quantization
from compress.quantization.stored import StoredWeight

_PROBES = 64
_CHUNK = 2**20  # values at a time, so large weights are not copied whole


@dataclass(frozen=True, eq=False)
class FileWeight:
    """A stored weight in the layout that a file has it in.

    Args:
        source: the weight.
        order: the axes of the weight in the order of the file, which may join some of them.
        values: its values, shaped as the tensor in the file.
        scale: float32, one per entry of `axis` (or of length 1); `None` for float types, and where scales differ along
            more than one axis of the file.
        axis: the quantized dimension.
        factor: what the file has multiplied the weight by, where that is not part of the scale; it broadcasts.
    """

    source: StoredWeight
    order: tuple[int, ...]
    values: np.ndarray
    scale: np.ndarray | None
    axis: int
    factor: np.ndarray | None = None


class WeightTensors:
    """The integer tensors of weights, each of which is added to a subgraph once.

    Attributes:
        kinds: tensor types by path of the weight.
    """

    def __init__(self, file: TfliteFile, packed: bool):
        self._file, self._packed = file, packed
        self._added: dict[tuple[int, int, int, bytes], int] = {}
        self.kinds: dict[str, set[int]] = {}

    def kind(self, weight: FileWeight, packs: bool) -> int:
        """Return the type that a weight is stored in; `packs` says whether its reader takes two values per byte."""
        return Type.INT4 if packs and self._packed and weight.source.bits <= 4 else Type.INT8

    def add(self, graph: schema.SubGraphT, index: int, weight: FileWeight, packs: bool) -> int:
        """Return the tensor with the integers of `weight`, which the file has as the float tensor `index`."""
        kind = self.kind(weight, packs)
        key = id(graph), index, kind, weight.scale.tobytes()
        if key not in self._added:
            self.record(weight, kind)
            self._added[key] = self._file.add_tensor(
                graph,
                graph.tensors[index].name,
                kind,
                quantization=quantization(weight.scale, axis=weight.axis),
                values=weight.values,
            )
        return self._added[key]

    def record(self, weight: FileWeight, kind: int) -> None:
        """Note the type that a weight is stored in."""
        self.kinds.setdefault(weight.source.path, set()).add(kind)


def find_weights(
    file: TfliteFile, weights: Sequence[StoredWeight]
) -> tuple[dict[tuple[int, int], FileWeight], list[StoredWeight]]:
    """Return `{(graph, tensor): weight}` of every constant that is one of `weights`, and those that no constant is.

    Weights that are equal match the same constants, whichever of them is stored; that does no harm. The converter
    leaves out a bias of zeros, so weights that are all zero need not be there.
    """
    by_key: dict[tuple[int, int, int], list[tuple[int, StoredWeight]]] = {}
    for position, weight in enumerate(weights):
        by_key.setdefault(_checksum(weight.dequantize()), []).append((position, weight))
    sizes = {key[0] for key in by_key}
    buffers: dict[tuple[int, tuple[int, ...]], FileWeight | None] = {}
    found: dict[tuple[int, int], FileWeight] = {}
    missing = dict(enumerate(weights))
    for i, graph in enumerate(file.graphs):
        for j, tensor in enumerate(graph.tensors):
            if tensor.type != Type.FLOAT32 or (constant := file.constant(graph, j)) is None:
                continue
            if constant.size not in sizes:
                continue
            place = tensor.buffer, constant.shape
            if place not in buffers:
                buffers[place] = None
                for position, weight in by_key.get(_checksum(constant), ()):
                    order = _find_order(weight.dequantize(), constant)
                    if order is not None:
                        buffers[place] = buffers[place] or lay_out(weight, order, constant.shape)
                        missing.pop(position, None)
            if buffers[place] is not None:
                found[i, j] = buffers[place]
    return found, [weight for weight in missing.values() if weight.values.any()]


def _checksum(values: np.ndarray) -> tuple[int, int, int]:
    """Return a key that depends on the values but not on their order; zeros of both signs are equal."""
    flat = np.ascontiguousarray(values, "float32").reshape(-1)
    total = squares = 0
    for start in range(0, flat.size, _CHUNK):
        wide = (flat[start : start + _CHUNK] + np.float32(0)).view("uint32").astype("uint64")
        total += int(wide.sum(dtype="uint64"))
        squares += int((wide * wide).sum(dtype="uint64"))
    return flat.size, total, squares % 2**64


def _find_order(real: np.ndarray, constant: np.ndarray) -> tuple[int, ...] | None:
    """Return the order of the axes in which `real` has the values of `constant` one by one, or `None`."""
    flat = constant.reshape(-1)
    probes = np.linspace(0, max(0, flat.size - 1), _PROBES).astype("int64") if flat.size else np.zeros(0, "int64")
    for order in axis_orders(real.shape, constant.shape):
        turned = real.transpose(order)
        if np.array_equal(turned[np.unravel_index(probes, turned.shape)], flat[probes]) and np.array_equal(
            turned.reshape(-1), flat
        ):
            return order
    return None


def axis_orders(shape: tuple[int, ...], wanted: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return every order of axes that may change something, those that give the shape `wanted` first."""
    long = [axis for axis, size in enumerate(shape) if size > 1]
    short = [axis for axis, size in enumerate(shape) if size <= 1]
    orders = sorted(permutations(long), key=lambda order: _preference(order, shape, wanted))
    return [(*short, *order) for order in orders]


def _preference(
    order: tuple[int, ...], shape: tuple[int, ...], wanted: tuple[int, ...]
) -> tuple[bool, tuple[int, ...]]:
    """Order the orders: first those that give the shape, as weights with repeated values fit several."""
    return tuple(shape[axis] for axis in order) != tuple(size for size in wanted if size > 1), order


def lay_out(weight: StoredWeight, order: tuple[int, ...], shape: tuple[int, ...]) -> FileWeight:
    """Return a weight with its axes in `order` and then in `shape`."""
    values = weight.values.transpose(order).reshape(shape)
    if weight.scale is None or weight.group_size is not None:
        return FileWeight(weight, order, values, None, 0)
    scale = weight.scale.reshape((1,) * (weight.values.ndim - weight.scale.ndim) + weight.scale.shape)
    if scale.size == 1:
        return FileWeight(weight, order, values, scale.reshape(1), 0)
    turned = scale.transpose(order)
    sizes = [weight.values.shape[axis] for axis in order]
    for axis, members in _axis_members(sizes, shape).items():
        kept = [turned.shape[i] for i in members]
        if np.prod(kept, dtype="int64") != turned.size:
            continue  # the scale varies along other axes too
        line = np.broadcast_to(turned.reshape(kept), [sizes[i] for i in members]).reshape(-1)
        return FileWeight(weight, order, values, np.ascontiguousarray(line, "float32"), axis)
    return FileWeight(weight, order, values, None, 0)


def _axis_members(sizes: Sequence[int], shape: Sequence[int]) -> dict[int, list[int]]:
    """Return which of the axes `sizes` make up each axis of `shape`, for those axes that are whole products."""
    ends, total = {}, 1
    for i, size in enumerate(sizes):
        total *= size
        if size > 1:
            ends[total] = i
    members: dict[int, list[int]] = {}
    start, total = -1, 1
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        total *= size
        if total not in ends:
            return members
        members[axis] = list(range(start + 1, ends[total] + 1))
        start = ends[total]
    return members
