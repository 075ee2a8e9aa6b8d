"""Calibration: the ranges of a fake-quantized model's activations are set from what samples show."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from compress.data.split import Split, array_split, as_split, flatten_arrays, map_arrays
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
    calls = quantizer_calls(model)
    if not calls:
        return model
    if data is None:
        raise DataError("calibration needs samples. Received: data=None", "Pass a few hundred inputs, without labels.")
    split = choose_samples(data if isinstance(data, Split) else as_split("calibration", data), samples, seed)
    observers = {id(layer): RangeObserver(observer) for layer, _ in calls}
    probe = _probe(model)
    seen = 0
    with track("calibrate", samples) as advance:
        for batch, _ in split.batches(_BATCH):
            x = map_arrays(lambda array: array[: samples - seen], batch)  # noqa: B023
            count = len(flatten_arrays(x)[0])
            values = keras.tree.flatten(probe.predict_on_batch(x))
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
    graph = trace_graph(model)
    if not any(isinstance(node.operation, (FakeQuant, QuantizedLayer)) for node in graph.nodes):
        raise UsageError(
            f"expected a fake-quantized model. Received: model {model.name!r}", "Call compress.fake_quantize first."
        )
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


def _probe(model: keras.Model) -> keras.Model:
    """Return a model of what the quantizers of `model` read, in the order of their calls, with none of them at work."""
    graph = trace_graph(model)
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


def choose_samples(split: Split, samples: int, seed: int) -> Split:
    """Return `samples` random ones of those in memory, as files are often sorted by class."""
    if not split.in_memory or len(split) <= samples:
        return split
    chosen = np.sort(np.random.default_rng(seed).choice(len(split), samples, replace=False))
    return array_split(split.name, map_arrays(lambda array: array[chosen], split.x))


def _observe(observer: RangeObserver, values: np.ndarray, path: str) -> None:
    if not np.isfinite(values).all():
        raise DataError(
            f"calibration needs finite activations. Received: NaN or infinite values behind {path!r}",
            "Look for NaN in the samples, and evaluate the float model on them.",
        )
    observer.update(values)
