"""From a fake-quantized model to what files are made of: a float model with marked activations, and integers.

Weights of that model lie exactly on their grids and each quantized activation passes one operation of
TensorFlow that both converters understand, so the files get the scales that training has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import keras
import numpy as np

from compress.errors import ModelError
from compress.models.copying import custom_objects_of
from compress.models.graph import Graph, Node, new_input, rename_operation, replay, trace_graph, unique_name
from compress.quantization.layers import FakeQuant, QuantizedLayer
from compress.quantization.rules import kind_of
from compress.quantization.stored import Compute, StoredWeight

Weights = Callable[[QuantizedLayer], list[StoredWeight]]
"""Returns the weights of a layer as files are to hold them, computed once."""


@dataclass(frozen=True, eq=False)
class Deployment:
    """A model that is ready for the converters.

    Args:
        model: a float model that computes what the fake-quantized one does.
        weights: what the files are to hold instead of its float weights.
        compute: how the files are to compute.
        output_steps: the step of the integers behind each output, `None` where it is float.
    """

    model: keras.Model
    weights: list[StoredWeight]
    compute: Compute
    output_steps: tuple[float | None, ...]


@keras.saving.register_keras_serializable(package="bmcompress")
class QuantizationMark(keras.layers.Layer):
    """Marks a tensor as quantized to a range, with TensorFlow's own fake-quantization operation.

    Args:
        minimum, maximum: least and greatest real value of the integer grid.
        bits: 2 to 8, or 16.
    """

    def __init__(self, minimum: float, maximum: float, bits: int = 8, **kwargs: Any):
        super().__init__(**kwargs)
        self.minimum, self.maximum, self.bits = minimum, maximum, bits
        self.built = True

    def call(self, x: Any) -> Any:
        import tensorflow as tf  # only TensorFlow exports; other backends train and save

        return tf.quantization.fake_quant_with_min_max_vars(x, self.minimum, self.maximum, num_bits=self.bits)

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        return keras.KerasTensor(x.shape, x.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "minimum": self.minimum, "maximum": self.maximum, "bits": self.bits}


def is_fake_quantized(model: keras.Model) -> bool:
    """Return whether `model` came from `fake_quantize`."""
    return any(isinstance(layer, (FakeQuant, QuantizedLayer)) for layer in model.layers)


def compute_of(model: keras.Model) -> Compute:
    """Return how files of a fake-quantized model are to compute."""
    quantizers = [layer for layer in model.layers if isinstance(layer, FakeQuant)]
    if any(layer.dynamic for layer in quantizers):
        return "dynamic"
    return "integer" if quantizers else "weights"


def activation_bits(model: keras.Model) -> int | None:
    """Return the most bits that an activation of a fake-quantized model has, or `None` where they stay float."""
    return max((layer.bits for layer in model.layers if isinstance(layer, FakeQuant)), default=None)


def deploy_model(model: keras.Model) -> Deployment:
    """Return what converters need of a fake-quantized model; `model` is not changed.

    Raises:
        ModelError: an activation has no range yet, because no data was seen.
    """
    graph = trace_graph(model)
    compute = compute_of(model)
    wrappers = {id(each): each for each in (node.operation for node in graph.nodes) if isinstance(each, QuantizedLayer)}
    weights: Weights = cache(QuantizedLayer.stored_weights)
    with keras.saving.custom_object_scope(custom_objects_of(model)):
        float_layers = {key: _float_layer(layer, weights(layer)) for key, layer in wrappers.items()}
    for layer, _, values in _snapped_biases(graph, weights):
        float_layers[id(layer)].bias.assign(values)
    names = {node.operation.name for node in graph.nodes}
    quantizers = {id(node.operation): node.operation for node in graph.nodes if isinstance(node.operation, FakeQuant)}
    marks = {key: _mark(layer) for key, layer in quantizers.items() if not layer.dynamic}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        layer = node.operation
        if isinstance(layer, FakeQuant):
            return args[0] if layer.dynamic else marks[id(layer)](args[0])
        outputs = float_layers.get(id(layer), layer)(*args, **kwargs)
        if compute == "integer" and _is_table(layer):
            step = _table_scale(weights(layer))
            return QuantizationMark(-128 * step, 127 * step, name=unique_name(f"{layer.name}_quantizer", names))(
                outputs
            )
        return outputs

    inputs = keras.tree.map_structure(new_input, graph.inputs)
    deployed = keras.Model(inputs, replay(graph, inputs, call), name=graph.name)
    steps = tuple(_scale_of(graph, tensor, weights) for tensor in keras.tree.flatten(graph.outputs))
    return Deployment(deployed, [each for layer in wrappers.values() for each in weights(layer)], compute, steps)


def snap_biases(model: keras.Model) -> keras.Model:
    """Put the biases of a calibrated model on the grid that integer kernels add them on, in place, and return it.

    Its answers are then those of the exported files, up to the rounding of ties. Training moves biases off again.
    """
    for _, bias, values in _snapped_biases(trace_graph(model), cache(QuantizedLayer.stored_weights)):
        bias.assign(values)
    return model


def _snapped_biases(graph: Graph, weights: Weights) -> Iterator[tuple[QuantizedLayer, keras.Variable, np.ndarray]]:
    """Yield `(layer, bias, its values as multiples of input scale times weight scale)`.

    A layer that is called on inputs of different scales has no one grid and is left out: its files hold a bias
    for each call.
    """
    for node in {
        id(node.operation): node for node in graph.nodes if isinstance(node.operation, QuantizedLayer)
    }.values():
        layer = node.operation
        bias = getattr(layer.layer, "bias", None)
        if bias is None or len(layer.formats) != 1 or kind_of(node) != "kernel":
            continue
        scales = {_scale_of(graph, call.inputs[0], weights) for call in graph.calls(layer)}
        (weight,) = weights(layer)
        if len(scales) != 1 or None in scales or weight.scale is None:
            continue
        values = np.asarray(keras.ops.convert_to_numpy(bias), "float32")
        if weight.scale.size not in (1, values.size):
            continue
        step = np.float32(scales.pop()) * weight.scale.reshape(values.shape if weight.scale.size > 1 else ())
        yield layer, bias, np.round(values / step) * step


def _scale_of(graph: Graph, tensor: keras.KerasTensor, weights: Weights) -> float | None:
    """Return the scale of the integers that stand for `tensor`, or `None` where it is float."""
    node = graph.producer(tensor)
    if node is None:
        return None
    if isinstance(node.operation, FakeQuant):
        return None if node.operation.dynamic else node.operation.scale_and_zero_point()[0]
    if _is_table(node.operation):
        return _table_scale(weights(node.operation))
    return _scale_of(graph, node.inputs[0], weights) if kind_of(node) in ("same", "join") and node.inputs else None


def _float_layer(wrapper: QuantizedLayer, weights: list[StoredWeight]) -> keras.Layer:
    """Return a copy of the layer inside `wrapper` whose weights are on their grids."""
    copy = rename_operation(wrapper.layer, wrapper.name)
    values = {id(wrapper.weight_variable(name)): stored for name, stored in zip(wrapper.formats, weights, strict=True)}
    for source, target in zip(wrapper.layer.weights, copy.weights, strict=True):
        if id(source) in values:
            target.assign(values[id(source)].dequantize())
    return copy


def _mark(layer: FakeQuant) -> QuantizationMark:
    if not layer.is_calibrated:
        raise ModelError(
            f"expected a calibrated model. Received: {layer.name!r} has seen no data",
            "Call compress.calibrate(model, samples), or train with ranges='moving', before exporting.",
        )
    return QuantizationMark(*layer.current_range(), layer.bits, name=layer.name)


def _is_table(layer: keras.Operation) -> bool:
    if not isinstance(layer, QuantizedLayer) or not isinstance(layer.layer, keras.layers.Embedding):
        return False
    (weight,) = layer.formats.values()
    return not weight.channel_axes and weight.dtype == "int"


def _table_scale(weights: list[StoredWeight]) -> float:
    (weight,) = weights
    return float(weight.scale.reshape(()))
