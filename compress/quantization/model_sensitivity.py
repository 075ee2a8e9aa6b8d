"""Which layers of a model suffer from quantization: each is quantized alone, and the outputs are compared.

One float twin is traced once for all layers: a measurement puts a layer's weights on their grid in place and turns
on the quantizers of the activations that its kernel reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras

from compress.data.split import Split, as_split
from compress.errors import DataError, ModelError
from compress.models.copying import copy_model
from compress.models.graph import Graph, Node, rewrite_graph, trace_graph
from compress.models.output_loss import OutputLoss, replaced_weights
from compress.quantization.calibration import calibrate
from compress.quantization.deployment import is_fake_quantized
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.layers import FakeQuant, QuantizedLayer
from compress.quantization.planning import read_or_written_in_integers
from compress.quantization.rules import kind_of
from compress.quantization.schemes import SchemeName
from compress.quantization.sensitivity import LayerSensitivity, layer_sensitivity


def measure_sensitivity(
    model: keras.Model,
    data: Any,
    *,
    scheme: SchemeName = "int8",
    samples: int = 256,
    seed: int = 0,
) -> list[LayerSensitivity]:
    """Return what the quantization of each layer alone does to the outputs, most sensitive first.

    A layer stands for its weights and for the activations that its kernel reads and writes; everything else is float.
    Losses are those of `OutputLoss`: Kullback-Leibler divergence (nats) for probabilities, else mean squared error
    in units of the output's variance.

    Args:
        model: a float model, or a calibrated fake-quantized one, which keeps its formats and ranges. It is not changed.
        data: inputs as `fit` takes them, a `tf.data.Dataset`, or a `compress.Split`; labels are not used.
        scheme: how a float model is quantized.
        samples: how many are used, for calibration too; arrays are sampled at random, streams give their first ones.
        seed: chooses the samples.

    Raises:
        DataError: there are no samples, or outputs are not finite.
        ModelError: the fake-quantized model is not calibrated.
    """
    split = sample_split(data, samples, seed)
    if is_fake_quantized(model):
        quantized = copy_model(model)
    else:
        quantized = calibrate(fake_quantize(model, scheme, ranges="frozen"), split, samples=samples, seed=seed)
    probe = _Probe(trace_graph(quantized))
    loss = OutputLoss(probe.model, split, samples)

    def measure(layers: frozenset[str]) -> float:
        (path,) = layers
        with probe.quantized(path):
            return loss.measure()

    return layer_sensitivity(probe.paths, measure, baseline=0.0)


def order_by_sensitivity(model: keras.Model, data: Any, *, samples: int = 256) -> list[str]:
    """Return the paths of the layers of a fake-quantized model, most sensitive first; see `measure_sensitivity`."""
    return [each.layer for each in measure_sensitivity(model, data, samples=samples)]


def sample_split(data: Any, samples: int, seed: int) -> Split:
    """Return the samples that a sensitivity is measured on.

    Raises:
        DataError: there are none.
    """
    if data is None:
        raise DataError("sensitivity needs samples. Received: data=None", "Pass some hundred inputs, without labels.")
    return (data if isinstance(data, Split) else as_split("sensitivity", data)).sample(samples, seed)


class _Switch(keras.layers.Layer):
    """A quantizer that a variable turns on, so that turning it on needs no new trace."""

    def __init__(self, quantizer: FakeQuant):
        super().__init__(name=f"{quantizer.name}_switch", dtype=quantizer.dtype_policy, autocast=False)
        self.supports_masking = True
        self._quantizer = quantizer
        self.on = self.add_weight(name="on", shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.built = True

    def call(self, x: Any) -> Any:
        return keras.ops.cond(self.on.value > 0, lambda: self._quantizer(x, training=False), lambda: x)

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        return keras.KerasTensor(x.shape, x.dtype)


class _Probe:
    """The float twin of a fake-quantized model, in which one layer after the other can be quantized.

    Args:
        graph: the graph of a fake-quantized model of your own, whose weights change meanwhile.
    """

    def __init__(self, graph: Graph):
        self._layers = {
            node.operation.path_in_model: node.operation
            for node in graph.nodes
            if isinstance(node.operation, QuantizedLayer)
        }
        switches = {
            id(node.operation): _Switch(_calibrated(node.operation)) for node in graph.nodes if _is_quantizer(node)
        }
        self._switches = {
            path: [switches[id(quantizer)] for quantizer in _quantizers_of(graph, layer)]
            for path, layer in self._layers.items()
        }

        self.model = float_twin(graph, switches)

    @property
    def paths(self) -> list[str]:
        return list(self._layers)

    @contextmanager
    def quantized(self, path: str) -> Iterator[None]:
        """Quantize one layer inside the block."""
        layer = self._layers[path]
        values = [stored.dequantize() for stored in layer.stored_weights()]
        with replaced_weights([layer.weight_variable(name) for name in layer.formats], values):
            for switch in self._switches[path]:
                switch.on.assign(1)
            try:
                yield
            finally:
                for switch in self._switches[path]:
                    switch.on.assign(0)


def float_twin(graph: Graph, quantizers: Mapping[int, keras.Layer] | None = None) -> keras.Model:
    """Return the float model inside a fake-quantized one; its layers are shared.

    Args:
        graph: the graph of a fake-quantized model of your own.
        quantizers: what takes the place of a quantizer, by its `id`; without them none is left.
    """

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.operation
        if isinstance(layer, FakeQuant):
            return quantizers[id(layer)](args[0]) if quantizers else args[0]
        if isinstance(layer, QuantizedLayer):
            layer.layer.name = layer.name  # an output's name may have gone to a later operation
            return layer.layer(*args, **kwargs)
        return layer(*args, **kwargs)

    return rewrite_graph(graph, call)


def _is_quantizer(node: Node) -> bool:
    return isinstance(node.operation, FakeQuant)


def _calibrated(quantizer: FakeQuant) -> FakeQuant:
    if not quantizer.is_calibrated:
        raise ModelError(
            f"expected a calibrated model. Received: {quantizer.name!r} has seen no data",
            "Call compress.calibrate(model, samples) first.",
        )
    return quantizer


def _quantizers_of(graph: Graph, layer: QuantizedLayer) -> list[FakeQuant]:
    """Return the quantizers of the tensors that the kernel of `layer` reads and writes."""
    calls = graph.calls(layer)
    fused = {
        id(reader.operation)
        for call in calls
        if (reader := graph.only_consumer(call.output)) is not None and kind_of(reader) == "relu"
    }
    others = {id(node.operation) for node in graph.nodes if id(node.operation) not in {id(layer), *fused}}
    is_integer = read_or_written_in_integers(graph, others)
    found = {}
    for node in graph.nodes:
        if not _is_quantizer(node):
            continue
        own = any(reader in calls for reader in graph.consumers(node.output))
        if own if node.operation.dynamic else is_integer(node.output):
            found[id(node.operation)] = node.operation
    return list(found.values())
