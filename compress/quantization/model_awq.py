"""AWQ for a whole model: kernels that read large activations get a finer grid, and the layer before makes up for it.

Lin et al. 2023, arXiv:2306.00978. The float model behind the quantized one stays the same function; rounding, to
nearest or by GPTQ, comes afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from compress.errors import UsageError
from compress.models.graph import Graph, Node, trace_graph
from compress.models.walking import Skipped
from compress.progress import track
from compress.quantization.absorption import absorbing_weights, divide_outputs
from compress.quantization.awq import awq_scales
from compress.quantization.clustered import is_clustered
from compress.quantization.hessian import Hessian
from compress.quantization.layer_matrices import matrix_of
from compress.quantization.layers import FakeQuant, QuantizedLayer
from compress.quantization.refinement import float_operation
from compress.quantization.rules import kind_of
from compress.quantization.scale_search import weight_values
from compress.quantization.stepwise import StepwiseRun, batches_for, take_samples

_TRANSPARENT = ("Dropout", "Identity", "SetMask")


@dataclass(frozen=True)
class ScaledLayers:
    """Layers whose kernels were multiplied together.

    Args:
        paths: the layers that read one tensor.
        absorbed_by: path of the layer before them, whose outputs were divided.
        alpha: how much of the activations' magnitude went into the factors, 0 to 1; 0 where none helped.
    """

    paths: tuple[str, ...]
    absorbed_by: str
    alpha: float


@dataclass(eq=False)
class _Group:
    producer: Node
    readers: list[Node]
    features: int


def apply_awq(
    model: keras.Model, data: Any, *, samples: int = 256, batch_size: int = 32, seed: int = 0
) -> tuple[list[ScaledLayers], list[Skipped]]:
    """Scale the float weights of a weight-only quantized model for their activations, in place, before rounding.

    Dense and EinsumDense layers that read one tensor are scaled together, where the layer before can take over the
    division: a norm with a gain, or a linear layer, perhaps with a ReLU. Follow it with `apply_gptq` or a search for
    scales.

    Args:
        model: what `fake_quantize` returned for a weight-only scheme with integers.
        data: inputs as `fit` takes them, a `tf.data.Dataset`, or a `compress.Split`; labels are not used.
        samples: how many are used; arrays are sampled at random, streams give their first ones.
        batch_size: samples that are computed at once.
        seed: chooses samples.

    Returns:
        What was scaled, in order, and the dense layers that were not, with the reason.

    Raises:
        UsageError: activations are quantized, or no layer can be scaled.
        DataError: there are no samples, values are not finite, or a layer sees nothing but zeros.
    """
    graph, groups, skipped = plan_awq(model)
    run = StepwiseRun(graph, batches_for(graph, take_samples(data, samples, seed), batch_size))
    first = {id(group.readers[0]): group for group in groups}
    found: list[tuple[_Group, np.ndarray, float]] = []
    with track("scale by activations", len(groups)) as advance:
        for node in graph.nodes:
            if group := first.get(id(node)):
                found.append((group, *_factors(group, run.inputs(node))))
                advance(note=_path(group.producer))
            run.keep(node, run.outputs(node, float_operation(node.operation)))
    for group, factors, alpha in found:  # after the run, whose values are those before scaling
        if alpha > 0:
            _scale(group, factors)
    return [
        ScaledLayers(tuple(node.operation.path_in_model for node in group.readers), _path(group.producer), alpha)
        for group, _, alpha in found
    ], skipped


def plan_awq(model: keras.Model) -> tuple[Graph, list[_Group], list[Skipped]]:
    """Return the graph of a fake-quantized model, the groups of layers that AWQ can scale, and the layers it cannot.

    Raises:
        UsageError: activations are quantized, or there is no group.
    """
    graph = trace_graph(model)
    if any(isinstance(node.operation, FakeQuant) for node in graph.nodes):
        raise UsageError(
            f"expected a model with float activations for AWQ. Received: model {model.name!r}, whose activations are "
            "quantized",
            "Use the scheme int8_weights or int4_weights.",
        )
    groups: list[_Group] = []
    skipped: list[Skipped] = []
    for readers in _readers_of_one_tensor(graph):
        group = _group(graph, readers)
        if isinstance(group, str):
            skipped.extend(Skipped(node.operation.path_in_model, group) for node in readers)
        else:
            groups.append(group)
    if not groups:
        listed = "; ".join(f"{each.path}: {each.reason}" for each in skipped[:10]) or "it has no dense layers"
        raise UsageError(f"expected layers that AWQ can scale. Received: model {model.name!r} ({listed})")
    return graph, groups, skipped


def _readers_of_one_tensor(graph: Graph) -> Iterator[list[Node]]:
    """Yield the dense layers that are called on one tensor, for each such tensor."""
    found: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if isinstance(node.operation, QuantizedLayer) and _input_axis(node.operation) is not None:
            found.setdefault(id(_source(graph, node.inputs[0])), []).append(node)
    yield from found.values()


def _group(graph: Graph, readers: list[Node]) -> _Group | str:
    """Return the layers that read one tensor with the layer before them, or why they cannot be scaled."""
    tensor = _source(graph, readers[0].inputs[0])
    producer = graph.producer(tensor)
    if producer is None:
        return "reads an input of the model"
    if not set(map(id, _all_readers(graph, tensor))) <= set(map(id, readers)):
        return "reads a tensor that other operations need unscaled"
    if any(len(graph.calls(node.operation)) > 1 for node in (producer, *readers)):
        return "is called several times, or the layer before is"
    formats = [form for node in readers for form in node.operation.formats.values()]
    if (
        any(form.scale != "absmax" or form.dtype != "int" for form in formats)
        or len({f.group_size for f in formats}) > 1
    ):
        return "has scales of its own, is stored as floats, or has other groups than what reads the same tensor"
    if any(is_clustered(node.operation, name) for node in readers for name in node.operation.formats):
        return "is clustered: its clusters would be split"
    features = tensor.shape[-1]
    inner = getattr(producer.operation, "layer", producer.operation)
    scales = {form.scale for form in getattr(producer.operation, "formats", {}).values()}
    if not isinstance(inner, keras.layers.Layer) or not absorbing_weights(inner, features) or "stored" in scales:
        return f"follows {_path(producer)}, which cannot be divided exactly"
    return _Group(producer, readers, features)


def _factors(group: _Group, batches: list[Any]) -> tuple[np.ndarray, float]:
    hessian = Hessian(group.features, group.readers[0].operation.path_in_model)
    for inputs in batches:
        hessian.update(keras.ops.convert_to_numpy(keras.ops.cast(inputs, "float32")))
    layers = [node.operation for node in group.readers]
    kernels = [matrix_of(layer.layer).flatten(weight_values(layer, name)) for layer in layers for name in layer.formats]
    formats = [form for layer in layers for form in layer.formats.values()]
    bits = min(form.bits for form in formats)
    return awq_scales(np.concatenate(kernels, axis=1), hessian, bits, formats[0].group_size)


def _scale(group: _Group, factors: np.ndarray) -> None:
    for node in group.readers:
        layer = node.operation
        (name,) = layer.formats
        kernel = weight_values(layer, name)
        shape = [1] * kernel.ndim
        shape[_input_axis(layer)] = len(factors)
        layer.weight_variable(name).assign(kernel * factors.reshape(shape))
    producer = group.producer.operation
    divide_outputs(producer.layer if isinstance(producer, QuantizedLayer) else producer, factors)


def _input_axis(layer: QuantizedLayer) -> int | None:
    """Return the kernel's axis that is summed over with the last axis of the layer's input, or `None`."""
    if not isinstance(layer.layer, (keras.layers.Dense, keras.layers.EinsumDense)) or len(layer.formats) != 1:
        return None
    matrix = matrix_of(layer.layer)
    if matrix is None or matrix.summed != 1:
        return None
    if isinstance(layer.layer, keras.layers.Dense):
        return 0
    inputs, _, kernel = layer.layer.equation.replace(" ", "").partition("->")[0].partition(",")
    return matrix.order[0] if inputs[-1] == kernel[matrix.order[0]] else None


def _source(graph: Graph, tensor: keras.KerasTensor) -> keras.KerasTensor:
    """Return the tensor behind `tensor` that differs from it by a division at most: through dropout and ReLU."""
    node = graph.producer(tensor)
    return tensor if node is None or not _is_transparent(node) else _source(graph, node.inputs[0])


def _all_readers(graph: Graph, tensor: keras.KerasTensor) -> Iterator[Node | None]:
    """Yield the calls that read a tensor, also through transparent ones; `None` stands for the caller of the model."""
    if graph.is_output(tensor):
        yield None
    for node in graph.consumers(tensor):
        if _is_transparent(node) and tensor is node.inputs[0]:
            yield from _all_readers(graph, node.output)
        else:
            yield node


def _path(node: Node) -> str:
    return getattr(node.operation, "path_in_model", node.path)


def _is_transparent(node: Node) -> bool:
    """Return whether a call does to a divided tensor what it does to the tensor, divided: dropout, ReLU without end."""
    if node.kind in _TRANSPARENT:
        return True
    operation = node.operation
    activation = getattr(operation, "activation", operation)
    name = getattr(activation, "__name__", type(activation).__name__)
    return (
        kind_of(node) == "relu" and name in ("relu", "Relu", "ReLU") and getattr(operation, "max_value", None) is None
    )
