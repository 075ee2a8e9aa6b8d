"""Sizes against kernels that are known number by number, in each format and quantization."""

from __future__ import annotations

import gzip
import hashlib

import numpy as np
import onnx
import pytest
import zstandard
from ai_edge_litert.schema_py_generated import TensorType
from onnx import helper

from compress.errors import ModelError
from compress.measure import tflite_contents
from compress.measure.keras_contents import read_keras
from compress.measure.onnx_contents import read_onnx
from compress.measure.size import measure_size, read_size
from compress.measure.tflite_contents import read_tflite

KERNEL = np.array([[1, 0, 2], [0, 0, 2], [3, 0, 1], [1, 1, 1]], np.float32)  # 4 zeros, 4 distinct values


def _counts(contents):
    weights = contents.weights
    return (
        weights.parameters,
        weights.nonzero_parameters,
        weights.kernel_weights,
        weights.nonzero_kernel_weights,
    )


def test_onnx_file_in_a_child_process(make_dense_onnx):
    path = make_dense_onnx("net", KERNEL, np.ones((3, 2)))
    size, sha256 = measure_size(path)
    content = path.read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert size.file_bytes == len(content)
    assert size.gzip_bytes == len(gzip.compress(content, 6, mtime=0))
    assert size.zstd_bytes == len(zstandard.ZstdCompressor(19).compress(content))
    assert [(k.name, k.shape, k.zeros, k.distinct, k.distinct_in_channel) for k in size.kernels] == [
        ("kernel_0", (4, 3), 4, 4, 3),
        ("kernel_1", (3, 2), 0, 1, 1),
    ]
    assert (size.parameters, size.nonzero_parameters) == (18, 14)
    assert (size.kernel_weights, size.nonzero_kernel_weights) == (18, 14)
    assert size.sparsity == pytest.approx(4 / 18)
    assert size.distinct_weights == 4 + 1
    assert (size.macs, size.macs_partial, size.uncounted_ops) == (12 + 6, False, [])


def test_onnx_counts_biases_but_no_shapes_and_no_folded_norms_as_kernels(make_onnx):
    nodes = [
        helper.make_node("Gemm", ["x", "kernel", "bias"], ["h"]),
        helper.make_node("Mul", ["h", "scale"], ["s"]),
        helper.make_node("Reshape", ["s", "shape"], ["y"]),
    ]
    constants = {
        "kernel": KERNEL,
        "bias": np.float32([0, 1, 2]),
        "scale": np.ones((1, 3), np.float32),
        "shape": np.int64([-1, 3]),
    }
    contents = read_onnx(make_onnx("net", nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, constants))
    assert _counts(contents) == (18, 13, 12, 8)
    assert (contents.macs, contents.uncounted) == (12, set())


def test_onnx_convolutions(make_onnx):
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c", "depthwise"], ["d"], group=5),
        helper.make_node("ConvTranspose", ["d", "up"], ["y"], strides=[2, 2]),
    ]
    shapes = {"conv": (5, 3, 3, 3), "depthwise": (5, 1, 3, 3), "up": (5, 2, 2, 2)}
    constants = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    path = make_onnx("net", nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 2, 12, 12]}, constants)
    assert read_onnx(path).macs == 8 * 8 * 5 * 27 + 6 * 6 * 5 * 9 + 6 * 6 * 5 * 2 * 4


def test_onnx_quantized_zeros_are_zero_points(make_onnx):
    nodes = [
        helper.make_node("DequantizeLinear", ["kernel", "scale", "zero"], ["k"], axis=1),
        helper.make_node("MatMul", ["x", "k"], ["h"]),
        helper.make_node("DequantizeLinear", ["bias", "bias_scale"], ["b"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    constants = {
        "kernel": np.uint8([[128, 7], [130, 0], [128, 9]]),
        "scale": np.float32([0.1, 0.2]),
        "zero": np.uint8([128, 7]),
        "bias": np.int32([0, 5]),
        "bias_scale": np.float32(0.1),
    }
    contents = read_onnx(make_onnx("net", nodes, {"x": ["n", 3]}, {"y": ["n", 2]}, constants))
    assert _counts(contents) == (8, 4, 6, 3)
    assert contents.macs == 6


@pytest.mark.parametrize("stored", [np.int8([[0, 7], [2, 0], [1, 9]]), np.uint8([[0, 7], [2, 0], [1, 9]])])
def test_onnx_scales_that_integers_are_multiplied_by_are_no_weights(make_onnx, stored):
    nodes = [
        helper.make_node("Cast", ["kernel"], ["k"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Gather", ["scale", "block_of"], ["s"], axis=0),
        helper.make_node("Mul", ["k", "s"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "gain"], ["y"]),
    ]
    constants = {
        "kernel": stored,
        "scale": np.float32([[0.1, 0.2], [0.3, 0.4]]),
        "block_of": np.int32([0, 0, 1]),
        "gain": np.float32([1, 2]),
    }
    contents = read_onnx(make_onnx("net", nodes, {"x": ["n", 3]}, {"y": ["n", 2]}, constants))
    assert _counts(contents) == (8, 6, 6, 4)


def test_onnx_scales_of_products_with_grids_made_at_run_time_are_no_weights(make_onnx):
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "step", "point"]),
        helper.make_node("MatMulInteger", ["q", "kernel", "point", "zero"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["step", "scale"], ["steps"]),
        helper.make_node("Mul", ["floats", "steps"], ["h"]),
        helper.make_node("Add", ["h", "bias"], ["y"]),
    ]
    constants = {
        "kernel": np.uint8([[128, 7], [130, 0], [128, 9]]),
        "zero": np.uint8(128),
        "scale": np.float32([0.1, 0.2]),
        "bias": np.float32([1, 2]),
    }
    contents = read_onnx(make_onnx("net", nodes, {"x": ["n", 3]}, {"y": ["n", 2]}, constants))
    assert _counts(contents) == (8, 6, 6, 4)


def test_onnx_work_that_is_not_counted_is_named(make_onnx):
    nodes = [helper.make_node("Einsum", ["x", "kernel"], ["y"], equation="ni,io->no")]
    contents = read_onnx(make_onnx("net", nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, {"kernel": KERNEL}))
    assert (contents.macs, contents.uncounted) == (0, {"Einsum"})


def test_onnx_external_data_is_refused(make_dense_onnx, tmp_path):
    model = onnx.load(make_dense_onnx("net", KERNEL))
    path = tmp_path / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(ModelError, match="another file"):
        read_onnx(path)


def test_tflite_float(make_dense_tflite):
    contents = read_tflite(make_dense_tflite("net", KERNEL.T))
    assert _counts(contents) == (12, 8, 12, 8)
    assert (contents.weights.distinct, contents.macs, contents.uncounted) == (4, 12, set())


@pytest.mark.parametrize("kind", [TensorType.INT8, TensorType.INT4])
def test_tflite_quantized_zeros_are_zero_points(make_dense_tflite, kind):
    stored = np.array([[3, -7, 5], [0, 0, 1]])
    contents = read_tflite(make_dense_tflite("net", stored, kind, scales=(0.1, 0.2), zeros=(3, 0)))
    assert _counts(contents) == (6, 3, 6, 3)
    assert contents.weights.distinct == 5


def test_channels_are_found_in_each_layout(make_dense_tflite, make_onnx):
    kernel = np.float32([[1, 2, 3, 0], [1, 1, 1, 1]])  # of two outputs
    (count,) = read_tflite(make_dense_tflite("net", kernel)).weights.kernels
    assert (count.name, count.shape, count.zeros, count.distinct, count.distinct_in_channel) == (
        "kernel",
        (2, 4),
        1,
        4,
        4,
    )
    for name, values, node in (
        ("across", kernel.T, helper.make_node("Gemm", ["x", "k"], ["y"])),
        ("along", kernel, helper.make_node("Gemm", ["x", "k"], ["y"], transB=1)),
    ):
        (count,) = read_onnx(make_onnx(name, [node], {"x": ["n", 4]}, {"y": ["n", 2]}, {"k": values})).weights.kernels
        assert (count.distinct, count.distinct_in_channel) == (4, 4), name
    (count,) = read_tflite(make_dense_tflite("net", kernel.T)).weights.kernels
    assert (count.distinct, count.distinct_in_channel) == (4, 2)


def test_keras_file_counts_each_kernel(tmp_path):
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
    model.layers[0].kernel.assign(KERNEL)
    model.save(tmp_path / "net.keras")
    (count,) = read_keras(tmp_path / "net.keras").weights.kernels
    assert (count.name, count.zeros, count.distinct, count.distinct_in_channel) == ("head/kernel", 4, 4, 3)


def test_tflite_integers_without_scale_are_no_weights(make_dense_tflite):
    assert _counts(read_tflite(make_dense_tflite("net", KERNEL.T, TensorType.INT8))) == (0, 0, 0, 0)


def test_weights_that_cannot_be_read_are_not_guessed(make_dense_tflite):
    path = make_dense_tflite("net", KERNEL.T, TensorType.UINT4, scales=(0.1,), zeros=(0,))
    size = read_size(str(path))["size"]
    assert (size["parameters"], size["nonzero_kernel_weights"], size["sparsity"]) == (None, None, None)
    assert "weights of type UINT4" in size["reasons"]["parameters"]
    assert size["macs"] == 12


def test_damaged_files_are_model_errors(make_dense_tflite, tmp_path):
    path = make_dense_tflite("net", KERNEL.T)
    content = path.read_bytes()
    outcomes = set()
    for cut in range(8, len(content), 7):
        path.write_bytes(content[:cut])
        try:
            read_tflite(path)
        except ModelError:
            outcomes.add("refused")
    assert outcomes == {"refused"}
    (tmp_path / "text.onnx").write_bytes(b"\x08not a model")
    with pytest.raises(ModelError, match="not an ONNX model"):
        read_size(str(tmp_path / "text.onnx"))
    with pytest.raises(ModelError, match="does not exist"):
        read_size(str(tmp_path / "none.onnx"))


@pytest.mark.parametrize(
    ("operator", "inputs", "output", "macs"),
    [
        ("CONV_2D", [(1, 8, 8, 6), (5, 3, 3, 2)], (1, 8, 8, 5), 64 * 5 * 18),  # 3 groups
        ("DEPTHWISE_CONV_2D", [(1, 8, 8, 6), (1, 3, 3, 6)], (1, 4, 4, 6), 16 * 6 * 9),
        ("TRANSPOSE_CONV", [(4,), (5, 2, 2, 3), (1, 4, 4, 3)], (1, 8, 8, 5), 16 * 3 * 20),
        ("FULLY_CONNECTED", [(1, 7, 4), (3, 4)], (1, 7, 3), 7 * 12),
        ("ADD", [(1, 4), (1, 4)], (1, 4), None),
    ],
)
def test_tflite_operators(operator, inputs, output, macs):
    assert tflite_contents._operator_macs(None, operator, inputs, output) == macs
