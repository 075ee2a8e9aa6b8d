"""Batch norm moves into the layer before or after it; the model computes the same, up to rounding.

Integer runtimes have no batch norm, and biases can be quantized only where they are final (Jacob et al. 2018,
arXiv:1712.05877). A batch norm that fits nowhere becomes a 1x1 depthwise convolution, for which they have a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np

from compress.models.graph import Graph, Node, copy_graph, name_outputs_as, repeat, rewrite_graph
from compress.models.walking import Skipped
from compress.quantization.affine import (
    channel_axis,
    input_channels,
    is_affine,
    is_linear,
    output_channels,
    scale_inputs,
    scale_outputs,
    takes_offset,
)
from compress.quantization.channel_factors import Keeps, breaks_clusters
from compress.quantization.channel_flow import ChannelTensor, follow, passes_affine, substitute


@dataclass(frozen=True)
class Folded:
    """A graph without batch norm, as far as that is possible.

    Args:
        graph: the new graph; layers that did not change are shared with the old one.
        folded: path of each batch norm and of the layer that took it in.
        replaced: paths of those that became 1x1 depthwise convolutions, which keep their names.
        left: those that stay, with the reason.
    """

    graph: Graph
    folded: tuple[tuple[str, str], ...]
    replaced: tuple[str, ...]
    left: tuple[Skipped, ...]


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """Return a copy of `model` that predicts the same and has its batch norms in the layers beside them.

    A batch norm that fits nowhere stays. Layers and outputs keep their names, the name of an output before that of
    a layer; constraints of changed layers are left out, as they were meant for the weights before. The result is
    not compiled.

    Args:
        model: a built functional or sequential model; it is not changed. Nested models are opened.

    Raises:
        ModelError: the model cannot be copied or traced.
    """
    folded = rewrite_graph(fold_graph(copy_graph(model), replace=False).graph, repeat)
    return name_outputs_as(folded, model)


def fold_graph(graph: Graph, *, replace: bool = True, keeps: Keeps | None = None) -> Folded:
    """Return `graph` with batch norm folded, and what became of each.

    Args:
        graph: the graph; neither it nor its layers are changed.
        replace: whether one that fits nowhere becomes a depthwise convolution, for inputs of rank 3 and 4 with
            channels last.
        keeps: `keeps(kernel, output axes)` says whether a kernel must get no factors along its inputs.
    """
    folder = _Folder(graph, keeps or (lambda kernel, axes: False))
    folder.fold()
    if replace:
        folder.replace()
    return folder.result()


class _Folder:
    def __init__(self, graph: Graph, keeps: Keeps):
        self._graph, self._keeps = graph, keeps
        self._norms = [node for node in graph.nodes if type(node.operation) is keras.layers.BatchNormalization]
        self._layers: dict[int, keras.Operation] = {}  # new layer by the id of the old one
        self._into: dict[int, Node] = {}  # the call that took a batch norm in, by the id of the latter's call
        self._reasons: dict[int, str] = {}
        self._replaced: list[str] = []
        self._has_masks = any(
            isinstance(node.operation, keras.layers.Masking) or getattr(node.operation, "mask_zero", False)
            for node in graph.nodes
        )

    def fold(self) -> None:
        """Fold each batch norm backward, else forward; note why where neither is exact."""
        for norm in self._norms:
            if id(norm) in self._into:
                continue
            reason = _unfit(norm)
            if reason is None and (reason := self._fold_backward(norm)) is not None:
                reason = None if self._fold_forward(norm) else reason
            if reason is not None:
                self._reasons[id(norm)] = reason

    def replace(self) -> None:
        """Make depthwise convolutions of those that are left, where every call of the layer allows it."""
        for norm in self._norms:
            calls = [call for call in self._graph.calls(norm.operation) if id(call) not in self._into]
            if id(norm) in self._into or any(_unfit(call) or not self._fits_convolution(call) for call in calls):
                continue
            if id(norm.operation) not in self._layers:
                self._layers[id(norm.operation)] = _as_convolution(norm)
            del self._reasons[id(norm)]
            self._replaced.append(norm.path)

    def result(self) -> Folded:
        """Return the new graph and the report."""
        folded = [(norm.path, self._into[id(norm)].path) for norm in self._norms if id(norm) in self._into]
        left = [Skipped(norm.path, self._reasons[id(norm)]) for norm in self._norms if id(norm) in self._reasons]
        graph = substitute(self._graph, self._layers, set(self._into))
        return Folded(graph, tuple(folded), tuple(self._replaced), tuple(left))

    def _layer(self, node: Node) -> keras.Layer:
        return self._layers.get(id(node.operation), node.operation)

    def _fold_backward(self, norm: Node) -> str | None:
        """Fold into the layer before, or return why that is not possible."""
        source = self._source(norm)
        if source is None:
            return "reads an input of the model"
        if not is_affine(source.operation):
            return f"follows {source.operation.name} ({source.kind}), which has no kernel that could take it in"
        if not is_linear(source.operation):
            return f"follows the activation of {source.path}"
        if source.output.dtype != norm.output.dtype:
            return f"computes in {norm.output.dtype}, {source.path} in {source.output.dtype}"
        rank = len(source.output.shape)
        axis = channel_axis(source.operation, rank)
        axis = norm.operation.axis % rank if axis is None else axis
        channels = output_channels(self._layer(source), rank, axis)
        if channels is None:
            return f"normalizes axis {axis}, along which the kernel of {source.path} cannot be scaled"
        norms = [self._next_norm(call, axis, channels.count) for call in self._graph.calls(source.operation)]
        if any(each is None for each in norms):
            return f"channels of {source.path} are read elsewhere too, or not normalized one by one"
        if any(each.operation is not norm.operation for each in norms):
            return f"{source.path} is shared between several batch norms"
        scale, offset = _affine_of(norm.operation)
        self._layers[id(source.operation)] = scale_outputs(
            source.inputs[0].shape, self._layer(source), channels, rank, axis, scale, offset
        )
        self._into.update({id(each): source for each in norms})
        return None

    def _source(self, norm: Node) -> Node | None:
        """Return the call that made what `norm` reads, seen through calls that commute with it."""
        node = self._graph.producer(norm.inputs[0])
        while node is not None and not is_affine(node.operation) and self._passes(node) and len(node.inputs) == 1:
            node = self._graph.producer(node.inputs[0])
        return node

    def _passes(self, node: Node) -> bool:
        # A batch norm that is folded already is no longer there.
        return passes_affine(node) or id(node) in self._into

    def _next_norm(self, source: Node, axis: int, count: int) -> Node | None:
        """Return the batch norm that alone reads the channels of `source`."""
        end = follow(self._graph, ChannelTensor(source.output, axis, count), self._passes)
        if end is None or type(end[0].operation) is not keras.layers.BatchNormalization or _unfit(end[0]):
            return None
        norm, channels = end
        same = norm.operation.axis % channels.rank == channels.axis
        return norm if same and channels.tensor.shape[channels.axis] == count else None

    def _fold_forward(self, norm: Node) -> bool:
        """Fold into the layer behind, where that is exact; return whether it was."""
        rank = len(norm.output.shape)
        scale, offset = _affine_of(norm.operation)
        axis = norm.operation.axis % rank
        end = follow(self._graph, ChannelTensor(norm.output, axis, len(scale)), passes_affine)
        if end is None or norm.inputs[0].dtype != norm.output.dtype:
            return False
        node, read = end
        if not is_affine(node.operation) or len(self._graph.calls(node.operation)) > 1:
            return False
        layer = self._layer(node)
        channels = input_channels(layer, read.rank, read.axis, read.count)
        if channels is None or not (takes_offset(layer) or not offset.any()):
            return False
        if breaks_clusters(layer, channels, self._keeps):
            return False
        shift = offset if offset.any() else None
        self._layers[id(node.operation)] = scale_inputs(read.tensor.shape, layer, channels, scale, shift)
        self._into[id(norm)] = node
        return True

    def _fits_convolution(self, norm: Node) -> bool:
        shape = norm.inputs[0].shape
        # Depthwise convolutions drop the masks that batch norm hands on.
        return len(shape) in (3, 4) and norm.operation.axis % len(shape) == len(shape) - 1 and not self._has_masks


def _unfit(norm: Node) -> str | None:
    """Return why a batch norm is no fixed factor and offset for each channel."""
    layer = norm.operation
    if len(norm.args) > 1 or len(norm.inputs) != 1:
        return "is called with a mask or further arguments"
    if norm.kwargs.get("training") not in (None, False):
        return "is called with training=True"
    if not all(np.isfinite(values).all() for values in _affine_of(layer)):
        return "has weights that are not finite"
    return None


def _affine_of(norm: keras.layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """Return factor and offset of each channel, float64."""

    def read(variable: keras.Variable) -> np.ndarray:
        return np.asarray(keras.ops.convert_to_numpy(variable), "float64")

    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 1.0 / np.sqrt(read(norm.moving_variance) + norm.epsilon)
        if norm.scale:
            scale = scale * read(norm.gamma)
        offset = -read(norm.moving_mean) * scale
    return scale, offset + read(norm.beta) if norm.center else offset


def _as_convolution(norm: Node) -> keras.Layer:
    """Return a 1x1 depthwise convolution with the name of the batch norm that it stands for."""
    layer, shape = norm.operation, norm.inputs[0].shape
    scale, offset = _affine_of(layer)
    kind = keras.layers.DepthwiseConv2D if len(shape) == 4 else keras.layers.DepthwiseConv1D
    convolution = kind(1, data_format="channels_last", dtype=layer.dtype_policy, name=layer.name)
    convolution.build(shape)
    convolution.set_weights([scale.reshape(convolution.kernel.shape), offset])
    convolution.trainable = layer.trainable
    return convolution
