"""Stored weights in ONNX graphs: each is found among the constants by what it holds, and kept in few bits.

Converters transpose, reshape and merge weights and forget their names, so content is what can be trusted. Once a
weight is found, the constant is replaced by integers and operators that give back the very same floats.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx

from compress.deploy.onnx_graph import OnnxGraph, attribute
from compress.errors import ExportError
from compress.quantization.stored import StoredWeight

_RTOL = 2e-6
_PROBES = 64
_LSTM_GATES = (0, 3, 1, 2)  # Keras keeps input, forget, cell, output; ONNX input, output, forget, cell
_RECURRENT = ("LSTM", "GRU", "RNN")
_BIAS_PLACES = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "LSTM": 3, "GRU": 3, "RNN": 3}


@dataclass(frozen=True)
class Layout:
    """How a constant of a graph comes out of a Keras variable: gates in another order, then axes, then shape."""

    gates: tuple[int, ...] | None
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return an array of the variable's shape as it lies in the graph."""
        if self.gates:
            split = values.reshape(*values.shape[:-1], len(self.gates), -1)
            values = split[..., self.gates, :].reshape(values.shape)
        return values.transpose(self.axes).reshape(self.shape)


@dataclass(frozen=True)
class Placed:
    """A stored weight in the graph.

    Args:
        weight: the weight.
        scale: one scale, or one for each index of `axis`; `None` where no DequantizeLinear makes the floats.
        axis: axis of the constant that the scales belong to, or `None`.
        integers: name of the constant that holds the integers.
    """

    weight: StoredWeight
    scale: np.ndarray | None
    axis: int | None
    integers: str


def place_tables(graph: OnnxGraph, placed: dict[str, Placed]) -> None:
    """Let look-ups in stored tables take integers, so that only what is looked up is dequantized."""
    for name, held in placed.items():
        maker = graph.maker(name)
        if maker is None or maker.op_type != "DequantizeLinear" or held.scale is None:
            continue
        rank = len(graph.constants[held.integers].dims)
        for node in graph.readers(name):
            along = attribute(node, "axis", 0) % rank
            if node.op_type != "Gather" or node.input[0] != name or held.axis == along:
                continue
            options = {} if held.axis is None else {"axis": held.axis - rank if held.axis > along else held.axis}
            graph.set_input(node, 0, held.integers)
            floats = graph.add("DequantizeLinear", [node.output[0], *maker.input[1:]], name=maker.name, **options)
            output = node.output[0]
            if output in graph.outputs:
                source = graph.rename_output(output)
                graph.set_input(graph.maker(floats), 0, source)
                graph.move_readers(source, floats, but=graph.maker(floats))
                graph.expose(floats, output)
            else:
                graph.move_readers(output, floats, but=graph.maker(floats))


def needs_new_opset(stored: Sequence[StoredWeight], compute: str) -> bool:
    """Return whether weights are stored in 4-bit integers, which ONNX has from opset 21 on."""
    return compute == "weights" and any(weight.dtype == "int" and weight.bits <= 4 for weight in stored)


def store_weights(
    graph: OnnxGraph,
    stored: Sequence[StoredWeight],
    *,
    unsigned: bool,
    packed: bool,
    is_folded: Callable[[str], bool],
) -> dict[str, Placed]:
    """Replace each float constant that holds a stored weight, and return float tensor -> what it holds.

    Args:
        graph: the graph.
        stored: the weights that the model was deployed with.
        unsigned: whether 8-bit integers are stored as uint8 around 128, which saturates nowhere, or as int8.
        packed: whether folded weights of 4 bits and fewer are stored in 4 bits each.
        is_folded: whether a weight that an operator reads is stored as a product, which runtimes turn into floats once
            when they open the file, or with a DequantizeLinear, which they keep for integer kernels.

    Raises:
        ExportError: a weight is not in the graph, or the integers do not give back its floats.
    """
    finder = _Finder(stored)
    placed: dict[str, Placed] = {}
    for name in list(graph.constants):
        tensor = graph.constants[name]
        readers = graph.readers(name)
        if tensor.data_type != onnx.TensorProto.FLOAT or not tensor.dims or not readers:
            continue
        values = graph.value(name)
        recurrent = any(node.op_type in _RECURRENT for node in readers)
        if all(_reads_as_bias(node, name) for node in readers) and not finder.has_vectors:
            continue
        parts = np.split(values, 2) if recurrent and values.shape[0] == 2 and values.ndim == 3 else [values]
        found = [finder.find(part, recurrent) for part in parts]
        if any(pair is None for pair in found):
            continue
        folded = any(is_folded(node.op_type) for node in readers)
        options = {"unsigned": unsigned, "packed": packed, "folded": folded}
        pairs = zip(parts, found, strict=True)
        made = [_store(graph, weight, layout, part, **options) for part, (weight, layout) in pairs]
        outputs = [output for output, _ in made]
        layer = found[0][0].layer
        output = outputs[0] if len(outputs) == 1 else graph.add("Concat", outputs, name=f"{layer}/Concat", axis=0)
        graph.move_readers(name, output)
        for node in readers:
            node.name = f"{layer}/{node.op_type}"  # merged operators have lost their layer's name
        if len(made) == 1:
            placed[output] = made[0][1]
    finder.check_complete()
    return placed


def _reads_as_bias(node: onnx.NodeProto, name: str) -> bool:
    place = _BIAS_PLACES.get(node.op_type)
    return place is not None and [i for i, read in enumerate(node.input) if read == name] == [place]


class _Finder:
    """Stored weights by size and sum, so that few are compared with a constant."""

    def __init__(self, weights: Sequence[StoredWeight]):
        self._weights = list(weights)
        self._missing = {id(weight): weight for weight in weights}
        self._by_size: dict[int, list[tuple[float, StoredWeight]]] = {}
        self.has_vectors = any(max(weight.values.shape, default=1) == weight.values.size for weight in weights)
        for weight in weights:
            entry = (_checksum(weight.dequantize()), weight)
            self._by_size.setdefault(weight.values.size, []).append(entry)

    def find(self, values: np.ndarray, recurrent: bool) -> tuple[StoredWeight, Layout] | None:
        """Return the weight that a constant holds and its layout; equal weights all count as found."""
        first = None
        total = None
        for checksum, weight in self._by_size.get(values.size, ()):
            total = _checksum(values) if total is None else total
            if abs(checksum - total) > 1e-5 * max(abs(checksum), 1e-30):
                continue
            layout = find_layout(weight.dequantize(), values, recurrent)
            if layout is not None:
                first = first or (weight, layout)
                self._missing.pop(id(weight), None)
        return first

    def check_complete(self) -> None:
        """Raise `ExportError` for the first weight that no constant held."""
        for weight in self._missing.values():
            raise ExportError(
                f"expected the quantized weight {weight.path!r} of layer {weight.layer!r} in the ONNX graph. Received: "
                f"a graph without it ({len(self._missing)} of {len(self._weights)} weights are missing)",
                f"Leave layer {weight.layer!r} out of the quantization.",
            )


def _checksum(values: np.ndarray) -> float:
    return float(np.abs(values).sum(dtype="float64"))


def find_layout(variable: np.ndarray, constant: np.ndarray, recurrent: bool = False) -> Layout | None:
    """Return how `constant` comes out of `variable`, or `None` when it holds other values."""
    orders = [None, _LSTM_GATES] if recurrent and variable.shape[-1] % len(_LSTM_GATES) == 0 else [None]
    for gates in orders:
        given = Layout(gates, tuple(range(variable.ndim)), variable.shape).apply(variable)
        for axes in _orders_of_axes(variable.shape):
            if _probe(given, axes, constant) and _close(given.transpose(axes).reshape(constant.shape), constant):
                return Layout(gates, axes, constant.shape)
    return None


def _orders_of_axes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield orders of axes; axes of size 1 stay in front, as it does not matter where they are."""
    small = [axis for axis, size in enumerate(shape) if size == 1]
    for order in itertools.permutations([axis for axis, size in enumerate(shape) if size != 1]):
        yield (*small, *order)


def _probe(variable: np.ndarray, axes: tuple[int, ...], constant: np.ndarray) -> bool:
    """Return whether some elements agree, which rules out most orders cheaply."""
    places = np.linspace(0, constant.size - 1, min(_PROBES, constant.size)).astype("int64")
    moved = variable.transpose(axes)
    return _close(moved[np.unravel_index(places, moved.shape)] if moved.ndim else moved, constant.reshape(-1)[places])


def _close(one: np.ndarray, two: np.ndarray) -> bool:
    return bool(np.allclose(one, two, rtol=_RTOL, atol=1e-30))


def _store(
    graph: OnnxGraph,
    weight: StoredWeight,
    layout: Layout,
    floats: np.ndarray,
    *,
    unsigned: bool,
    packed: bool,
    folded: bool,
) -> tuple[str, Placed]:
    """Add the constants and nodes that give back `floats`; return their output and what it holds."""
    values = layout.apply(weight.values)
    if weight.dtype != "int":
        return _store_floats(graph, weight, values, floats)
    full = layout.apply(np.broadcast_to(_spread_scale(weight), weight.values.shape))
    _check_floats(weight, values.astype("float32") * full, floats)
    packed = packed and weight.bits <= 4
    axes = [axis for axis in range(full.ndim) if _varies(full, axis)]
    if folded or len(axes) > 1:
        return _store_product(graph, weight, values.astype(ml_dtypes.int4 if packed else "int8"), full)
    axis = axes[0] if axes else None
    scale = full.reshape(-1)[0] if axis is None else np.moveaxis(full, axis, 0).reshape(full.shape[axis], -1)[:, 0]
    scale = np.array(scale, "float32")
    zero = 128 if unsigned else 0
    kind = "uint8" if unsigned else "int8"
    integers = graph.add_constant(np.ascontiguousarray(values.astype("int16") + zero).astype(kind))
    inputs = [integers, graph.add_constant(scale), graph.add_constant(np.full(scale.shape, zero, kind))]
    options = {} if axis is None else {"axis": axis}
    output = graph.add("DequantizeLinear", inputs, name=f"{weight.layer}/DequantizeLinear", **options)
    return output, Placed(weight, scale, axis, integers)


def _store_floats(graph: OnnxGraph, weight: StoredWeight, values: np.ndarray, floats: np.ndarray) -> tuple[str, Placed]:
    """Store a weight in half precision, with a Cast back."""
    stored = np.ascontiguousarray(values).astype("float16" if weight.dtype == "float16" else ml_dtypes.bfloat16)
    _check_floats(weight, stored.astype("float32"), floats)
    name = graph.add_constant(stored)
    output = graph.add("Cast", [name], name=f"{weight.layer}/Cast", to=onnx.TensorProto.FLOAT)
    return output, Placed(weight, None, None, name)


def _store_product(graph: OnnxGraph, weight: StoredWeight, values: np.ndarray, full: np.ndarray) -> tuple[str, Placed]:
    """Store a weight as integers times scales, which runtimes turn into floats once, when they open the file."""
    name = graph.add_constant(np.ascontiguousarray(values))
    floats = graph.add("Cast", [name], name=f"{weight.layer}/Cast", to=onnx.TensorProto.FLOAT)
    scale, blocks = full, _blocked_axis(full, weight.group_size)
    for axis in range(full.ndim):
        if not _varies(full, axis):
            scale = scale.take([0], axis)
    if blocks is not None:
        scale = scale.take(range(0, full.shape[blocks], weight.group_size), blocks)
    factor = graph.add_constant(np.ascontiguousarray(scale, "float32"))
    if blocks is not None:
        block_of = np.arange(full.shape[blocks], dtype="int32") // weight.group_size
        inputs = [factor, graph.add_constant(block_of)]
        factor = graph.add("Gather", inputs, name=f"{weight.layer}/Gather", axis=blocks)
    return graph.add("Mul", [floats, factor], name=f"{weight.layer}/Mul"), Placed(weight, None, None, name)


def _spread_scale(weight: StoredWeight) -> np.ndarray:
    """Return the scales so that they broadcast against the values, those of groups repeated."""
    return replace(weight, values=np.ones_like(weight.values)).dequantize()


def _varies(full: np.ndarray, axis: int) -> bool:
    first = full[(slice(None),) * axis + (slice(0, 1),)]
    return full.shape[axis] > 1 and not np.array_equal(np.broadcast_to(first, full.shape), full)


def _blocked_axis(full: np.ndarray, block: int | None) -> int | None:
    """Return the axis along which `block` neighbours share a scale, or `None`."""
    for axis in range(full.ndim) if block and block > 1 else ():
        starts = np.arange(full.shape[axis]) // block * block
        if _varies(full, axis) and np.array_equal(full.take(starts, axis), full):
            return axis
    return None


def _check_floats(weight: StoredWeight, stored: np.ndarray, floats: np.ndarray) -> None:
    if not _close(stored, floats):
        raise ExportError(
            f"the values stored for {weight.path!r} of layer {weight.layer!r} differ from its floats in the graph. "
            f"Received: up to {np.abs(stored - floats).max():g} apart"
        )
