"""Rules of operations that treat each channel by itself, and of norms."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from compress.channels.atoms import Atoms, Axes
from compress.channels.rules import freeze_all, output_tensors, rule_of
from compress.models.graph import Node

_ELEMENTWISE = {
    "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh",
    "leaky_relu", "linear", "log_sigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_shrink",
    "softplus", "softsign", "sparse_plus", "squareplus", "swish", "tanh", "tanh_shrink", "threshold",
}  # fmt: skip

SAME = (
    "Abs", "Absolute", "ActivityRegularization", "AlphaDropout", "Arctan", "Cast", "Ceil", "Celu", "Copy", "Cos",
    "Cosh", "Dropout", "Elu", "ELU", "Erf", "Exp", "Expm1", "Floor", "GaussianDropout", "GaussianNoise", "Gelu",
    "HardShrink", "HardSigmoid", "HardSilu", "HardTanh", "Identity", "LeakyReLU", "LeakyRelu", "Log", "Log1p",
    "LogicalNot", "LogSigmoid", "Mish", "Negative", "OnesLike", "Reciprocal", "ReLU", "Relu", "Relu6", "Round", "Rsqrt",
    "Selu", "Sigmoid", "Sign", "Silu", "Sin", "Sinh", "Softplus", "SoftShrink", "Softsign", "SoftSign", "SparsePlus",
    "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "Sqrt", "Square", "Squareplus", "StochasticDepth",
    "StopGradient", "Tan", "Tanh", "TanhShrink", "Threshold", "ThresholdedReLU", "ZerosLike",
)  # fmt: skip


@rule_of(*SAME)
def same(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Each number becomes another one by itself."""
    return [list(inputs[0]) for _ in output_tensors(node)]


@rule_of("Activation")
def activation(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    return [activate(node, list(inputs[0]), atoms)]


def activate(node: Node, axes: Axes, atoms: Atoms) -> Axes:
    """Return the axes behind the activation of a layer; one that looks at channels together keeps them all."""
    function = node.operation.activation
    if is_elementwise(function):
        return axes
    last = keras.activations.serialize(function) in ("softmax", "log_softmax")
    result = list(axes)
    for axis in [len(axes) - 1] if last else range(len(axes)):
        atoms.freeze(axes[axis], f"{node.path} has an activation over channels")
        result[axis] = None
    return result


def is_elementwise(function: Any) -> bool:
    """Return whether an activation of Keras changes each number by itself."""
    return keras.activations.serialize(function) in _ELEMENTWISE


@rule_of("Softmax", "LogSoftmax", "Normalize", "UnitNormalization")
def over_channels(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    x, *masks = inputs
    axis = node.operation.axis
    together = range(len(x)) if axis is None else {each % len(x) for each in keras.tree.flatten(axis)}
    for own in [x[each] for each in together] + [own for axes in masks for own in axes]:
        atoms.freeze(own, f"{node.path} ({node.kind}) looks at channels together")
    return [[None if place in together else own for place, own in enumerate(x)]]


@rule_of("Rescaling")
def rescaling(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    if np.ndim(node.operation.scale) or np.ndim(node.operation.offset):
        return freeze_all(node, inputs, atoms, f"{node.path} has a factor for each channel")
    return [list(inputs[0])]


@rule_of("Clip")
def clip(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    if np.ndim(node.operation.x_min) or np.ndim(node.operation.x_max):
        return freeze_all(node, inputs, atoms, f"{node.path} has bounds for each channel")
    return [list(inputs[0])]


@rule_of("PReLU")
def prelu(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    for axis in range(len(layer.alpha.shape)):
        own = x[axis + 1] if layer.alpha.shape[axis] != 1 else None
        atoms.weight(node.path, layer.alpha, axis, own, "passes")
    return [list(x)]


@rule_of("LayerScale")
def layer_scale(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """The factor for each channel in Keras' ConvNeXt."""
    layer, (x,) = node.operation, inputs
    atoms.weight(node.path, layer.gamma, 0, x[-1], "passes")
    atoms.edit(layer, "projection_dim", x[-1])
    return [list(x)]


@rule_of("BatchNormalization")
def batch_normalization(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x, *_) = node.operation, inputs
    own = x[layer.axis]
    for variable in layer.variables:
        if len(variable.shape) == 1:  # not the state of a seed generator
            atoms.weight(node.path, variable, 0, own, "passes")
    return [list(x)]


@rule_of("LayerNormalization", "RMSNormalization")
def layer_normalization(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    places = [axis % len(x) for axis in keras.tree.flatten(layer.axis)]
    if places != sorted(places):  # as for (2, -1): Keras lays out its weights in another order than it uses them
        return freeze_all(node, inputs, atoms, f"{node.path} ({node.kind}) norms over axes out of order")
    reason = f"{node.path} ({node.kind}) norms over it"
    if getattr(layer, "rms_scaling", False):  # neither of the two: the check has no reference for it
        for axis in places:
            atoms.freeze_norm(x[axis], reason)
    else:
        atoms.norm_over(id(node), layer, places, x, reason)
    for variable in layer.variables:
        for index, axis in enumerate(places):
            atoms.weight(node.path, variable, index, x[axis], "passes")
    return [list(x)]


@rule_of("GroupNormalization")
def group_normalization(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """A group keeps its share: the same channels of each go; where each is its own group, any may go."""
    layer, (x,) = node.operation, inputs
    channels = layer.axis % len(x)
    count = node.inputs[0].shape[channels]
    for axis, own in enumerate(x[1:], start=1):
        if axis != channels:
            atoms.freeze(own, f"{node.path} ({node.kind}) norms over it")
    if layer.groups == count:
        atoms.edit(layer, "groups", x[channels])
    else:
        reason = f"{node.path} ({node.kind}) norms over groups of it"
        atoms.norm_over(id(node), layer, range(1, len(x)), x, reason, (layer.groups, channels))
    for variable in layer.variables:
        atoms.weight(node.path, variable, 0, x[channels], "passes")
    return [[own if axis in (0, channels) else None for axis, own in enumerate(x)]]
