"""Sparse weights in TFLite files: what is kept, that nothing else changes, and that files get smaller."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.deploy.exporting import export_model
from compress.deploy.tflite_flatbuffer import Op, TfliteFile
from compress.deploy.tflite_sparse import _parameters, decode_sparse, encode_sparse, write_sparse
from compress.measure.tflite_contents import read_tflite

L = keras.layers


def test_what_is_kept_of_a_matrix():
    array = np.zeros((3, 8), "float32")
    array[0, 5], array[2, 1], array[2, 7] = 1, 2, 3
    sparse = encode_sparse(array)
    assert (sparse.order, sparse.sparse, sparse.block[1]) == ((0, 1), 1, 1)
    assert sparse.values.tolist() == [1, 2, 3]
    assert sparse.indices.tolist() == [5, 1, 7]
    assert sparse.segments.tolist() == [0, 1, 1, 3]
    assert sparse.size_bytes == 3 * 4 + 3 + 4


def test_whole_blocks_are_kept_together():
    array = np.zeros((4, 16), "int8")
    array[1, 4:8], array[3, 12:16] = 7, 9
    sparse = encode_sparse(array)
    assert sparse.block == (1, 4)
    assert sparse.values.tolist() == [7] * 4 + [9] * 4
    assert np.array_equal(decode_sparse(_parameters(sparse), sparse.values, array.shape), array)


def test_what_does_not_get_smaller_stays_dense():
    assert encode_sparse(np.ones((8, 8), "float32")) is None
    order = np.argsort(np.random.default_rng(0).random((16, 8, 4)), axis=-1)
    half = (order < 2).astype("int8").reshape(16, 32)  # 2:4 in one byte each: an index costs what a zero does
    assert encode_sparse(half) is None


def test_zeros_of_both_signs_are_left_out():
    assert not encode_sparse(np.full((2, 64), -0.0, "float32")).values.size


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_array_comes_back(data):
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 17]), min_size=2, max_size=4)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    array = rng.integers(-127, 128, shape).astype(data.draw(st.sampled_from(["int8", "float32"])))
    array[rng.random(shape) < data.draw(st.sampled_from([0.5, 0.8, 0.95, 1.0]))] = 0
    sparse = encode_sparse(array)
    if sparse is not None:
        assert sparse.size_bytes < array.nbytes
        assert np.array_equal(decode_sparse(_parameters(sparse), sparse.values, shape), array)


def test_damaged_layouts_are_refused():
    sparse = encode_sparse(np.eye(16, dtype="float32"))
    for attribute, value in (("traversalOrder", [0, 0]), ("dimMetadata", [])):
        parameters = _parameters(sparse)
        setattr(parameters, attribute, value)
        with pytest.raises(ValueError, match="sparse tensor"):
            decode_sparse(parameters, sparse.values, (16, 16))
    parameters = _parameters(sparse)
    parameters.dimMetadata[0].denseSize = 2**30
    with pytest.raises(ValueError, match="size"):
        decode_sparse(parameters, sparse.values, (16, 16))
    with pytest.raises(ValueError, match="keeps 16 values and has 3"):
        decode_sparse(_parameters(sparse), sparse.values[:3], (16, 16))


@pytest.fixture(scope="module")
def pruned():
    """A model with each kernel that can be stored sparsely, 85 % zeros, in blocks for one of them; and samples."""
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 16))
    y = L.Conv2D(32, 3, padding="same", activation="relu", name="conv")(x)
    y = L.DepthwiseConv2D(5, depth_multiplier=4, name="depthwise")(y)
    y = L.Conv2DTranspose(16, 3, strides=2, name="up")(y)
    model = keras.Model(x, L.Dense(96, name="dense")(L.Dense(48, name="small")(L.Flatten()(L.MaxPooling2D(4)(y)))))
    rng = np.random.default_rng(0)
    for layer in ("conv", "depthwise", "up", "small", "dense"):
        kernel = model.get_layer(layer).kernel
        mask = rng.random(kernel.shape) < 0.15
        if layer == "conv":  # blocks of four inputs
            mask = np.repeat(rng.random((3, 3, 4, 32)) < 0.15, 4, axis=2)
        kernel.assign(kernel.numpy() * mask)
    return model, rng.normal(size=(8, 8, 8, 16)).astype("float32")


@pytest.mark.parametrize("scheme", [None, "int8", "int8_dynamic"])
def test_files_get_smaller_and_compute_the_same(pruned, tmp_path, scheme):
    model, x = pruned
    if scheme:
        model = compress.fake_quantize(model, scheme)
    if scheme == "int8":
        compress.calibrate(model, x)
    path = tmp_path / "net.tflite"
    record = export_model(model, path, samples=x)
    dense = path.read_bytes()
    sparse, names = write_sparse(dense)
    # Int8 dense layers and data that is quantized at run time are refused by XNNPACK with computed weights.
    assert len(names) == {None: 5, "int8": 3, "int8_dynamic": 0}[scheme]
    assert record.size_bytes == len(dense)
    assert len(sparse) < {None: 0.4, "int8": 0.8, "int8_dynamic": 1.01}[scheme] * len(dense)
    for resolver in (OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES):
        expected = _run(dense, x, resolver)
        assert np.array_equal(_run(sparse, x, resolver), expected)
    (tmp_path / "sparse.tflite").write_bytes(sparse)
    before, after = read_tflite(path), read_tflite(tmp_path / "sparse.tflite")
    key = [(kernel.shape, kernel.zeros, kernel.distinct) for kernel in before.weights.kernels]
    assert sorted((kernel.shape, kernel.zeros, kernel.distinct) for kernel in after.weights.kernels) == sorted(key)
    assert (after.macs, after.unread, after.weights.parameters) == (before.macs, set(), before.weights.parameters)


def test_the_option_says_what_it_did(pruned, tmp_path):
    model, x = pruned
    record = export_model(model, tmp_path / "net.tflite", samples=x, sparse="auto")
    assert any("stores 5 weights without their zeros" in note for note in record.notes)
    assert record.size_bytes == (tmp_path / "net.tflite").stat().st_size
    operators = [TfliteFile((tmp_path / "net.tflite").read_bytes())]
    assert [operators[0].code(each) for each in operators[0].graphs[0].operators].count(Op.DENSIFY) == 5


def _run(content: bytes, x: np.ndarray, resolver: OpResolverType) -> np.ndarray:
    interpreter = Interpreter(model_content=content, num_threads=1, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    outputs = []
    for sample in x:  # what is densified once must stay
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], sample[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy())
    return np.stack(outputs)
