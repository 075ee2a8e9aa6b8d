"""Quantizers of tfmot's quantization-aware training, and the fake-quantized model that computes with the same scales.

Its default 8-bit scheme: weights symmetric with 255 levels, activations with 256 and a zero point (Jacob et al. 2018,
arXiv:1712.05877). Batch norm is folded into the quantized kernels afterwards, with the scales, so the integers stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from compress.errors import ModelError
from compress.legacy.dialects import activation_name
from compress.legacy.wrappers import Wrapper
from compress.models.graph import copy_graph, rewrite_graph
from compress.quantization.folding import fold_graph
from compress.quantization.layers import FakeQuant, QuantizedLayer, weight_names
from compress.quantization.weight_format import WeightFormat

_CONFIGS = frozenset((
    "Default8BitQuantizeConfig", "Default8BitConvQuantizeConfig", "Default8BitConvTransposeQuantizeConfig",
    "Default8BitActivationQuantizeConfig", "Default8BitOutputQuantizeConfig", "NoOpQuantizeConfig",
))  # fmt: skip
_BEFORE = frozenset(("softmax", "sigmoid", "tanh", "gelu"))
_AFTER = frozenset(("linear", "relu", "swish", "gelu"))
_QUANTIZED_ACTIVATION_LAYERS = frozenset(("relu", "swish", "gelu", "relu6"))
_LEVELS = 254  # steps from -127 to 127
_MOMENTUM = 0.999  # of tfmot's moving averages
_SAME = 1e-4  # how far a symmetric range may be from symmetric, relative to its end


@dataclass(frozen=True)
class Slots:
    """Where tfmot rounds numbers in one layer.

    Args:
        weights: names of its attributes that are weights.
        pre_activation: before the activation.
        post_activation: after it.
        output: what the layer returns.
    """

    weights: tuple[str, ...] = ()
    pre_activation: bool = False
    post_activation: bool = False
    output: bool = False

    @property
    def activations(self) -> list[str]:
        """Names of the ranges, in the order in which they are stored."""
        return [name for name in ("pre_activation", "post_activation", "output") if getattr(self, name)]

    @property
    def ranges(self) -> list[str]:
        """Names of all ranges' ends, in the order in which they are stored."""
        return [f"{name}_{end}" for name in (*self.weights, *self.activations) for end in ("min", "max")]


def slots_of(wrapper: Wrapper, kind: str, config: Mapping[str, Any]) -> Slots:
    """Return where the quantize wrapper around a serialised layer rounds.

    Raises:
        ModelError: it follows rules that are not those of tfmot's default scheme.
    """
    node = wrapper.options.get("quantize_config")
    name = str(node.get("class_name")).rpartition(">")[2] if isinstance(node, Mapping) else str(node)
    if name not in _CONFIGS:
        raise ModelError(
            f"{wrapper.inner!r} is quantized by {name[:60]!r}, a QuantizeConfig that is not of tfmot's 8-bit scheme.",
            "Strip the quantization in Keras 2, migrate the float model, and train it with `bmcompress qat`.",
        )
    options = node.get("config") or {}
    is_activation = kind == "Activation"
    output = bool(options.get("quantize_output", name in ("Default8BitOutputQuantizeConfig",)))
    if is_activation and name == "Default8BitActivationQuantizeConfig":
        output = output and activation_name(config.get("activation")) in _QUANTIZED_ACTIVATION_LAYERS
    activation = _quantized_activation(config.get("activation")) if options.get("activation_attrs") else None
    return Slots(
        weights=tuple(str(each) for each in options.get("weight_attrs") or ()),
        pre_activation=activation in _BEFORE,
        post_activation=activation in _AFTER,
        output=output,
    )


def _quantized_activation(value: Any) -> str | None:
    """Return the name of an activation that tfmot may round around, or `None` for its own that does nothing."""
    inner = value
    while isinstance(inner, Mapping):
        if inner.get("class_name") == "NoOpActivation":
            return None
        inner = (inner.get("config") or {}).get("activation") if isinstance(inner.get("config"), Mapping) else None
    return activation_name(value)


def make_quantizer(name: str) -> FakeQuant:
    """Return the quantizer of an activation, whose range is set later."""
    return FakeQuant(bits=8, momentum=_MOMENTUM, name=f"{name}_quantizer")


def set_ranges(quantizers: Mapping[str, FakeQuant], state: Mapping[str, np.ndarray], name: str) -> None:
    """Set the ranges of a layer's activation quantizers, by slot, to those that tfmot kept."""
    for slot, quantizer in quantizers.items():
        low, high = (state.get(f"{slot}_{end}") for end in ("min", "max"))
        if low is None or high is None or np.size(low) != 1 or np.size(high) != 1:
            raise ModelError(f"{name!r}: the range of its {slot} is missing.", "Save the model again as .h5.")
        quantizer.set_range(float(low), float(high))


def quantize_weights(
    model: keras.Model, ranges: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]
) -> keras.Model:
    """Return `model` with weights on the integer grids of tfmot's ranges, and batch norm folded.

    Args:
        model: a float model; it may hold `FakeQuant` layers already. It is not changed.
        ranges: by name of layer, then of weight, the least and greatest number: one, or one for each channel.

    Raises:
        ModelError: a range that is not symmetric, or does not fit its weight.
    """
    scales = {
        layer: {name: _scale(low, high, f"{layer}/{name}") for name, (low, high) in weights.items()}
        for layer, weights in ranges.items()
    }
    # A factor along inputs would take weights off their grid; one along outputs goes into the scale.
    folded = fold_graph(copy_graph(model), replace=False, keeps=lambda kernel, axes: True).graph
    steps = copy_graph(model)
    for node in steps.nodes:
        for name, scale in scales.get(node.operation.name, {}).items():
            weight = _weight(node.operation, name)
            weight.assign(np.broadcast_to(_along_channels(scale, weight, node.operation), weight.shape))
    # The same folding of kernels that hold their scale everywhere leaves the scales that the folded kernels have.
    folded_steps = fold_graph(steps, replace=False, keeps=lambda kernel, axes: True).graph
    step_of = {node.operation.name: node.operation for node in folded_steps.nodes}
    wrappers: dict[int, QuantizedLayer] = {}
    for node in folded.nodes:
        layer = node.operation
        if layer.name in scales and id(layer) not in wrappers:
            wrappers[id(layer)] = _quantized(layer, step_of[layer.name], list(scales[layer.name]), node.path)

    def call(node: Any, *args: Any, **kwargs: Any) -> Any:
        return wrappers.get(id(node.operation), node.operation)(*args, **kwargs)

    return rewrite_graph(folded, call)


def _scale(low: np.ndarray, high: np.ndarray, name: str) -> np.ndarray:
    low, high = np.asarray(low, "float32"), np.asarray(high, "float32")
    ends = np.maximum(np.abs(low), np.abs(high))
    if low.shape != high.shape or low.ndim > 1 or not np.all(np.abs(low + high) <= _SAME * ends):
        raise ModelError(f"the range of {name!r} is not symmetric, as that of a weight is in tfmot's 8-bit scheme.")
    return np.maximum((high - low) / _LEVELS, np.finfo("float32").tiny)


def name_in_keras3(layer: Any, name: str) -> str:
    """Return what Keras 3 calls a weight that is an attribute `name` of a layer in Keras 2."""
    is_depthwise = isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D))
    return "kernel" if is_depthwise and name == "depthwise_kernel" else name


def _weight(layer: keras.layers.Layer, name: str) -> keras.Variable:
    named = weight_names(layer)
    if name not in named:
        raise ModelError(f"{layer.name!r} has no weight {name[:60]!r}, for which there is a range.")
    return named[name]


def _channel_axis(layer: keras.layers.Layer, weight: keras.Variable) -> int:
    """Return the axis along which tfmot keeps a range for each entry."""
    transposed = isinstance(layer, keras.layers.Conv2DTranspose)
    return len(weight.shape) - (2 if transposed else 1)


def _along_channels(scale: np.ndarray, weight: keras.Variable, layer: keras.layers.Layer) -> np.ndarray:
    if scale.size == 1:
        return scale.reshape(())
    axis = _channel_axis(layer, weight)
    if scale.size != weight.shape[axis]:
        raise ModelError(f"{layer.name!r} has {weight.shape[axis]} channels. Received: {scale.size} ranges")
    return scale.reshape([-1 if each == axis else 1 for each in range(len(weight.shape))])


def _quantized(layer: keras.layers.Layer, steps: keras.layers.Layer, names: list[str], path: str) -> QuantizedLayer:
    """Return a layer that rounds its weights to the steps that stand in the weights of another one."""
    found, formats = {}, {}
    for name in names:
        step = np.abs(keras.ops.convert_to_numpy(_weight(steps, name))).astype("float32")
        axes = tuple(axis for axis in range(step.ndim) if _varies(step, axis))
        formats[name] = WeightFormat(bits=8, channel_axes=axes, scale="stored")
        others = tuple(axis for axis in range(step.ndim) if axis not in axes)
        found[name] = step.max(axis=others, keepdims=True) if others else step
    wrapper = QuantizedLayer(layer, formats, path=path)
    wrapper.set_scales(found)
    return wrapper


def _varies(values: np.ndarray, axis: int) -> bool:
    first = np.take(values, [0], axis)
    return not np.allclose(values, first, rtol=1e-6, atol=0)
