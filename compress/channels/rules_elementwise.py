"""Rules of operations that treat each channel by itself, and of norms."""

from __future__ import annotations

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
    "Abs", "Absolute", "ActivityRegularization", "AlphaDropout", "Cast", "Celu", "Clip", "Dropout", "ELU", "Elu", "Erf",
    "Exp", "GaussianDropout", "GaussianNoise", "Gelu", "HardSigmoid", "HardSilu", "HardTanh", "Identity", "LeakyReLU",
    "LeakyRelu", "LogSigmoid", "Mish", "Negative", "ReLU", "Relu", "Relu6", "Rsqrt", "Selu", "Sigmoid", "Silu", "Sin",
    "SoftSign", "Softplus", "Softsign", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "Sqrt", "Square",
    "StopGradient", "Tanh", "ThresholdedReLU",
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
    name = keras.activations.serialize(node.operation.activation)
    if name not in _ELEMENTWISE:
        for axis in axes:
            atoms.freeze(axis, f"{node.path} has an activation over channels")
    return axes


@rule_of("Softmax", "LogSoftmax", "UnitNormalization")
def over_channels(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    for axis in inputs[0][1:]:
        atoms.freeze(axis, f"{node.path} ({node.kind}) looks at channels together")
    return [list(inputs[0])]


@rule_of("Rescaling")
def rescaling(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    if np.ndim(node.operation.scale) or np.ndim(node.operation.offset):
        return freeze_all(node, inputs, atoms, f"{node.path} has a factor for each channel")
    return [list(inputs[0])]


@rule_of("PReLU")
def prelu(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x,) = node.operation, inputs
    for axis in range(len(layer.alpha.shape)):
        own = x[axis + 1] if layer.alpha.shape[axis] != 1 else None
        atoms.weight(node.path, layer.alpha, axis, own, "passes")
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
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    places = sorted(axis % len(x) for axis in axes)
    for axis in places:
        atoms.freeze_norm(x[axis], f"{node.path} ({node.kind}) norms over it")
    for variable in layer.variables:
        for index, axis in enumerate(places):
            atoms.weight(node.path, variable, index, x[axis], "passes")
    return [list(x)]


@rule_of("GroupNormalization")
def group_normalization(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    for axis in inputs[0][1:]:
        atoms.freeze(axis, f"{node.path} ({node.kind}) norms over groups of it")
    return [list(inputs[0])]
