"""What a narrower model costs, known before it is built: every weight gets shorter along its axes, and work with it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import keras
import numpy as np
from scipy import optimize

from compress.channels.groups import ChannelGroups
from compress.models.graph import Node
from compress.models.layer_table import KERNEL_NAMES
from compress.targets.files import FileCost

Cost = Literal["parameters", "macs"]

_CONVOLUTIONS = (
    "Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D",
)  # fmt: skip
_TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
_DENSE = ("Dense", "EinsumDense", "MultiHeadAttention", "GroupedQueryAttention", "TimeDistributed")
_RECURRENT = ("LSTM", "GRU", "SimpleRNN", "Bidirectional", "RNN")


@dataclass(frozen=True, eq=False)
class _Term:
    """A product of lengths, some of which get shorter, that counts so often.

    Args:
        uses: how often it counts.
        shape: the lengths.
        axes: of the lengths that get shorter, which one, and the units along it.
    """

    uses: int
    shape: tuple[int, ...]
    axes: tuple[tuple[int, np.ndarray], ...]


class CostModel:
    """The parameters, or the multiply-accumulates of kernels for one sample, that are left without some units.

    Args:
        groups: of the model.
        cost: `"parameters"`, or `"macs"`: each kernel weight counts as often as it is used. Products of two
            activations, as in attention, are not counted. `"depthwise"` are the MACs of depthwise convolutions alone,
            and `"elements"` the numbers that layers with kernels return.
    """

    def __init__(self, groups: ChannelGroups, cost: Cost | Literal["depthwise", "elements"]):
        axes: dict[int, list[tuple[int, np.ndarray]]] = {}
        outputs: dict[int, tuple[int, np.ndarray]] = {}
        for weight in groups.atoms.weights:
            own = weight.axis, groups.atoms.units(weight.atoms)
            axes.setdefault(id(weight.variable), []).append(own)
            if weight.role != "reads":
                outputs[id(weight.variable)] = own
        weights: dict[int, keras.Variable] = {}
        uses: dict[int, int] = {}
        for node in groups.graph.nodes:
            for variable in node.operation.weights if isinstance(node.operation, keras.Layer) else ():
                key = id(variable)
                weights[key] = variable
                if cost == "parameters":
                    uses[key] = 1
                elif _is_counted(node, variable, cost):
                    uses[key] = uses.get(key, 0) + _uses(node)
        self._terms = []
        for key, count in uses.items():
            shape = tuple(weights[key].shape)
            if cost != "elements":
                self._terms.append(_Term(count, shape, tuple(axes.get(key, ()))))
            elif key in outputs:
                axis, units = outputs[key]
                others = shape[-1] if axis == len(shape) - 2 and len(shape) == 4 else 1  # of a depthwise kernel
                self._terms.append(_Term(count * others, (shape[axis],), ((0, units),)))
            else:
                self._terms.append(_Term(count, (shape[-1],), ()))

    def measure(self, removed: Collection[int]) -> float:
        """Return the cost of the model without these units."""
        gone = np.array(sorted(removed), np.int64)
        total = 0
        for term in self._terms:
            lengths = list(term.shape)
            for axis, units in term.axes:
                lengths[axis] = int(np.count_nonzero(~np.isin(units, gone)))
            total += term.uses * math.prod(lengths)
        return total


class FileCostModel:
    """The cost of an exported file as a share of the whole model's, learnt from files that were measured.

    Every kernel, and with it every group, has a cost of its own: so much for each multiply-accumulate, with another
    rate in depthwise layers, so much for each number that a layer returns (or, for bytes, for each parameter), and an
    amount that no channel changes. The rates are fitted to the files, none below zero (Lawson and Hanson 1974).

    Args:
        groups: of the model.
        cost: `"bytes"` or `"latency"`.
    """

    def __init__(self, groups: ChannelGroups, cost: FileCost):
        names = ("parameters",) if cost == "bytes" else ("macs", "depthwise", "elements")
        models = [CostModel(groups, name) for name in names]
        self._parts = [(each, each.measure(())) for each in models if each.measure(()) > 0]
        self._rates = np.ones(len(self._parts) + 1) / (len(self._parts) + 1)
        self._correction = 1.0

    def fit(self, files: Sequence[tuple[Collection[int], float]]) -> None:
        """Learn from the units that were removed and the share that was measured; the last file is met exactly."""
        features = np.array([self._features(removed) for removed, _ in files])
        shares = np.array([share for _, share in files])
        self._rates, _ = optimize.nnls(features / shares[:, None], np.ones(len(shares)))  # errors are relative
        predicted = float(features[-1] @ self._rates)
        self._correction = float(shares[-1]) / predicted if predicted > 0 else 1.0

    def measure(self, removed: Collection[int]) -> float:
        """Return the share that is left without these units; without any it is 1, as the target is a share of it."""
        return float(self._features(removed) @ self._rates) * self._correction if removed else 1.0

    def _features(self, removed: Collection[int]) -> np.ndarray:
        return np.array([*(model.measure(removed) / whole for model, whole in self._parts), 1.0])


def _is_counted(node: Node, variable: keras.Variable, cost: str) -> bool:
    kernel = variable.name in KERNEL_NAMES and len(variable.shape) > 1
    return kernel and (cost != "depthwise" or node.kind.startswith("Depthwise"))


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
