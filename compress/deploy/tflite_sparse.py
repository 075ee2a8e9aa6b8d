"""Sparse weights in TFLite files: zeros are left out where that makes the file smaller, and nothing else changes.

A DENSIFY operator before the reader of a weight puts the zeros back once, when the file is loaded. The encoding is
that of TACO (Kjolstad et al. 2017) as the TFLite schema has it: one dimension is compressed, the others are dense, and
what is kept may be blocks along one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.deploy.tflite_flatbuffer import Op, TfliteFile, Type

_OVERHEAD = 512  # bytes that a second tensor, its sparsity and an operator may take
_BLOCKS = (2, 4, 8, 16)
_READERS = {
    (Op.CONV_2D, Type.FLOAT32): (0, 1), (Op.CONV_2D, Type.INT8): (0, 1),
    (Op.DEPTHWISE_CONV_2D, Type.FLOAT32): (0, 1), (Op.DEPTHWISE_CONV_2D, Type.INT8): (0, 1),
    (Op.TRANSPOSE_CONV, Type.FLOAT32): (2, 1), (Op.TRANSPOSE_CONV, Type.INT8): (2, 1),
    (Op.FULLY_CONNECTED, Type.FLOAT32): (0, 1),
    (Op.GATHER, Type.FLOAT32): (None, 0), (Op.GATHER, Type.INT8): (None, 0),
}  # fmt: skip
"""Operators that take a computed weight of this type under every delegate, with the places of data and weight.

XNNPACK refuses a file with others, such as FULLY_CONNECTED in int8 or float data with weights in int8; behind a
DEQUANTIZE it computes other numbers.
"""

_INDEX_TYPES = (
    (np.uint8, schema.SparseIndexVector.Uint8Vector, schema.Uint8VectorT),
    (np.uint16, schema.SparseIndexVector.Uint16Vector, schema.Uint16VectorT),
    (np.int32, schema.SparseIndexVector.Int32Vector, schema.Int32VectorT),
)


@dataclass(frozen=True, eq=False)
class SparseArray:
    """An array without most of its zeros.

    Args:
        shape: of the array.
        order: its axes from the slowest to the fastest, followed by the block axis, if there is one, as axis `rank`.
        sparse: which axis of the array is compressed.
        block: `(axis, size)`: runs of `size` values along `axis` are kept or left out together; `size` 1 is no block.
        segments: where each line of blocks along `sparse` begins among the kept ones, and the end of the last.
        indices: place along `sparse` of each kept block.
        values: what is kept.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    sparse: int
    block: tuple[int, int]
    segments: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    @property
    def size_bytes(self) -> int:
        """Bytes of values, segments and indices."""
        places = (self.segments, self.indices)
        return self.values.nbytes + sum(len(each) * _width(int(each.max(initial=0))) for each in places)


def encode_file(path: str) -> list[str]:
    """Store the weights of the TFLite file at `path` sparsely where that is smaller, and return what to say of it."""
    content = Path(path).read_bytes()
    smaller, names = write_sparse(content)
    if not names:
        return ["No weight of the tflite file gets smaller without its zeros."]
    Path(path).write_bytes(smaller)
    return [
        f"The tflite file stores {len(names)} weights without their zeros: {len(smaller):,} bytes instead of "
        f"{len(content):,}."
    ]


def write_sparse(content: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Return a TFLite file that stores each weight sparsely where that is smaller, and the names of these weights.

    Outputs do not change by a bit. The content itself is returned where no weight gets smaller.
    """
    file = TfliteFile(content)
    graph = file.graphs[0]  # the others run again and again, and what they densify too
    densify, names = [], []
    for index in _weights_of(file, graph):
        dense = file.constant(graph, index)
        sparse = encode_sparse(dense)
        if sparse is None or sparse.size_bytes + _OVERHEAD >= dense.nbytes:
            continue
        densify.append(file.operator(Op.DENSIFY, [_store(file, graph, index, sparse)], [index]))
        names.append(graph.tensors[index].name.decode(errors="replace"))
    if not names:
        return content, ()
    graph.operators = densify + list(graph.operators)
    return file.to_bytes(), tuple(names)


def encode_sparse(array: np.ndarray) -> SparseArray | None:
    """Return the smallest sparse form of an array, or `None` where no form is smaller than the array."""
    best, plan = array.nbytes, None
    for axis, size, kept in _blocks_of(array):
        count = int(np.count_nonzero(kept))
        for sparse, length in enumerate(kept.shape):
            lines = kept.size // length
            places = count * _width(length - 1) + (lines + 1) * _width(count)
            if (needed := count * size * array.itemsize + places) < best:
                best, plan = needed, (sparse, axis, size, kept)
    return None if plan is None else _encode(array, *plan)


def decode_sparse(sparsity: schema.SparsityParametersT, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array that a sparse tensor of any layout stands for.

    Args:
        sparsity: the layout, as a file has it.
        values: what is kept, in the order of the file.
        shape: of the array.

    Raises:
        ValueError: the layout does not fit the shape or the values.
    """
    order = [int(axis) for axis in sparsity.traversalOrder]
    blocked = [] if sparsity.blockMap is None else [int(axis) for axis in sparsity.blockMap]
    if sorted(order) != list(range(len(shape) + len(blocked))) or len(sparsity.dimMetadata) != len(order):
        raise ValueError(f"a sparse tensor of shape {shape} has the traversal order {order}")
    positions, places = np.zeros(1, np.int64), {}
    for axis, level in zip(order, sparsity.dimMetadata, strict=True):
        if level.format == schema.DimensionType.DENSE:
            if not 0 < level.denseSize <= prod(shape) // max(1, len(positions)):
                raise ValueError(f"a sparse tensor of shape {shape} has a dimension of size {level.denseSize}")
            parents = np.repeat(np.arange(len(positions)), level.denseSize)
            here = np.tile(np.arange(level.denseSize), len(positions))
            positions = positions[parents] * level.denseSize + here
        else:
            segments, indices = (
                np.asarray(each.values, np.int64) for each in (level.arraySegments, level.arrayIndices)
            )
            begins, counts = segments[positions], np.diff(segments)[positions]
            if counts.min(initial=0) < 0 or counts.sum() > len(indices):
                raise ValueError(f"a sparse tensor of shape {shape} has segments beyond its indices")
            parents = np.repeat(np.arange(len(positions)), counts)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            positions = begins[parents] + within
            here = indices[positions]
        places = {known: coordinates[parents] for known, coordinates in places.items()} | {axis: here}
    sizes = {axis: level.denseSize for axis, level in zip(order, sparsity.dimMetadata, strict=True)}
    coordinates = [places[axis] for axis in range(len(shape))]
    for i, axis in enumerate(blocked):
        block = len(shape) + i
        coordinates[axis] = coordinates[axis] * sizes[block] + places[block]
    if len(values) < len(positions):
        raise ValueError(f"a sparse tensor of shape {shape} keeps {len(positions)} values and has {len(values)}")
    array = np.zeros(shape, values.dtype)
    array[tuple(coordinates)] = values[positions]
    return array


def _blocks_of(array: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield `(axis, size, which blocks hold something)` for each way to cut an array into blocks."""
    kept = array != 0  # -0.0, as of a zero folded with a negative factor, is none either
    yield array.ndim - 1, 1, kept
    for axis, length in enumerate(array.shape):
        for size in _BLOCKS:
            if length % size == 0:
                shape = (*array.shape[:axis], length // size, size, *array.shape[axis + 1 :])
                yield axis, size, kept.reshape(shape).any(axis=axis + 1)


def _encode(array: np.ndarray, sparse: int, axis: int, size: int, kept: np.ndarray) -> SparseArray:
    order = [each for each in range(array.ndim) if each != sparse] + [sparse]
    lines = kept.transpose(order).reshape(-1, kept.shape[sparse])
    rows, indices = np.nonzero(lines)
    segments = np.searchsorted(rows, np.arange(len(lines) + 1))
    cut = array.reshape(*array.shape[:axis], array.shape[axis] // size, size, *array.shape[axis + 1 :])
    blocks = np.moveaxis(cut, axis + 1, -1).transpose(*order, array.ndim)
    values = blocks.reshape(len(lines), kept.shape[sparse], size)[rows, indices]
    if size > 1:
        order.append(array.ndim)
    return SparseArray(array.shape, tuple(order), sparse, (axis, size), segments, indices, values.reshape(-1))


def _weights_of(file: TfliteFile, graph: schema.SubGraphT) -> list[int]:
    """Return the constants that only operators read which take a computed weight as well, in order."""
    fits = dict.fromkeys((int(i) for i in graph.outputs), False)
    for operator in graph.operators or []:
        inputs = [int(i) for i in operator.inputs]
        for place, index in enumerate(inputs):
            fits[index] = fits.get(index, True) and _takes_computed(file, graph, operator, place)
    holders = Counter(tensor.buffer for each in file.graphs for tensor in each.tensors)
    return sorted(
        index
        for index, fit in fits.items()
        if fit and holders[graph.tensors[index].buffer] == 1 and file.constant(graph, index) is not None
    )


def _takes_computed(file: TfliteFile, graph: schema.SubGraphT, operator: schema.OperatorT, place: int) -> bool:
    index = int(operator.inputs[place])
    if index < 0:
        return False
    kind = graph.tensors[index].type
    data, weight = _READERS.get((file.code(operator), kind), (None, -1))
    return weight == place and (data is None or graph.tensors[int(operator.inputs[data])].type == kind)


def _store(file: TfliteFile, graph: schema.SubGraphT, index: int, sparse: SparseArray) -> int:
    """Add the sparse tensor from which tensor `index` is to be computed, and return it."""
    tensor = graph.tensors[index]
    stored = file.add_tensor(graph, tensor.name, tensor.type, quantization=tensor.quantization, values=sparse.values)
    graph.tensors[stored].shape = list(sparse.shape)
    graph.tensors[stored].sparsity = _parameters(sparse)
    tensor.buffer = 0
    return stored


def _parameters(sparse: SparseArray) -> schema.SparsityParametersT:
    parameters = schema.SparsityParametersT()
    axis, size = sparse.block
    parameters.traversalOrder = list(sparse.order)
    parameters.blockMap = [axis] if size > 1 else None
    parameters.dimMetadata = []
    for each in sparse.order:
        level = schema.DimensionMetadataT()
        if each == sparse.sparse:
            level.format = schema.DimensionType.SPARSE_CSR
            level.arraySegmentsType, level.arraySegments = _indices(sparse.segments)
            level.arrayIndicesType, level.arrayIndices = _indices(sparse.indices)
        else:
            level.format = schema.DimensionType.DENSE
            level.denseSize = size if each == len(sparse.shape) else sparse.shape[each] // (size if each == axis else 1)
        parameters.dimMetadata.append(level)
    return parameters


def _indices(values: np.ndarray) -> tuple[int, Any]:
    """Return a vector of the narrowest type that holds `values`, and the number of that type."""
    width = _width(int(values.max(initial=0)))
    dtype, number, kind = next(each for each in _INDEX_TYPES if np.dtype(each[0]).itemsize == width)
    vector = kind()
    vector.values = values.astype(dtype)
    return number, vector


def _width(largest: int) -> int:
    """Return the bytes of an index that reaches `largest`."""
    return 1 if largest < 2**8 else 2 if largest < 2**16 else 4
