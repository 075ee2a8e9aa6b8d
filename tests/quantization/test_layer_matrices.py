"""A layer as a matrix gives the layer's own outputs, for every kind that GPTQ takes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.quantization.layer_matrices import matrix_of

CASES = {
    "dense": (layers.Dense(4), (3, 5)),
    "dense on a sequence": (layers.Dense(4), (3, 6, 5)),
    "heads": (layers.EinsumDense("abc,cde->abde", (6, 2, 4)), (3, 6, 5)),
    "merge": (layers.EinsumDense("abcd,cde->abe", (6, 4)), (3, 6, 2, 5)),
    "merge, kernel transposed": (layers.EinsumDense("abcd,edc->abe", (6, 4)), (3, 6, 2, 5)),
    "dots first": (layers.EinsumDense("...x,xy->...y", 4), (3, 6, 5)),
    "dots last": (layers.EinsumDense("ab...,bc->ac...", (4, None)), (3, 5, 1)),
    "same": (layers.Conv2D(4, (3, 2), padding="same"), (2, 7, 6, 3)),
    "strides": (layers.Conv2D(4, 3, strides=2, padding="same"), (2, 7, 6, 3)),
    "dilation": (layers.Conv2D(4, 2, dilation_rate=2), (2, 7, 6, 3)),
    "pointwise": (layers.Conv2D(4, 1), (2, 7, 6, 3)),
    "one dimension": (layers.Conv1D(4, 3, strides=2), (2, 9, 3)),
    "causal": (layers.Conv1D(4, 3, padding="causal", dilation_rate=2), (2, 9, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_rows_times_matrix(name):
    layer, shape = CASES[name]
    keras.utils.set_random_seed(0)
    x = keras.ops.convert_to_tensor(np.random.default_rng(0).normal(size=shape).astype("float32"))
    expected = keras.ops.convert_to_numpy(layer(x))
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    matrix = matrix_of(layer)
    flat = matrix.flatten(kernel)
    np.testing.assert_array_equal(matrix.restore(flat, kernel.shape), kernel)
    np.testing.assert_allclose((matrix.rows(x) @ flat).ravel(), expected.ravel(), atol=1e-5)


def test_scales_are_flattened_as_kernels_are():
    layer = layers.EinsumDense("abcd,edc->abe", (6, 4))
    layer.build((3, 6, 2, 5))
    matrix = matrix_of(layer)
    scale = np.arange(4.0).reshape(4, 1, 1)
    assert matrix.flatten(scale).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "layer",
    [
        layers.DepthwiseConv2D(3),
        layers.Conv2D(4, 3, groups=2),
        layers.Conv2DTranspose(4, 3),
        layers.EinsumDense("abc,bcd->abd", (6, 4)),  # a kernel for each position
        layers.EinsumDense("abc,cd->ad", (4,)),  # positions are summed before the kernel
    ],
    ids=["depthwise", "grouped", "transposed", "batched", "summed"],
)
def test_others_are_no_matrices(layer):
    layer.build((2, 6, 5) if isinstance(layer, layers.EinsumDense) else (2, 8, 8, 4))
    assert matrix_of(layer) is None
