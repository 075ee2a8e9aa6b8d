"""Layouts of every layer with kernels, wherever it is in a model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.models.kernel_layout import KernelLayout, default_layout, find_layouts, from_matrices, to_matrices
from compress.models.walking import find_kernels

IMAGE, SEQUENCE, VIDEO = (8, 8, 4), (8, 4), (4, 8, 8, 4)

# layer, input shape, (inputs, outputs) axes and (positions, inputs, outputs) counts of each kernel
CASES = {
    "Dense": (layers.Dense(6), (4,), [((0,), (1,), (1, 4, 6))]),
    "Conv1D": (layers.Conv1D(6, 3), SEQUENCE, [((1,), (2,), (3, 4, 6))]),
    "Conv2D": (layers.Conv2D(6, 3), IMAGE, [((2,), (3,), (9, 4, 6))]),
    "grouped": (layers.Conv2D(6, 3, groups=2), IMAGE, [((2,), (3,), (9, 2, 6))]),
    "Conv3D": (layers.Conv3D(6, 3), VIDEO, [((3,), (4,), (27, 4, 6))]),
    "Conv1DTranspose": (layers.Conv1DTranspose(6, 3), SEQUENCE, [((2,), (1,), (3, 4, 6))]),
    "Conv2DTranspose": (layers.Conv2DTranspose(6, 3), IMAGE, [((3,), (2,), (9, 4, 6))]),
    "Conv3DTranspose": (layers.Conv3DTranspose(6, 3), VIDEO, [((4,), (3,), (27, 4, 6))]),
    "DepthwiseConv1D": (layers.DepthwiseConv1D(3, depth_multiplier=2), SEQUENCE, [((1,), (2,), (3, 4, 2))]),
    "DepthwiseConv2D": (layers.DepthwiseConv2D(3, depth_multiplier=2), IMAGE, [((2,), (3,), (9, 4, 2))]),
    "SeparableConv1D": (layers.SeparableConv1D(6, 3), SEQUENCE, [((1,), (2,), (3, 4, 1)), ((1,), (2,), (1, 4, 6))]),
    "SeparableConv2D": (layers.SeparableConv2D(6, 3), IMAGE, [((2,), (3,), (9, 4, 1)), ((2,), (3,), (1, 4, 6))]),
    "EinsumDense": (layers.EinsumDense("abc,dc->abd", (None, 6)), SEQUENCE, [((1,), (0,), (1, 4, 6))]),
    "einsum-ellipsis": (layers.EinsumDense("...x,xy->...y", 6), SEQUENCE, [((0,), (1,), (1, 4, 6))]),
    "einsum-grouped": (layers.EinsumDense("abc,bcd->abd", (8, 6)), SEQUENCE, [((1,), (2,), (8, 4, 6))]),
    "Embedding": (layers.Embedding(10, 4), (8,), [((1,), (0,), (1, 4, 10))]),
    "LSTM": (layers.LSTM(2), SEQUENCE, [((0,), (1,), (1, 4, 8)), ((0,), (1,), (1, 2, 8))]),
    "GRU": (layers.GRU(2), SEQUENCE, [((0,), (1,), (1, 4, 6)), ((0,), (1,), (1, 2, 6))]),
    "SimpleRNN": (layers.SimpleRNN(2), SEQUENCE, [((0,), (1,), (1, 4, 2)), ((0,), (1,), (1, 2, 2))]),
    "ConvLSTM2D": (layers.ConvLSTM2D(2, 3), VIDEO, [((2,), (3,), (9, 4, 8)), ((2,), (3,), (9, 2, 8))]),
    "Bidirectional": (layers.Bidirectional(layers.GRU(1)), SEQUENCE, [((0,), (1,), (1, n, 3)) for n in (4, 1, 4, 1)]),
    "TimeDistributed": (
        layers.TimeDistributed(layers.Conv2DTranspose(6, 3)),
        VIDEO,
        [((3,), (2,), (9, 4, 6))],
    ),
}
_PROJECTIONS = [((0,), (1, 2), (1, 4, 6))] * 3 + [((0, 1), (2,), (1, 6, 4))]
ATTENTIONS = {
    "MultiHeadAttention": (layers.MultiHeadAttention(2, 3), _PROJECTIONS),
    "GroupQueryAttention": (
        layers.GroupQueryAttention(3, 2, 1),
        [((0,), (1, 2), (1, 4, 6)), *[((0,), (1, 2), (1, 4, 3))] * 2, ((0, 1), (2,), (1, 6, 4))],
    ),
}


def model_of(layer, shape):
    given = keras.Input(shape)
    return keras.Model(given, layer(given, given) if "Attention" in type(layer).__name__ else layer(given))


@pytest.mark.parametrize("name", [*CASES, *ATTENTIONS])
def test_layout_of_every_layer(name):
    layer, shape, expected = CASES.get(name) or (ATTENTIONS[name][0], SEQUENCE, ATTENTIONS[name][1])
    kernels, _ = find_kernels(model_of(layer, shape))
    found = find_layouts(layer, [kernel.variable for kernel in kernels])
    counts = [layout.matrix_shape(tuple(kernel.variable.shape)) for layout, kernel in zip(found, kernels, strict=True)]
    assert [(each.inputs, each.outputs, count) for each, count in zip(found, counts, strict=True)] == expected
    for kernel, layout in zip(kernels, found, strict=True):
        array = np.arange(np.prod(kernel.variable.shape)).reshape(kernel.variable.shape)
        matrices = to_matrices(array, layout)
        assert matrices.shape == layout.matrix_shape(array.shape)
        assert np.array_equal(from_matrices(matrices, layout, array.shape), array)


def test_nested_and_shared():
    up = layers.Conv2DTranspose(4, 3, padding="same", name="up")
    inner = keras.Sequential([keras.Input(IMAGE), up, layers.Conv2D(4, 1, name="conv")])
    given = keras.Input(IMAGE)
    model = keras.Model(given, up(inner(inner(given))))
    kernels, _ = find_kernels(model)
    found = find_layouts(model, [kernel.variable for kernel in kernels])
    layouts = {kernel.layer_path.split("/")[-1]: each for kernel, each in zip(kernels, found, strict=True)}
    assert layouts == {"up": KernelLayout((3,), (2,)), "conv": KernelLayout((2,), (3,))}


def test_unknown_layers_and_subclasses():
    class Own(keras.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(2, shape[-1], 5), name="kernel")

        def call(self, x):
            return keras.ops.matmul(x, self.kernel[0])

    class Up(layers.Conv2DTranspose):
        pass

    own, up = Own(), Up(6, 3)
    own.build((None, 4))
    up.build((None, *IMAGE))
    assert find_layouts(own, [own.kernel]) == [default_layout(3)] == [KernelLayout((1,), (2,))]
    assert find_layouts(up, [up.kernel]) == [KernelLayout((3,), (2,))]


def test_matrices_by_hand():
    array = np.arange(6).reshape(1, 2, 3)  # (position, output, input)
    matrices = to_matrices(array, KernelLayout((2,), (1,)))
    assert matrices.tolist() == [[[0, 3], [1, 4], [2, 5]]]
    heads = to_matrices(np.arange(8).reshape(2, 2, 2), KernelLayout((0, 1), (2,)))
    assert heads.tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7]]]
