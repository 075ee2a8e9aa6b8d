"""Which axes of a kernel run over inputs and which over outputs: the one table that depends on the layer type.

Patterns such as 2:4 run along the inputs, the axes that a layer sums over. A layer that is not in the table has the
layout that nearly all Keras layers share: outputs last, inputs last but one, positions (of a filter) before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from compress.models.walking import find_all_layers


@dataclass(frozen=True)
class KernelLayout:
    """What the axes of a kernel are; every axis that is neither input nor output is a position.

    Args:
        inputs: the axes that the layer sums over, in order; one of C for a depthwise kernel `(..., C, multiplier)`,
            and the dimension of an `Embedding`, each of whose rows is an input of the layer that follows.
        outputs: the axes that make the outputs, in order.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def order(self, rank: int) -> list[int]:
        """Return all axes: positions, then inputs, then outputs."""
        positions = [axis for axis in range(rank) if axis not in (*self.inputs, *self.outputs)]
        return [*positions, *self.inputs, *self.outputs]

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return `(positions, inputs, outputs)`: how many there are of each in a kernel of `shape`."""
        inputs = math.prod(shape[axis] for axis in self.inputs)
        outputs = math.prod(shape[axis] for axis in self.outputs)
        positions = math.prod(shape[axis] for axis in self.order(len(shape))[: -len(self.inputs + self.outputs)])
        return positions, inputs, outputs


def default_layout(rank: int) -> KernelLayout:
    """Return the layout `(positions..., inputs, outputs)` of dense, convolution and recurrent kernels."""
    return KernelLayout((rank - 2,), (rank - 1,))


def _outputs_first(layer: keras.Layer, rank: int) -> KernelLayout:
    return KernelLayout((rank - 1,), (rank - 2,))


def _einsum(layer: keras.Layer, rank: int) -> KernelLayout:
    """Axes that the equation sums over are inputs, new axes outputs, and axes that pass through are positions."""
    operands, _, output = layer.equation.replace(" ", "").partition("->")
    data, _, kernel = operands.partition(",")
    inputs = tuple(axis for axis, letter in enumerate(kernel) if letter not in output)
    outputs = tuple(axis for axis, letter in enumerate(kernel) if letter in output and letter not in data)
    known = len(kernel) == rank and kernel.isalpha() and inputs and outputs
    return KernelLayout(inputs, outputs) if known else default_layout(rank)


_LAYOUTS: dict[type[keras.Layer], Callable[[keras.Layer, int], KernelLayout]] = {
    keras.layers.Conv1DTranspose: _outputs_first,
    keras.layers.Conv2DTranspose: _outputs_first,
    keras.layers.Conv3DTranspose: _outputs_first,
    keras.layers.EinsumDense: _einsum,
    keras.layers.Embedding: _outputs_first,
}


def find_layouts(root: keras.Layer, variables: Sequence[keras.Variable]) -> list[KernelLayout]:
    """Return the layout of each of `variables`, kernels anywhere inside the model or layer `root`."""
    known: dict[int, KernelLayout] = {}
    for layer in find_all_layers(root):
        rule = next((rule for kind, rule in _LAYOUTS.items() if isinstance(layer, kind)), None)
        for variable in layer.weights if rule is not None else ():
            known.setdefault(id(variable), rule(layer, len(variable.shape)))
    return [known.get(id(each)) or default_layout(len(each.shape)) for each in variables]


def to_matrices(array: np.ndarray, layout: KernelLayout) -> np.ndarray:
    """Return a kernel as `(positions, inputs, outputs)`, a view where that is possible."""
    return np.transpose(array, layout.order(array.ndim)).reshape(layout.matrix_shape(array.shape))


def from_matrices(matrices: np.ndarray, layout: KernelLayout, shape: Sequence[int]) -> np.ndarray:
    """Return what `to_matrices` made of a kernel of `shape` as a kernel again."""
    order = layout.order(len(shape))
    return np.transpose(matrices.reshape([shape[axis] for axis in order]), np.argsort(order))
