"""What a fake-quantized model quantizes, layer by layer, read from the model itself: `QuantizationSummary`."""

from __future__ import annotations

from typing import Literal

import keras
import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.errors import UsageError
from compress.models.call_macs import count_call_macs
from compress.models.graph import Graph, Node, trace_graph
from compress.models.masks import SetMask
from compress.quantization.deployment import compute_of, is_fake_quantized
from compress.quantization.layers import FakeQuant, QuantizedLayer
from compress.quantization.mixed_precision import count_scales, stored_bytes
from compress.quantization.rules import kind_of, why_float
from compress.quantization.stored import Compute


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class QuantizedWeight(_Record):
    """One weight that is stored in fewer bits."""

    name: str
    """Name of the weight in its layer, such as `kernel`."""
    shape: tuple[int, ...]
    dtype: Literal["int", "float16", "bfloat16"]
    bits: int
    granularity: str
    """Which weights share a scale: `per channel`, `per tensor`, `groups of 32`, or `none` for float types."""
    scales: int
    """How many scales there are."""
    size_bytes: int
    """Of values at their bits, and scales."""
    container_bytes: int
    """The same with values below 8 bits in 8, as runtimes without a type of so few bits store them."""


class QuantizedActivation(_Record):
    """The integer grid behind a tensor."""

    bits: int
    minimum: float | None
    """Least real value on the grid; `None` where it is not known: the range is found at run time, or not yet."""
    maximum: float | None
    scale: float | None
    zero_point: int | None


class LayerQuantization(_Record):
    """What becomes of one layer or operation."""

    layer: str
    """Path in the model, such as `encoder/conv1`."""
    kind: str
    """Class, such as `Conv2D`."""
    compute: Literal["integer", "dynamic", "float"]
    """How it computes: in integers, in integers with activations quantized at run time, or in float."""
    reason: str | None
    """Why it computes in float."""
    macs: int | None
    """Multiply-accumulates of all calls for one sample, or `None` if unknown."""
    weights: tuple[QuantizedWeight, ...]
    output: QuantizedActivation | None
    """The grid of its output, or `None` where it has none of its own."""


class QuantizationSummary(_Record):
    """What a fake-quantized model quantizes."""

    model: str
    compute: Compute
    """Of the files: in integers, with activations quantized at run time, or in float from stored weights."""
    inputs: dict[str, QuantizedActivation | None]
    """The grid of each input, by name."""
    layers: tuple[LayerQuantization, ...]
    """In the order of execution; activations that are fused and quantizers are not listed."""
    size_bytes: int
    """Of all quantized weights at their bits, with scales."""
    container_bytes: int
    """The same with values below 8 bits in 8."""
    float_bytes: int
    """Of the same weights as float32."""
    integer_mac_share: float | None
    """Share of multiply-accumulates in integers among layers with a known number of them; `None` without any."""

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table with one row per layer."""
        header = [
            "layer",
            "type",
            "computes in",
            "bits",
            "scales",
            "bytes",
            "output scale",
            "output range",
            "why float",
        ]
        return header, [_row(layer) for layer in self.layers]

    def sentences(self) -> list[str]:
        """Return the totals in words."""
        lines = [
            f"{self.size_bytes:,} bytes of quantized weights and scales, {self.container_bytes:,} in a runtime without "
            f"types below 8 bits, {self.float_bytes:,} as float32"
        ]
        if self.integer_mac_share is not None:
            lines.append(f"{self.integer_mac_share:.1%} of multiply-accumulates in integers")
        return lines

    def __str__(self) -> str:
        header, rows = self.rows()
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        table = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in [header, *rows]
        ]
        return "\n".join([*table, *self.sentences()])


def describe_quantization(model: keras.Model) -> QuantizationSummary:
    """Return what a fake-quantized model quantizes, layer by layer, and what stays float and why.

    Args:
        model: what `fake_quantize` returned, calibrated or not, also after training, saving and loading.

    Raises:
        UsageError: the model is not fake-quantized.
    """
    if not is_fake_quantized(model):
        raise UsageError(
            f"expected a fake-quantized model. Received: model {model.name!r}", "Call compress.fake_quantize first."
        )
    describer = _Describer(trace_graph(model), compute_of(model))
    layers = describer.layers()
    weights = [weight for layer in layers for weight in layer.weights]
    counted = [layer for layer in layers if layer.macs]
    total = sum(layer.macs for layer in counted)
    return QuantizationSummary(
        model=model.name,
        compute=compute_of(model),
        inputs=describer.inputs(),
        layers=layers,
        size_bytes=sum(weight.size_bytes for weight in weights),
        container_bytes=sum(weight.container_bytes for weight in weights),
        float_bytes=sum(4 * int(np.prod(weight.shape)) for weight in weights),
        integer_mac_share=sum(each.macs for each in counted if each.compute != "float") / total if total else None,
    )


class _Describer:
    def __init__(self, graph: Graph, compute: Compute):
        self._graph, self._compute = graph, compute

    def inputs(self) -> dict[str, QuantizedActivation | None]:
        return {tensor.name: self._grid_behind(tensor) for tensor in keras.tree.flatten(self._graph.inputs)}

    def layers(self) -> tuple[LayerQuantization, ...]:
        first = {id(node.operation): node for node in reversed(self._graph.nodes)}
        nodes = [node for node in self._graph.nodes if first[id(node.operation)] is node]
        return tuple(self._describe(node) for node in nodes if not isinstance(node.operation, (FakeQuant, SetMask)))

    def _describe(self, node: Node) -> LayerQuantization:
        operation = node.operation
        wrapped = isinstance(operation, QuantizedLayer)
        inner = operation.layer if wrapped else operation
        reasons = [self._reason_for_float(call) for call in self._graph.calls(operation)]
        reason = next((each for each in reasons if each), None)
        compute = "float" if reason else "dynamic" if self._compute == "dynamic" else "integer"
        counts = [count_call_macs(call, inner) for call in self._graph.calls(operation)]
        return LayerQuantization(
            layer=operation.path_in_model if wrapped else node.path,
            kind=type(inner).__name__,
            compute=compute,
            reason=reason,
            macs=None if None in counts else sum(counts),
            weights=tuple(_weight(operation, name) for name in operation.formats) if wrapped else (),
            output=self._grid_behind(node.output),
        )

    def _reason_for_float(self, node: Node) -> str | None:
        operation, kind = node.operation, kind_of(node)
        wrapped = isinstance(operation, QuantizedLayer)
        if self._compute == "weights":
            return "the scheme quantizes weights alone" if wrapped else "the scheme computes in float"
        if kind == "float":
            return why_float(operation.layer if wrapped else operation)
        if self._compute == "dynamic":
            if wrapped and kind == "kernel" and _is_dynamic(self._graph.producer(node.inputs[0])):
                return None
            return "the scheme quantizes only what layers with weights read"
        if kind in ("kernel", "table") and not wrapped:
            return "left out by include or exclude, or back in float"
        if self._is_fused(node):
            return self._reason_for_float(self._graph.producer(node.inputs[0]))
        if all(self._is_quantized(tensor) for tensor in (*_floats(node.inputs), self._written(node))):
            return None
        if kind in ("same", "join", "average"):
            return "between operations in float"
        return "left out by include or exclude, or between operations in float"

    def _written(self, node: Node) -> keras.KerasTensor:
        """Return what the kernel of a call writes: the output of a ReLU that is fused into it."""
        reader = self._graph.only_consumer(node.output)
        return reader.output if reader is not None and self._is_fused(reader) else node.output

    def _is_fused(self, node: Node) -> bool:
        """Return whether a call is a ReLU inside the kernel before it, whose own output never exists."""
        producer = self._graph.producer(node.inputs[0]) if node.inputs else None
        if kind_of(node) != "relu" or producer is None or kind_of(producer) not in ("kernel", "value"):
            return False
        return self._graph.only_consumer(producer.output) is node

    def _is_quantized(self, tensor: keras.KerasTensor) -> bool:
        """Return whether a tensor is one of integers: quantized here, where it comes from, or where it is read."""
        if self._quantizer_behind(tensor) is not None:
            return True
        node = self._graph.producer(tensor)
        if node is None:
            return False
        if isinstance(node.operation, FakeQuant):
            return True
        if kind_of(node) == "table" and isinstance(node.operation, QuantizedLayer):
            return True
        if kind_of(node) in ("same", "join"):
            return all(self._is_quantized(each) for each in _floats(node.inputs))
        return False

    def _quantizer_behind(self, tensor: keras.KerasTensor) -> FakeQuant | None:
        readers = [node.operation for node in self._graph.consumers(tensor)]
        return next((each for each in readers if isinstance(each, FakeQuant) and not each.dynamic), None)

    def _grid_behind(self, tensor: keras.KerasTensor) -> QuantizedActivation | None:
        quantizer = self._quantizer_behind(tensor)
        if quantizer is None:
            return None
        if not quantizer.is_calibrated:
            return QuantizedActivation(bits=quantizer.bits, minimum=None, maximum=None, scale=None, zero_point=None)
        (low, high), (scale, zero_point) = quantizer.current_range(), quantizer.scale_and_zero_point()
        return QuantizedActivation(bits=quantizer.bits, minimum=low, maximum=high, scale=scale, zero_point=zero_point)


def _weight(layer: QuantizedLayer, name: str) -> QuantizedWeight:
    each, shape = layer.formats[name], tuple(layer.weight_variable(name).shape)
    granularity = "per channel" if each.channel_axes else "per tensor"
    if each.group_size:
        granularity = f"groups of {each.group_size}"
    return QuantizedWeight(
        name=name,
        shape=shape,
        dtype=each.dtype,
        bits=each.bits,
        granularity=granularity if each.dtype == "int" else "none",
        scales=count_scales(shape, each),
        size_bytes=stored_bytes(shape, each),
        container_bytes=stored_bytes(shape, each, container=True),
    )


def _is_dynamic(node: Node | None) -> bool:
    return node is not None and isinstance(node.operation, FakeQuant) and node.operation.dynamic


def _floats(tensors: list[keras.KerasTensor]) -> list[keras.KerasTensor]:
    return [tensor for tensor in tensors if "float" in keras.backend.standardize_dtype(tensor.dtype)]


def _row(layer: LayerQuantization) -> list[str]:
    grid = layer.output
    known = grid is not None and grid.scale is not None
    return [
        layer.layer,
        layer.kind,
        layer.compute,
        ", ".join(dict.fromkeys(str(weight.bits) for weight in layer.weights)) or "-",
        ", ".join(dict.fromkeys(weight.granularity for weight in layer.weights)) or "-",
        f"{sum(weight.size_bytes for weight in layer.weights):,}" if layer.weights else "-",
        f"{grid.scale:.4g}" if known else "not calibrated" if grid else "-",
        f"{grid.minimum:.4g} to {grid.maximum:.4g}" if known else "-",
        layer.reason or "-",
    ]
