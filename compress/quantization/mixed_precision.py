"""Mixed precision: how many bits the weights of each layer get, so that the model keeps to a budget.

Each layer's weights are put on each grid in turn while the rest stays float, and the outputs are compared; widths are
then chosen by `assign_bits` (HAWQ-V3, Yao et al. 2021, arXiv:2011.10680), which takes the losses to add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import keras
import numpy as np

from compress.errors import UsageError
from compress.models.call_macs import count_call_macs
from compress.models.graph import trace_graph
from compress.models.output_loss import OutputLoss, replaced_weights
from compress.quantization.assignment import assign_bits
from compress.quantization.assignment import bit_operations as count_bit_operations
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.layers import QuantizedLayer
from compress.quantization.model_sensitivity import float_twin, sample_split
from compress.quantization.scale_search import round_weight, search_scale
from compress.quantization.schemes import SchemeName, find_scheme
from compress.quantization.sensitivity import bit_sensitivity
from compress.quantization.weight_format import WeightFormat

Method = Literal["ilp", "greedy"]

_SCALE_BYTES = 4
_FLOAT_BITS = 32
_STANDARD_BITS = 8  # what shares of size and bit operations are shares of


@dataclass(frozen=True)
class WidthTable:
    """What each width of each layer's weights costs; all tables are `{layer path: {bits: number}}`.

    Args:
        loss: how far the outputs move, as of `OutputLoss`.
        size_bytes: weights and their scales.
        bit_operations: multiply-accumulates times bits of weights and activations; `None` for a layer whose
            multiply-accumulates are not known.
        sizes_at_8_bits: bytes of each layer with 8 bits.
    """

    loss: Mapping[str, Mapping[int, float]]
    size_bytes: Mapping[str, Mapping[int, int]]
    bit_operations: Mapping[str, Mapping[int, int] | None]
    sizes_at_8_bits: Mapping[str, int]

    def assign(
        self,
        *,
        size: float | int | None = None,
        bit_operations: float | None = None,
        max_loss: float | None = None,
        method: Method = "ilp",
    ) -> dict[str, int]:
        """Return the bits of each layer, by its path, under one budget.

        Args:
            size: largest size of weights and scales: bytes where above 1, else a share of their size at 8 bits.
            bit_operations: largest bit operations, as a share of those at 8 bits.
            max_loss: largest sum of losses; the smallest model that keeps to it.
            method: `"ilp"` is exact, `"greedy"` needs no solver.

        Raises:
            UsageError: not exactly one budget, one that cannot be kept, or multiply-accumulates that are not known.
        """
        budgets = {"size": size, "bit_operations": bit_operations, "max_loss": max_loss}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) != 1:
            raise UsageError(f"expected one budget: size, bit_operations or max_loss. Received: {given or 'none'}")
        ((name, limit),) = given.items()
        if not (limit > 0 or name == "max_loss") or not math.isfinite(limit):
            raise UsageError(f"expected a positive {name}. Received: {name}={limit}")
        if max_loss is not None:
            return assign_bits(self.loss, self.size_bytes, max_loss=max_loss, method=method)
        if bit_operations is not None:
            return assign_bits(self.loss, self._known_operations(), budget=self._operations(limit), method=method)
        budget = limit * sum(self.sizes_at_8_bits.values()) if limit <= 1 else limit
        return assign_bits(self.loss, self.size_bytes, budget=budget, method=method)

    def total_bytes(self, bits: Mapping[str, int]) -> int:
        """Return the bytes of weights and scales at the given widths."""
        return sum(self.size_bytes[path][width] for path, width in bits.items())

    def _known_operations(self) -> dict[str, Mapping[int, int]]:
        if unknown := [path for path, table in self.bit_operations.items() if table is None]:
            raise UsageError(
                f"expected layers whose multiply-accumulates are known. Received: {unknown[0]!r} without",
                "Give the model inputs of known shape, or a budget of size.",
            )
        return {path: table for path, table in self.bit_operations.items() if table is not None}

    def _operations(self, share: float) -> float:
        tables = self._known_operations().values()
        return share * sum(next(count * _STANDARD_BITS / width for width, count in table.items()) for table in tables)


def assign_bit_widths(
    model: keras.Model,
    data: Any,
    *,
    size: float | int | None = None,
    bit_operations: float | None = None,
    max_loss: float | None = None,
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    method: Method = "ilp",
    **options: Any,
) -> dict[str, int]:
    """Return `{layer path: bits}` under one budget, what `fake_quantize(bits=...)` takes.

    Args:
        model: a trained float model; it is not changed.
        data: inputs as `fit` takes them, a `tf.data.Dataset`, or a `compress.Split`; labels are not used.
        size, bit_operations, max_loss, method: as for `WidthTable.assign`.
        bits: the widths to choose from, 2 to 8.
        options: as for `measure_widths`.

    Raises:
        UsageError: the budget cannot be kept, or an option is out of range.
        DataError: there are no samples, or outputs are not finite.
    """
    table = measure_widths(model, data, bits=bits, **options)
    return table.assign(size=size, bit_operations=bit_operations, max_loss=max_loss, method=method)


def measure_widths(
    model: keras.Model,
    data: Any,
    *,
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    scheme: SchemeName = "int8",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    granularity: Literal["per_channel", "per_tensor"] = "per_channel",
    group_size: int | None = None,
    equalised: bool = False,
    samples: int = 256,
    seed: int = 0,
) -> WidthTable:
    """Return what each width costs each layer with quantized weights.

    Args:
        model: a trained float model; it is not changed.
        data: inputs as `fit` takes them, a `tf.data.Dataset`, or a `compress.Split`; labels are not used.
        bits: the widths to try, 2 to 8.
        scheme, include, exclude, granularity, group_size, equalised: as for `fake_quantize`.
        samples: how many are used; arrays are sampled at random, streams give their first ones.
        seed: chooses the samples.

    Raises:
        UsageError: an option is out of range, or no layer has weights to quantize.
        DataError: there are no samples, or outputs are not finite.
    """
    if not bits:
        raise UsageError("expected widths to choose from. Received: bits=()")
    options = {"include": include, "exclude": exclude, "granularity": granularity, "group_size": group_size}
    quantized = fake_quantize(model, scheme, bits=_STANDARD_BITS, equalised=equalised, **options)
    graph = trace_graph(quantized)
    wrappers = [node.operation for node in graph.nodes if isinstance(node.operation, QuantizedLayer)]
    layers = {layer.path_in_model: layer for layer in wrappers}
    if not layers:
        raise UsageError("expected layers with weights to quantize. Received: none", "Look at include and exclude.")
    loss = OutputLoss(float_twin(graph), sample_split(data, samples, seed), samples)

    def measure(path: str, width: int) -> float:
        formats = _formats(layers[path], width)
        variables = [layers[path].weight_variable(name) for name in formats]
        values = [_on_grid(variable, each) for variable, each in zip(variables, formats.values(), strict=True)]
        with replaced_weights(variables, values):
            return loss.measure()

    def size(path: str, width: int) -> int:
        formats = _formats(layers[path], width).items()
        return sum(stored_bytes(layers[path].weight_variable(name).shape, each) for name, each in formats)

    def operations(path: str) -> dict[int, int] | None:
        counts = [count_call_macs(call, layers[path].layer) for call in graph.calls(layers[path])]
        if None in counts:
            return None
        activation_bits = find_scheme(scheme).activation_bits or _FLOAT_BITS
        return {width: count_bit_operations(sum(counts), width, activation_bits) for width in bits}

    return WidthTable(
        bit_sensitivity(list(layers), bits, measure),
        {path: {width: size(path, width) for width in bits} for path in layers},
        {path: operations(path) for path in layers},
        {path: size(path, _STANDARD_BITS) for path in layers},
    )


def stored_bytes(shape: Sequence[int], each: WeightFormat, *, container: bool = False) -> int:
    """Return the bytes of a weight and its scales.

    Args:
        shape: of the weight.
        each: its format.
        container: values below 8 bits take 8, as in runtimes without a type of so few bits.
    """
    bits = max(each.bits, 8) if container else each.bits
    return -(-math.prod(shape) * bits // 8) + _SCALE_BYTES * count_scales(shape, each)


def count_scales(shape: Sequence[int], each: WeightFormat) -> int:
    """Return how many scales a weight has."""
    if each.dtype != "int":
        return 0
    counts = {axis % len(shape): shape[axis] for axis in each.channel_axes}
    if each.axis is not None:
        counts[each.axis % len(shape)] = -(-shape[each.axis] // each.group_size)
    return math.prod(counts.values())


def _formats(layer: QuantizedLayer, bits: int) -> dict[str, WeightFormat]:
    return {name: replace(each, bits=bits) for name, each in layer.formats.items()}


def _on_grid(variable: keras.Variable, each: WeightFormat) -> np.ndarray:
    """Return the weight as post-training quantization rounds it: with few bits, its scales are searched."""
    kernel = np.asarray(keras.ops.convert_to_numpy(variable), "float32")
    return round_weight(kernel, each, search_scale(kernel, each))
