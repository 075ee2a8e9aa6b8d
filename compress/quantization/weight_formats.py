"""Which weights of which layers are quantized, to how many bits, and which of them share a scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import keras

from compress.errors import UsageError
from compress.models.graph import Node
from compress.models.layer_table import KERNEL_NAMES, LAYERS
from compress.models.patterns import matches, require_matches
from compress.quantization.layers import weight_names
from compress.quantization.rules import channel_axes, input_axis
from compress.quantization.schemes import Scheme
from compress.quantization.weight_format import WeightFormat


def weight_formats(
    nodes: Iterable[Node],
    scheme: Scheme,
    bits: int | Mapping[str, int] | None = None,
    *,
    granularity: str = "per_channel",
    group_size: int | None = None,
    learned: bool = False,
) -> dict[int, dict[str, WeightFormat]]:
    """Return the formats of the weights of each layer, by the `id` of the layer and the name of the weight.

    Args:
        nodes: calls of layers that may be quantized.
        scheme: what is quantized to how many bits.
        bits: bits for all layers, or by pattern over layer paths; the last pattern that fits counts.
        granularity: `"per_channel"` or `"per_tensor"`.
        group_size: weights along the input axis that share a scale; only where the scheme computes in float.
        learned: scales are trained.

    Raises:
        UsageError: bits that no scheme has, or a pattern that fits no layer with weights.
    """
    layers = {id(node.operation): node for node in nodes if list(_kernels(node.operation))}
    if isinstance(bits, Mapping):
        require_matches([node.path for node in layers.values()], tuple(bits), "bits")
    if bits is not None and scheme.dtype != "int":
        raise UsageError(f"expected no bits for a scheme that stores {scheme.dtype}. Received: bits={bits}")
    size = group_size or scheme.group_size
    if group_size and scheme.compute != "weights":
        raise UsageError(
            f"expected no groups where the runtime computes with integers. Received: group_size={group_size}",
            "Use the scheme int8_weights or int4_weights.",
        )
    return {
        key: {
            name: _format(owner, variable, scheme, _bits(node.path, bits, scheme), granularity, size, learned)
            for name, owner, variable in _kernels(node.operation)
        }
        for key, node in layers.items()
    }


def _format(
    owner: keras.Layer,
    variable: keras.Variable,
    scheme: Scheme,
    bits: int,
    granularity: str,
    group_size: int | None,
    learned: bool,
) -> WeightFormat:
    if scheme.dtype != "int":
        return WeightFormat(16, dtype=scheme.dtype)
    rank, table = len(variable.shape), isinstance(owner, keras.layers.Embedding)
    axes = (0,) if table else channel_axes(owner, variable.name, rank)
    if granularity == "per_tensor" or (table and scheme.activation_bits):
        axes = ()  # rows that an integer kernel looks up have one scale
    axis = input_axis(owner, variable.name, rank) if group_size else None
    grouped = axis is not None and granularity == "per_channel"
    source = "learned" if learned else "absmax"
    return WeightFormat(bits, axes, group_size if grouped else None, axis if grouped else None, scale=source)


def _bits(path: str, bits: int | Mapping[str, int] | None, scheme: Scheme) -> int:
    if not isinstance(bits, Mapping):
        return bits or scheme.weight_bits
    fitting = [value for pattern, value in bits.items() if matches(path, (pattern,))]
    return fitting[-1] if fitting else scheme.weight_bits


def _kernels(operation: keras.Operation) -> Iterator[tuple[str, keras.Layer, keras.Variable]]:
    """Yield `(name, layer that owns it, variable)` of the weights of a layer of Keras that compression may change."""
    if not isinstance(operation, keras.Layer) or not type(operation).__module__.startswith("keras."):
        return
    if type(operation).__name__ not in LAYERS:
        return
    for name, variable in weight_names(operation).items():
        is_float = "float" in keras.backend.standardize_dtype(variable.dtype)
        if variable.name in KERNEL_NAMES and len(variable.shape) >= 2 and is_float:
            yield name, _owner(operation, variable), variable


def _owner(layer: keras.Layer, variable: keras.Variable) -> keras.Layer:
    for child in vars(layer).values():
        if isinstance(child, keras.Layer) and any(each is variable for each in child.weights):
            return _owner(child, variable)
    return layer
