"""Which layers can be factorised, with which ranks, and what that costs; nothing is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np

from compress.low_rank.decompositions import Method, Spectrum, spectrum_of
from compress.models.call_macs import count_call_macs
from compress.models.graph import Graph, Node, is_of_keras

Cost = Literal["parameters", "macs"]

_KINDS = ("Dense", "Conv1D", "Conv2D", "Conv3D")


@dataclass(frozen=True)
class Choice:
    """How one layer is factorised.

    Args:
        method: which method.
        ranks: one, or two for Tucker-2.
        parameters: of its kernels, afterwards.
        macs: of all its calls, afterwards.
    """

    method: Method
    ranks: tuple[int, ...]
    parameters: int
    macs: int


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer that can be factorised.

    Args:
        path: path of the layer.
        layer: the layer.
        kernel: its kernel, `(*size, inputs, outputs)`.
        places: over how many places of the output it runs, in all its calls.
        spectra: one for each method.
    """

    path: str
    layer: keras.Layer
    kernel: np.ndarray
    places: int
    spectra: tuple[Spectrum, ...]

    @property
    def parameters(self) -> int:
        """Of the kernel."""
        return self.kernel.size

    @property
    def macs(self) -> int:
        """Of all calls."""
        return self.kernel.size * self.places

    def choose(self, energy: float, multiple_of: int, cost: Cost) -> Choice | None:
        """Return the cheapest way that keeps so much energy, or `None` where none is cheaper than the layer."""
        return self._cheapest([(each, each.ranks(energy)) for each in self.spectra], multiple_of, cost)

    def choose_rank(self, rank: int | float, multiple_of: int, cost: Cost) -> Choice | None:
        """Return the cheapest way with this rank, or this share of the full one."""
        ways = []
        for each in self.spectra:
            ranks = (max(1, round(rank * full)) if isinstance(rank, float) else min(rank, full) for full in each.full)
            ways.append((each, tuple(ranks)))
        return self._cheapest(ways, multiple_of, cost)

    def _cheapest(self, ways: Sequence[tuple[Spectrum, tuple[int, ...]]], multiple: int, cost: Cost) -> Choice | None:
        choices = []
        for spectrum, ranks in ways:
            rounded = tuple(
                min(full, math.ceil(rank / multiple) * multiple) if full >= multiple else rank
                for rank, full in zip(ranks, spectrum.full, strict=True)
            )
            choices.append(self._price(spectrum.method, rounded))
        paying = [each for each in choices if getattr(each, cost) < getattr(self, cost)]
        return min(paying, key=lambda each: getattr(each, cost), default=None)

    def _price(self, method: Method, ranks: tuple[int, ...]) -> Choice:
        *size, inputs, outputs = self.kernel.shape
        area = math.prod(size)
        strides = _pair(getattr(self.layer, "strides", ()), len(size))
        if method == "svd":
            parts = [(area * inputs * ranks[0], 1), (ranks[0] * outputs, 1)]
        elif method == "spatial":  # the first layer goes along the width step by step
            parts = [(size[0] * inputs * ranks[0], strides[1]), (size[1] * ranks[0] * outputs, 1)]
        else:
            parts = [(inputs * ranks[0], math.prod(strides)), (area * ranks[0] * ranks[1], 1), (ranks[1] * outputs, 1)]
        macs = sum(weights * times for weights, times in parts) * self.places
        return Choice(method, ranks, sum(weights for weights, _ in parts), macs)


def find_candidates(graph: Graph, methods: Sequence[Method]) -> tuple[list[Candidate], dict[str, str]]:
    """Return the layers that can be factorised, and by path of each other layer with a kernel why not."""
    found: list[Candidate] = []
    skipped: dict[str, str] = {}
    calls: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.kind in _KINDS or getattr(node.operation, "kernel", None) is not None:
            calls.setdefault(id(node.operation), []).append(node)
    for nodes in calls.values():
        node, layer = nodes[0], nodes[0].operation
        reason = _why_not(layer)
        if reason:
            skipped[node.path] = reason
            continue
        kernel = keras.ops.convert_to_numpy(layer.kernel).astype("float32")
        spectra = tuple(each for each in (spectrum_of(kernel, method) for method in methods) if each is not None)
        places = sum(_places(each) for each in nodes)
        if spectra:
            found.append(Candidate(node.path, layer, kernel, places, spectra))
        else:
            skipped[node.path] = f"{' and '.join(methods)} cannot divide a kernel of size {kernel.shape}"
    return found, skipped


def whole_costs(graph: Graph) -> dict[Cost, int]:
    """Return the parameters of a graph's layers, and the known multiply-accumulates of its calls."""
    layers = {id(node.operation): node.operation for node in graph.nodes if isinstance(node.operation, keras.Layer)}
    variables = {id(variable): variable for layer in layers.values() for variable in layer.weights}
    return {
        "parameters": sum(math.prod(variable.shape) for variable in variables.values()),
        "macs": sum(count_call_macs(node) or 0 for node in graph.nodes),
    }


def cost_of(plan: Mapping[str, Choice], candidates: Sequence[Candidate], whole: Mapping[Cost, int], cost: Cost) -> int:
    """Return the cost of the model when layers are factorised as planned."""
    saved = sum(getattr(each, cost) - getattr(plan[each.path], cost) for each in candidates if each.path in plan)
    return whole[cost] - saved


def _why_not(layer: Any) -> str:
    if type(layer).__name__ not in _KINDS or not is_of_keras(type(layer)):
        return f"{type(layer).__name__} is not factorised"
    if getattr(layer, "groups", 1) > 1:
        return "has groups"
    if getattr(layer, "lora_enabled", False):
        return "has LoRA weights"
    return ""


def _places(node: Node) -> int:
    shape = node.output.shape
    first = getattr(node.operation, "data_format", "channels_last") == "channels_first" and node.kind != "Dense"
    return math.prod(size or 1 for size in (shape[2:] if first else shape[1:-1]))


def _pair(value: Any, count: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) and value else (1,) * count
