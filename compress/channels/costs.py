"""What a narrower model costs, known before it is built: every weight gets shorter along its axes, and work with it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import keras
import numpy as np

from compress.channels.groups import ChannelGroups
from compress.models.graph import Node
from compress.models.layer_table import KERNEL_NAMES

Cost = Literal["parameters", "macs"]

_CONVOLUTIONS = (
    "Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D",
)  # fmt: skip
_TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
_DENSE = ("Dense", "EinsumDense", "MultiHeadAttention")
_RECURRENT = ("LSTM", "GRU", "SimpleRNN", "Bidirectional")


class CostModel:
    """The parameters, or the multiply-accumulates of kernels for one sample, that are left without some units.

    Args:
        groups: of the model.
        cost: `"parameters"`, or `"macs"`: each kernel weight counts as often as it is used. Products of two
            activations, as in attention, are not counted.
    """

    def __init__(self, groups: ChannelGroups, cost: Cost):
        self._groups = groups
        weights: dict[int, keras.Variable] = {}
        uses: dict[int, int] = {}
        for node in groups.graph.nodes:
            for variable in node.operation.weights if isinstance(node.operation, keras.Layer) else ():
                weights[id(variable)] = variable
                if cost == "parameters":
                    uses[id(variable)] = 1
                elif variable.name in KERNEL_NAMES and len(variable.shape) > 1:
                    uses[id(variable)] = uses.get(id(variable), 0) + _uses(node)
        self._shapes = {key: tuple(variable.shape) for key, variable in weights.items()}
        self._uses = uses
        self._axes: dict[int, list[tuple[int, np.ndarray]]] = {}
        for weight in groups.atoms.weights:
            units = groups.atoms.units(weight.atoms)
            self._axes.setdefault(id(weight.variable), []).append((weight.axis, units))

    def measure(self, removed: Collection[int]) -> int:
        """Return the cost of the model without these units."""
        gone = np.array(sorted(removed), np.int64)
        total = 0
        for key, shape in self._shapes.items():
            lengths = list(shape)
            for axis, units in self._axes.get(key, ()):
                lengths[axis] = int(np.count_nonzero(~np.isin(units, gone)))
            total += self._uses.get(key, 0) * math.prod(lengths)
        return total


def _uses(node: Node) -> int:
    """Return how often each weight of a kernel is used for one sample."""
    shape = node.inputs[0].shape if node.kind in _TRANSPOSED else node.output.shape
    if node.kind in (*_CONVOLUTIONS, *_TRANSPOSED):
        first = getattr(node.operation, "data_format", "channels_last") == "channels_first"
        places = shape[2:] if first else shape[1:-1]
    elif node.kind in _DENSE:
        places = shape[1:-1]
    elif node.kind in _RECURRENT:
        places = node.inputs[0].shape[1:-1]
    else:
        return 0
    return math.prod(1 if size is None else size for size in places)
