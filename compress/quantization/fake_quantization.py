"""From a float model to its fake-quantized twin: the one representation of quantized models.

The twin computes in float what the exported file computes in integers. It is an ordinary functional model:
it can be trained, saved, and opened with `compress.load_model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import keras
import numpy as np

from compress.errors import UsageError
from compress.models.expansion import expand
from compress.models.graph import (
    Graph,
    Node,
    copy_graph,
    is_functional,
    name_outputs_as,
    new_input,
    replay,
    unique_name,
)
from compress.models.patterns import matches, require_matches
from compress.models.subclassed import make_functional
from compress.quantization.clustered import ClusteredKernels, share_integers
from compress.quantization.deployment import is_fake_quantized
from compress.quantization.equalisation import equalise_graph
from compress.quantization.folding import fold_graph
from compress.quantization.layers import FakeQuant, QuantizedLayer, Ranges, weight_names
from compress.quantization.planning import QuantizerPlan, plan_activations
from compress.quantization.rules import kind_of, why_float
from compress.quantization.schemes import Scheme, SchemeName, find_scheme
from compress.quantization.weight_formats import weight_formats


def fake_quantize(
    model: keras.Model,
    scheme: SchemeName = "int8",
    *,
    bits: int | Mapping[str, int] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    granularity: Literal["per_channel", "per_tensor"] = "per_channel",
    group_size: int | None = None,
    ranges: Ranges = "moving",
    equalised: bool = False,
) -> keras.Model:
    """Return a fake-quantized copy of `model`; `model` is not changed.

    Batch normalization is folded, and layers are opened where runtimes quantize inside them. The ranges of
    activations are not known before `calibrate`, or training with `ranges="moving"`, has seen data.

    Args:
        model: a trained float model: functional, sequential, or a subclassed one that can be traced.
        scheme: what is quantized to how many bits.
        bits: bits of weights, 2 to 8, for all layers or by pattern over layer paths; `None` leaves it to the scheme.
        include: shell patterns over layer paths; only these layers compute quantized.
        exclude: shell patterns; these layers stay float.
        granularity: whether each output channel has a scale of its own, or one serves the whole weight.
        group_size: weights along the input axis of dense layers that share a scale, for weight-only schemes;
            `None` leaves it to the scheme.
        ranges: how training changes the ranges of activations; `learned` also learns the scales of weights (LSQ).
        equalised: balance the channels of neighbouring layers first, which helps per-tensor weights.

    Raises:
        UsageError: a pattern matches nothing, nothing is left to quantize, or the model is fake-quantized.
        ModelError: the model's calls cannot be traced.
    """
    chosen = find_scheme(scheme)
    if is_fake_quantized(model):
        raise UsageError(f"expected a float model. Received: model {model.name!r}, which is fake-quantized already")
    clustered = ClusteredKernels(model)
    graph = prepare_graph(model, equalised=equalised, clustered=clustered)
    quantized = _Builder(graph, clustered, chosen, bits, include, exclude, granularity, group_size, ranges).build()
    if not is_fake_quantized(quantized):
        raise _nothing_left(graph, scheme, _select(graph, include, exclude))
    return name_outputs_as(quantized, model)


def prepare_graph(model: keras.Model, *, equalised: bool = False, clustered: ClusteredKernels | None = None) -> Graph:
    """Return the graph of an exact float copy of `model` whose tensors are those that runtimes quantize.

    Clustered kernels get no factors along their inputs.
    """
    functional = model if is_functional(model) else make_functional(model)
    keeps = (clustered or ClusteredKernels(model)).knows
    graph = fold_graph(expand(copy_graph(functional)), keeps=keeps).graph
    return equalise_graph(graph, keeps=keeps).graph if equalised else graph


def _nothing_left(graph: Graph, scheme: SchemeName, chosen: set[int]) -> UsageError:
    """Return the error that says of each layer why it is not quantized."""
    found = {}
    for node in graph.nodes:
        if id(node.operation) not in chosen:
            found[node.path] = "left out by include or exclude"
        elif kind_of(node) == "float":
            found[node.path] = why_float(node.operation)
        elif kind_of(node) not in ("same", "join"):
            found[node.path] = "has no weights"
    listed = "; ".join(f"{path}: {reason}" for path, reason in list(found.items())[:10])
    more = f"; and {len(found) - 10} more" if len(found) > 10 else ""
    return UsageError(
        f"expected a layer that {scheme} can quantize. Received: model {graph.name!r} "
        f"({listed or 'no layer computes anything'}{more})",
        "Choose other layers with include and exclude, or another scheme.",
    )


class _Builder:
    def __init__(
        self,
        graph: Graph,
        clustered: ClusteredKernels,
        scheme: Scheme,
        bits: int | Mapping[str, int] | None,
        include: Sequence[str],
        exclude: Sequence[str],
        granularity: str,
        group_size: int | None,
        ranges: Ranges,
    ):
        self._graph, self._scheme, self._ranges = graph, scheme, ranges
        self._names = {node.operation.name for node in graph.nodes} | {
            tensor.name for tensor in keras.tree.flatten(graph.inputs)
        }
        self._chosen = _select(graph, include, exclude)
        self._formats = weight_formats(
            [node for node in graph.nodes if id(node.operation) in self._chosen],
            scheme,
            bits,
            granularity=granularity,
            group_size=group_size,
            learned=ranges == "learned",
        )
        self._shared = self._share_scales(clustered)

    def build(self) -> keras.Model:
        """Return the fake-quantized model."""
        quantizers = self._quantizers()
        operations = self._operations()

        def quantize(old: Any, new: Any) -> Any:
            return keras.tree.map_structure(
                lambda before, after: quantizers[id(before)](after) if id(before) in quantizers else after, old, new
            )

        def call(node: Node, *args: Any, **kwargs: Any) -> Any:
            if self._scheme.compute == "dynamic" and id(node.operation) in self._formats and kind_of(node) == "kernel":
                args = (self._dynamic(node)(args[0]), *args[1:])
            return quantize(node.outputs, operations.get(id(node.operation), node.operation)(*args, **kwargs))

        inputs = keras.tree.map_structure(new_input, self._graph.inputs)
        outputs = replay(self._graph, quantize(self._graph.inputs, inputs), call)
        return keras.Model(inputs, outputs, name=self._graph.name)

    def _quantizers(self) -> dict[int, FakeQuant]:
        """Return the quantizer that stands behind a tensor, by the tensor's `id`."""
        if self._scheme.compute != "integer":
            return {}
        left_float = {id(node.operation) for node in self._graph.nodes if id(node.operation) not in self._chosen}
        return {
            id(tensor): quantizer
            for plan in plan_activations(self._graph, left_float)
            for quantizer in [self._quantizer(plan)]
            for tensor in plan.places
        }

    def _quantizer(self, plan: QuantizerPlan) -> FakeQuant:
        bits = self._scheme.activation_bits
        producer = self._graph.producer(plan.places[0])
        name = producer.operation.name if producer else plan.places[0].name
        options = {"bits": bits, "symmetric": bits == 16, "name": unique_name(f"{name}_quantizer", self._names)}
        if plan.fixed and bits == 8:
            return FakeQuant(fixed_range=plan.fixed, **options)
        return FakeQuant(ranges=self._ranges, **options)

    def _operations(self) -> dict[int, keras.Operation]:
        """Return what takes the place of an operation, by the operation's `id`: wrappers around layers with weights."""
        wrappers = {
            id(node.operation): QuantizedLayer(node.operation, self._formats[id(node.operation)], path=node.path)
            for node in self._graph.nodes
            if id(node.operation) in self._formats
        }
        for (key, name), scale in self._shared.items():
            share_integers(wrappers[key], name, scale)
        return wrappers

    def _share_scales(self, clustered: ClusteredKernels) -> dict[tuple[int, str], np.ndarray]:
        """Return scales that are not derived from the weights, and note so in the formats of these."""
        shared: dict[tuple[int, str], np.ndarray] = {}
        if not clustered.any_shared:  # reading each kernel of a large model costs memory
            return shared
        layers = {id(node.operation): node.operation for node in self._graph.nodes}
        for key, formats in self._formats.items():
            for name, form in formats.items():
                kernel = np.asarray(keras.ops.convert_to_numpy(weight_names(layers[key])[name]), "float32")
                scale = clustered.shared_scale(kernel, form)
                if scale is not None:
                    shared[key, name], formats[name] = scale, replace(form, scale="stored")
        return shared

    def _dynamic(self, node: Node) -> FakeQuant:
        name = unique_name(f"{node.operation.name}_input_quantizer", self._names)
        return FakeQuant(dynamic=True, shared_axes=_dynamic_axes(node), name=name)


def _dynamic_axes(node: Node) -> tuple[int, ...]:
    """Return the axes along which LiteRT's kernels share a range that they find at run time.

    It is one for each row of what they compute as a matrix product, dense layers and convolutions of 1x1, and one for
    each sample of other convolutions. ONNX Runtime has one for the whole batch: the same for a sample at a time, but
    for matrix products with several rows in a sample.
    """
    layer, rank = node.operation, len(node.inputs[0].shape)
    if isinstance(layer, keras.layers.Dense):
        return (rank - 1,)
    channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    is_product = isinstance(layer, (keras.layers.Conv1D, keras.layers.Conv2D)) and channels_last
    if is_product and layer.groups == 1 and {*layer.kernel_size, *layer.strides} == {1}:
        return (rank - 1,)
    return tuple(range(1, rank))


def _select(graph: Graph, include: Sequence[str], exclude: Sequence[str]) -> set[int]:
    """Return the `id` of each operation that the patterns choose; a pattern for a block stands for all in it."""
    paths = [node.path for node in graph.nodes]
    require_matches(paths, include, "include")
    require_matches(paths, exclude, "exclude")
    return {
        id(node.operation) for node in graph.nodes if matches(node.path, include) and not matches(node.path, exclude)
    }
