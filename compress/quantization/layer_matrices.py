"""Layers as matrix products: the kernel as `(inputs, outputs)`, and what it is multiplied with as `(rows, inputs)`.

Dense, EinsumDense with any number of summed axes, and convolutions, whose inputs are patches. GPTQ and AWQ see
nothing else of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D)


@dataclass(frozen=True, eq=False)
class LayerMatrix:
    """How the kernel of a layer is a matrix.

    Args:
        order: the kernel's axes, those that are summed over first.
        summed: how many of them are.
        rows: returns the inputs `(rows, features)` of the matrix for a batch of the layer's inputs.
    """

    order: tuple[int, ...]
    summed: int
    rows: Callable[[Any], np.ndarray]

    def flatten(self, values: np.ndarray) -> np.ndarray:
        """Return a kernel, or scales that broadcast against it, as a matrix `(inputs, outputs)`."""
        moved = np.transpose(values, self.order)
        return moved.reshape(int(np.prod(moved.shape[: self.summed])), -1)

    def restore(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return a matrix as a kernel, or scales, of `shape`."""
        moved = matrix.reshape([shape[axis] for axis in self.order])
        return np.transpose(moved, np.argsort(self.order))


def matrix_of(layer: keras.layers.Layer) -> LayerMatrix | None:
    """Return how the kernel of a layer is a matrix, or `None` where it is none: depthwise, grouped, transposed."""
    if type(layer) is keras.layers.Dense:
        return LayerMatrix((0, 1), 1, lambda x: _as_rows(x, 1))
    if type(layer) is keras.layers.EinsumDense:
        return _matrix_of_einsum(layer.equation)
    if type(layer) in _CONVOLUTIONS and layer.groups == 1:
        rank = layer.rank + 2
        return LayerMatrix(tuple(range(rank)), rank - 1, lambda x: _as_rows(_patches(layer, x), 1))
    return None


def _matrix_of_einsum(equation: str) -> LayerMatrix | None:
    operands, _, output = equation.replace(" ", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    summed = [letter for letter in kernel if letter in inputs and letter not in output]
    kept = [letter for letter in kernel if letter not in inputs]
    lost = set(inputs) - set(kernel) - set(output)
    if not summed or lost or len(summed) + len(kept) != len(kernel) or len(set(kernel)) != len(kernel):
        return None  # such as a kernel of its own for each entry of an axis
    before, _, after = inputs.partition("...")

    def rows(x: Any) -> np.ndarray:
        rank = len(x.shape)
        axes = {letter: i for i, letter in enumerate(before)}
        axes |= {letter: rank - len(after) + i for i, letter in enumerate(after)}
        last = [axes[letter] for letter in summed]
        return _as_rows(ops.transpose(x, [*(i for i in range(rank) if i not in last), *last]), len(summed))

    return LayerMatrix(tuple(kernel.index(letter) for letter in (*summed, *kept)), len(summed), rows)


def _patches(layer: keras.layers.Conv1D | keras.layers.Conv2D, x: Any) -> Any:
    """Return what each position of a convolution sees, `(..., height * width * channels)`, in the kernel's order."""
    if layer.data_format == "channels_first":
        x = ops.moveaxis(x, 1, -1)
    size, stride, dilation = layer.kernel_size, layer.strides, layer.dilation_rate
    padding = layer.padding
    if padding == "causal":
        x, padding = ops.pad(x, [(0, 0), (dilation[0] * (size[0] - 1), 0), (0, 0)]), "valid"
    if layer.rank == 1:
        x = ops.expand_dims(x, 1)
        size, stride, dilation = (1, *size), (1, *stride), (1, *dilation)
    options = {"strides": stride, "dilation_rate": dilation, "padding": padding, "data_format": "channels_last"}
    return ops.image.extract_patches(x, size, **options)


def _as_rows(x: Any, summed: int) -> np.ndarray:
    values = np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))
    return values.reshape(-1, int(np.prod(values.shape[values.ndim - summed :])))
