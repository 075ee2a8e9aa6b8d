"""Calibration: the ranges of a fake-quantized model's activations are set from what samples show."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np

from compress.data.split import Split, as_split, flatten_arrays, map_arrays
from compress.errors import DataError, UsageError
from compress.models.graph import Graph, Node, new_input, repeat, replay, trace_graph
from compress.progress import track
from compress.quantization.layers import FakeQuant, QuantizedLayer
from compress.quantization.observers import ObserverKind, RangeObserver

_BATCH = 64


def calibrate(
    model: keras.Model, data: Any, *, samples: int = 512, observer: ObserverKind = "mse", seed: int = 0
) -> keras.Model:
    """Set the ranges of `model`'s activations in place from samples, and return it.

    Weights are on their grids meanwhile and activations are not, so that each range is that of the true values.

    Args:
        model: what `fake_quantize` returned. A model without activations to calibrate is returned as it is.
        data: inputs as `fit` takes them, a `tf.data.Dataset`, or a `compress.Split`; labels are not used.
        samples: how many are used; arrays are sampled at random, streams give their first ones.
        observer: how a range comes from values: `min-max`, `moving`, `percentile`, `entropy` or `mse`.
        seed: chooses the samples.

    Raises:
        UsageError: the model is not fake-quantized.
        DataError: there are no samples, or an activation is NaN or infinite.
    """
    probe = _probe(model)
    calls = probe.calls
    if not calls:
        return model
    if data is None:
        raise DataError("calibration needs samples. Received: data=None", "Pass a few hundred inputs, without labels.")
    split = (data if isinstance(data, Split) else as_split("calibration", data)).sample(samples, seed)
    observers = {id(layer): RangeObserver(observer) for layer, _ in calls}
    seen = 0
    with track("calibrate", samples) as advance:
        for batch, _ in split.batches(_BATCH):
            x = map_arrays(lambda array: array[: samples - seen], batch)  # noqa: B023
            count = len(flatten_arrays(x)[0])
            values = probe.read(x)
            for (layer, path), value in zip(calls, values, strict=True):
                _observe(observers[id(layer)], np.asarray(value), path)
            seen += count
            advance(count)
            if seen >= samples:
                break
    for layer in {id(layer): layer for layer, _ in calls}.values():
        layer.set_range(*observers[id(layer)].result(layer.bits, layer.symmetric))
    return model


def quantizer_calls(model: keras.Model) -> list[tuple[FakeQuant, str]]:
    """Return `(layer, path of what it quantizes)` for each call of a quantizer whose range comes from data.

    Raises:
        UsageError: the model is not fake-quantized.
    """
    return _calls_of(_trace(model))


def _trace(model: keras.Model) -> Graph:
    graph = trace_graph(model)
    if not any(isinstance(node.operation, (FakeQuant, QuantizedLayer)) for node in graph.nodes):
        raise UsageError(
            f"expected a fake-quantized model. Received: model {model.name!r}", "Call compress.fake_quantize first."
        )
    return graph


def _calls_of(graph: Graph) -> list[tuple[FakeQuant, str]]:
    return [
        (node.operation, _place(graph, node))
        for node in graph.nodes
        if isinstance(node.operation, FakeQuant) and _has_range(node.operation)
    ]


def _has_range(layer: FakeQuant) -> bool:
    return not layer.dynamic and layer.fixed_range is None


def _place(graph: Graph, node: Node) -> str:
    producer = graph.producer(node.inputs[0])
    return producer.path if producer else f"input {node.inputs[0].name}"


class _Probe:
    """Computes what the quantizers of a model read, in the order of their calls, with none of them at work.

    Args:
        model: a fake-quantized model.

    Raises:
        UsageError: the model is not fake-quantized.
    """

    def __init__(self, model: keras.Model):
        graph = _trace(model)
        self.calls = _calls_of(graph)
        wrappers = {id(node.operation): node.operation for node in graph.nodes}.values()
        self._wrappers = [layer for layer in wrappers if isinstance(layer, QuantizedLayer)]
        self._scales = [layer.scales() for layer in self._wrappers]
        self._formats = [dict(layer.formats) for layer in self._wrappers]
        self._model = self._reader(graph) if self.calls else None

    @property
    def is_current(self) -> bool:
        """Whether weights have the scales still that they had when this was made."""
        return self._formats == [layer.formats for layer in self._wrappers] and all(
            old.keys() == new.keys() and all(np.array_equal(old[name], new[name]) for name in old)
            for old, new in zip(self._scales, (layer.scales() for layer in self._wrappers), strict=True)
        )

    def read(self, x: Any) -> list[Any]:
        """Return what each quantizer reads for a batch of inputs."""
        with ExitStack() as held:
            for layer, scales in zip(self._wrappers, self._scales, strict=True):
                held.enter_context(layer.hold_scales(scales))
            return keras.tree.flatten(self._model.predict_on_batch(x))

    @staticmethod
    def _reader(graph: Graph) -> keras.Model:
        read: list[keras.KerasTensor] = []

        def call(node: Node, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(node.operation, FakeQuant):
                return repeat(node, *args, **kwargs)
            if _has_range(node.operation):
                read.append(args[0])
            return args[0]

        inputs = keras.tree.map_structure(new_input, graph.inputs)
        replay(graph, inputs, call)
        return keras.Model(inputs, read)


_PROBES: WeakKeyDictionary[keras.Model, _Probe] = WeakKeyDictionary()


def _probe(model: keras.Model) -> _Probe:
    """Return the probe of `model` from its last calibration, or a new one: compiling takes most of the time."""
    known = _PROBES.get(model)
    if known is None or not known.is_current:
        known = _PROBES[model] = _Probe(model)
    return known


def _observe(observer: RangeObserver, values: np.ndarray, path: str) -> None:
    if not np.isfinite(values).all():
        raise DataError(
            f"calibration needs finite activations. Received: NaN or infinite values behind {path!r}",
            "Look for NaN in the samples, and evaluate the float model on them.",
        )
    observer.update(values)
