"""Bias correction: the mean error that quantization leaves on each output channel is taken out of the layer's bias.

The model is run layer by layer over all samples, so that each layer is corrected on what the corrected layers before
it give, in one pass. Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2, with means from data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

from compress.errors import DataError, UsageError
from compress.models.graph import Graph, Node, trace_graph
from compress.models.walking import Skipped
from compress.progress import track
from compress.quantization.layers import FakeQuant, QuantizedLayer
from compress.quantization.stepwise import StepwiseRun, batches_for

_STEPS = 3
"""How often a layer is corrected. One is exact without activation; a ReLU takes up only a part of each step."""


@dataclass(frozen=True)
class CorrectedBias:
    """What the correction of one layer did.

    Args:
        path: path of the layer.
        before: mean over channels of the absolute mean error, in units of the layer's output.
        after: the same after correction.
    """

    path: str
    before: float
    after: float


def correct_biases(
    reference: keras.Model, quantized: keras.Model, x: Any, *, batch_size: int = 32
) -> tuple[list[CorrectedBias], list[Skipped]]:
    """Change the biases of `quantized` so that its layers' outputs have the means of those of `reference`.

    Layers correspond by name. Means are taken of a layer's output, so behind an activation that it holds. All samples
    are in memory with the outputs that are still needed, some 100 samples are enough.

    Args:
        reference: the float model; it is not changed.
        quantized: the same model with quantized layers, calibrated. The bias of a wrapper is that of its `layer`.
        x: samples as `quantized` takes them: an array, or a list or dict of arrays, samples first.
        batch_size: samples that are computed at once.

    Returns:
        What was corrected, in order, and the layers with weights that were not, with the reason. A correction that
        does not lower a layer's error is undone.

    Raises:
        DataError: there are no samples, or outputs are not finite.
        UsageError: no layer with a bias has the same name in both models.
        ModelError: a model is neither functional nor sequential.
    """
    wanted, theirs = trace_graph(reference), trace_graph(quantized)
    own = {id(variable) for variable in quantized.variables}
    known = {node.operation.name for node in wanted.nodes}
    biases, skipped = _biases(theirs, known, own)
    if not biases:
        raise UsageError(
            f"expected layers with a bias and the same name in both models. Received: {reference.name!r} with "
            f"{[node.operation.name for node in wanted.nodes][:10]}, {quantized.name!r} with "
            f"{[node.operation.name for node in theirs.nodes][:10]}",
            "Pass the float model that the quantized one was made from, with batch norm folded into its layers.",
        )
    targets: dict[str, np.ndarray] = {}
    run = StepwiseRun(wanted, batches_for(wanted, x, batch_size))
    for node in wanted.nodes:
        outputs = run.outputs(node)
        if node.operation.name in biases:
            targets[node.operation.name] = _mean(node.operation, outputs, biases[node.operation.name])
        run.keep(node, outputs)
    corrected: list[CorrectedBias] = []
    run = StepwiseRun(theirs, batches_for(theirs, x, batch_size))
    with track("correct biases", len(biases)) as advance:
        for node in theirs.nodes:
            name = _name(node.operation, known)
            if name in biases:
                outputs, result = _correct(node, partial(run.outputs, node), biases[name], targets[name])
                corrected.append(result)
                advance(note=_path(node))
            else:
                outputs = run.outputs(node)
            run.keep(node, outputs)
    return corrected, skipped


def has_biases(model: keras.Model) -> bool:
    """Return whether a model has a layer whose bias `correct_biases` can change."""
    graph = trace_graph(model)
    names, own = {node.operation.name for node in graph.nodes}, {id(variable) for variable in model.variables}
    return bool(_biases(graph, names, own)[0])


def _biases(graph: Graph, known: set[str], own: set[int]) -> tuple[dict[str, keras.Variable], list[Skipped]]:
    """Return the bias of each layer that can be corrected, by the layer's name, and the layers that cannot.

    Args:
        graph: the graph of the quantized model.
        known: names of the operations of the float model.
        own: the `id` of each variable of the quantized model; tracing copies layers of nested models whose names clash.
    """
    found: dict[str, keras.Variable] = {}
    skipped: list[Skipped] = []
    for node in graph.nodes:
        layer = node.operation
        if (
            any(each.path == _path(node) for each in skipped)
            or not getattr(layer, "weights", None)
            or not _name(layer, known)
        ):
            continue
        inner = getattr(layer, "layer", None) or layer
        bias = getattr(inner, "bias", None)
        if _name(layer, known) not in known:
            if isinstance(bias, keras.Variable):
                skipped.append(Skipped(_path(node), "has no counterpart in the float model"))
        elif len(graph.calls(layer)) > 1:
            skipped.append(Skipped(_path(node), "is called several times: one bias, several errors"))
        elif not isinstance(bias, keras.Variable) or len(inner.weights) < 2:
            skipped.append(Skipped(_path(node), "has no bias"))
        elif id(bias) not in own:
            skipped.append(Skipped(_path(node), "is in a nested model, under a name that another layer has"))
        elif not _fits(inner, bias, node.output.shape):
            skipped.append(Skipped(_path(node), "has a bias that is not added to its output"))
        else:
            found[_name(layer, known)] = bias
    return found, skipped


def _name(operation: keras.Operation, known: Collection[str]) -> str | None:
    """Return the name that a layer has in the float model, one of `known`, or `None` for a quantizer.

    The last operation has the name of the model's output, so a quantizer may be called as the layer before it, and
    the wrapper of that layer otherwise.
    """
    if isinstance(operation, FakeQuant):
        return None
    if isinstance(operation, QuantizedLayer) and operation.name not in known:
        return operation.layer.name
    return operation.name


def _path(node: Node) -> str:
    """Return the path of a layer in the user's model."""
    return node.operation.path_in_model if isinstance(node.operation, QuantizedLayer) else node.path


def _fits(layer: keras.Layer, bias: keras.Variable, output: tuple[int | None, ...]) -> bool:
    """Return whether the bias broadcasts against the end of the layer's output."""
    shape = (*output[:1], *output[2:], output[1]) if _channels_first(layer, len(output)) else output
    tail = shape[len(shape) - len(bias.shape) :]
    return len(bias.shape) < len(shape) and all(b in (1, size) for b, size in zip(bias.shape, tail, strict=True))


def _correct(
    node: Node, run: Callable[[], list[Any]], bias: keras.Variable, target: np.ndarray
) -> tuple[list[Any], CorrectedBias]:
    """Correct one layer; return its outputs and what was reached."""
    best = keras.ops.convert_to_numpy(bias)
    outputs = run()
    error = _mean(node.operation, outputs, bias) - target
    if not np.isfinite(error).all():
        raise DataError(
            f"expected outputs that are finite. Received: NaN or infinity from {_path(node)}",
            "Look for NaN in the samples and in the weights.",
        )
    first = smallest = float(np.abs(error).mean())
    for _ in range(_STEPS):
        bias.assign((keras.ops.convert_to_numpy(bias) - error).astype(best.dtype))
        changed = run()
        error = _mean(node.operation, changed, bias) - target
        size = float(np.abs(error).mean())
        if not size < smallest:
            break
        best, outputs, enough = keras.ops.convert_to_numpy(bias), changed, size < 0.01 * first
        smallest = size
        if enough:
            break
    bias.assign(best)
    return outputs, CorrectedBias(_path(node), first, smallest)


def _mean(layer: keras.Layer, outputs: list[Any], bias: keras.Variable) -> np.ndarray:
    """Return the mean of a layer's outputs over everything but the axes of its bias, in the shape of the bias."""
    total, count = np.zeros(bias.shape), 0
    for output in outputs:
        values = keras.ops.convert_to_numpy(keras.ops.cast(output, "float32"))
        if _channels_first(getattr(layer, "layer", None) or layer, values.ndim):
            values = np.moveaxis(values, 1, -1)
        lead = values.ndim - len(bias.shape)
        axes = (*range(lead), *(lead + i for i, size in enumerate(bias.shape) if size == 1))
        total += values.mean(axis=axes, dtype="float64").reshape(bias.shape) * len(values)
        count += len(values)
    return total / count


def _channels_first(layer: keras.Layer, rank: int) -> bool:
    return rank > 2 and getattr(layer, "data_format", None) == "channels_first"
