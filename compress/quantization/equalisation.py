"""Cross-layer equalisation: channels of neighbouring layers get weights of like size; the model computes the same.

A channel's weights are divided by a factor and the weights that read it are multiplied by it, so that one scale for
a whole kernel, or for a whole activation, wastes less on small channels. Source: Nagel et al. 2019, arXiv:1906.04721.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import keras
import numpy as np

from compress.models.graph import Graph, Node
from compress.quantization.affine import (
    Channels,
    channel_axis,
    input_channels,
    is_affine,
    is_linear,
    output_channels,
    scale_inputs,
    scale_outputs,
    with_activation,
)
from compress.quantization.channel_factors import Keeps, breaks_clusters
from compress.quantization.channel_flow import ChannelTensor, follow, passes_positive, substitute

Relu6 = Literal["keep", "replace"]

_RECTIFIERS = (keras.activations.relu, keras.activations.leaky_relu)


@dataclass(frozen=True)
class Equalised:
    """A graph with equalised weights.

    Args:
        graph: the new graph; layers that did not change are shared with the old one.
        pairs: paths of the layers that share channels, in order.
        replaced: paths of the layers whose ReLU6 became ReLU.
        sweeps: how often all pairs were gone through.
        largest: the largest factor (or inverse factor) of a channel.
    """

    graph: Graph
    pairs: tuple[tuple[str, str], ...]
    replaced: tuple[str, ...]
    sweeps: int
    largest: float


def equalise_graph(
    graph: Graph,
    *,
    relu6: Relu6 = "keep",
    sweeps: int = 100,
    tolerance: float = 1e-3,
    keeps: Keeps | None = None,
) -> Equalised:
    """Return `graph` with weights equalised between each pair of layers that only a ReLU or a linear call joins.

    Each factor is `sqrt(r1 * r2) / r2` for the largest weights r1 before and r2 behind a channel. Channels without
    weights on either side keep the factor 1, and no bias grows beyond the largest of its layer, so that a channel of
    next to no weights cannot widen the range of all activations. Fold batch norm first: one in between ends a pair.

    Args:
        graph: the graph; neither it nor its layers are changed.
        relu6: `"keep"`: a ReLU6 ends a pair, since it cuts all channels at 6; `"replace"`: it becomes a ReLU, which
            changes what the model computes where activations exceed 6.
        sweeps: the most times that all pairs are gone through; long chains take many.
        tolerance: enough when no factor of a sweep differs from 1 by more.
        keeps: `keeps(kernel, output axes)` says whether a kernel must get no factors along its inputs.
    """
    chain = _Chain(graph, relu6 == "replace", keeps or (lambda kernel, axes: False))
    done = chain.balance(sweeps, tolerance)
    pairs = tuple((pair.first.path, pair.second.path) for pair in chain.pairs)
    largest = max((float(np.exp(np.abs(np.log(pair.factor)).max())) for pair in chain.pairs), default=1.0)
    return Equalised(substitute(graph, chain.layers(), set()), pairs, tuple(chain.replaced), done, largest)


@dataclass(eq=False)
class _Pair:
    """Two layers that share channels; the first one's are divided by `factor`, the second one's multiplied by it."""

    first: Node
    second: Node
    made: Channels
    read: Channels
    axis: int
    factor: np.ndarray
    floor: np.ndarray  # below it, a bias would become the largest of the layer


class _Chain:
    """The pairs of a graph and the largest weights of their layers."""

    def __init__(self, graph: Graph, replace: bool, keeps: Keeps):
        self._graph, self._replace, self._keeps = graph, replace, keeps
        self._rectifiers: dict[int, keras.Operation] = {}  # with ReLU, by the id of what has ReLU6
        self.replaced: list[str] = []
        self.pairs = [pair for node in graph.nodes if (pair := self._pair(node)) is not None]
        self._makes = {id(pair.first.operation): pair for pair in self.pairs}
        self._reads = {id(pair.second.operation): pair for pair in self.pairs}
        self._largest: dict[int, np.ndarray] = {}

    def balance(self, sweeps: int, tolerance: float) -> int:
        """Find the factors; return the number of sweeps."""
        for pair in self.pairs:
            for node in (pair.first, pair.second):
                self._reduce_kernel(node)
        for sweep in range(sweeps if self.pairs else 0):
            change = 0.0
            for pair in self.pairs:
                before = self._ranges(pair.first, pair.made)
                behind = self._ranges(pair.second, pair.read)
                # Ranges of numbers so small that their product is not a number count as none.
                alive = (before > 1e-30) & (behind > 1e-30)
                step = np.ones_like(before)
                step[alive] = np.sqrt(before[alive] / behind[alive])
                factor = np.maximum(pair.factor * step, pair.floor)
                change = max(change, float(np.abs(np.log(factor / pair.factor)).max()))
                pair.factor = factor
            if change <= tolerance:
                return sweep + 1
        return sweeps if self.pairs else 0

    def layers(self) -> dict[int, keras.Operation]:
        """Return the new operation for the `id` of each old one."""
        found = dict(self._rectifiers)
        for pair in self.pairs:
            first, second = pair.first, pair.second
            layer = found.get(id(first.operation), first.operation)
            rank, shape = len(first.output.shape), first.inputs[0].shape
            found[id(first.operation)] = scale_outputs(shape, layer, pair.made, rank, pair.axis, 1 / pair.factor)
            layer = found.get(id(second.operation), second.operation)
            found[id(second.operation)] = scale_inputs(second.inputs[0].shape, layer, pair.read, pair.factor)
        return found

    def _pair(self, first: Node) -> _Pair | None:
        """Return the pair that starts with `first`, or `None`."""
        layer, rank = first.operation, len(first.output.shape)
        if not is_affine(layer) or len(self._graph.calls(layer)) > 1:
            return None
        limited = [first] if layer.activation is keras.activations.relu6 else []
        if not (is_linear(layer) or layer.activation in _RECTIFIERS or (limited and self._replace)):
            return None
        axis = channel_axis(layer, rank)
        axis = rank - 1 if axis is None else axis
        made = output_channels(layer, rank, axis)
        if made is None:
            return None

        def passes(node: Node) -> bool:
            if self._replace and _is_relu6(node) and len(self._graph.calls(node.operation)) == 1:
                limited.append(node)
                return True
            return passes_positive(node)

        end = follow(self._graph, ChannelTensor(first.output, axis, made.count), passes)
        if end is None or not is_affine(end[0].operation) or len(self._graph.calls(end[0].operation)) > 1:
            return None
        second, tensor = end
        read = input_channels(second.operation, tensor.rank, tensor.axis, tensor.count)
        if read is None or breaks_clusters(second.operation, read, self._keeps):
            return None
        for node in limited:
            self._rectifiers[id(node.operation)] = _without_limit(node)
            self.replaced.append(node.path)
        return _Pair(first, second, made, read, axis, np.ones(made.count), _floor(layer, made.count, axis, rank))

    def _reduce_kernel(self, node: Node) -> None:
        """Keep the largest weights of a kernel over the axes that tell no channels apart."""
        views = [view for view in (self._made(node), self._read(node)) if view is not None]
        kernel = np.abs(keras.ops.convert_to_numpy(node.operation.weights[views[0][0].kernel])).astype("float32")
        axes = [axis for axis in range(kernel.ndim) if all(channels.ids.shape[axis] == 1 for channels, _ in views)]
        self._largest[id(node.operation)] = kernel.max(axis=tuple(axes), keepdims=True)

    def _ranges(self, node: Node, channels: Channels) -> np.ndarray:
        """Return the largest weight of each channel of a layer, with the factors found so far."""
        weights = self._largest[id(node.operation)]
        for view in (self._made(node), self._read(node)):
            if view is not None:
                weights = weights * view[1][view[0].ids]
        return channels.reduce(weights, np.maximum)

    def _made(self, node: Node) -> tuple[Channels, np.ndarray] | None:
        pair = self._makes.get(id(node.operation))
        return None if pair is None else (pair.made, 1 / pair.factor)

    def _read(self, node: Node) -> tuple[Channels, np.ndarray] | None:
        pair = self._reads.get(id(node.operation))
        return None if pair is None else (pair.read, pair.factor)


def _floor(layer: keras.Layer, count: int, axis: int, rank: int) -> np.ndarray:
    """Return the share that each channel's bias has in the largest bias of a layer; 0 without a bias."""
    if layer.bias is None:
        return np.zeros(count)
    bias = np.abs(np.asarray(keras.ops.convert_to_numpy(layer.bias), "float64"))
    if bias.ndim > 1:  # of an EinsumDense: it ends where the output ends
        bias = np.moveaxis(bias, axis - rank, -1).reshape(-1, bias.shape[axis - rank]).max(axis=0)
    return np.broadcast_to(bias, count) / max(float(bias.max()), 1e-30)


def _is_relu6(node: Node) -> bool:
    operation = node.operation
    if type(operation) is keras.layers.ReLU:
        return operation.max_value is not None and operation.threshold == 0
    return type(operation) is keras.layers.Activation and operation.activation is keras.activations.relu6


def _without_limit(node: Node) -> keras.Operation:
    """Return the operation of `node` with ReLU where it has ReLU6."""
    operation = node.operation
    if is_affine(operation):
        return with_activation(node.inputs[0].shape, operation, keras.activations.relu)
    slope = getattr(operation, "negative_slope", 0.0)
    return keras.layers.ReLU(negative_slope=slope, dtype=operation.dtype_policy, name=operation.name)
