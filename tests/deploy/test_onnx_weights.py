"""ONNX files are the same whether tf2onnx sees large weights or they join at the end, and the latter takes less memory."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.deploy import detaching
from compress.deploy.conversion import Places
from compress.deploy.onnx_conversion import to_onnx
from compress.deploy.onnx_weights import add_stand_ins, embed_weights, fold_weights, fuse_scales, write_model
from compress.deploy.signature import read_signature
from compress.deploy.tracing import write_saved_model
from compress.models.walking import find_all_layers
from compress.worker import run_in_worker

L = keras.layers
MIB = 2**20


def _export(model, folder):
    signature = read_signature(model)
    saved = write_saved_model(model, signature, folder / "saved", ["onnx"])
    places = Places([layer.name for layer in find_all_layers(model)], model.name)
    inputs = [info.name for info in signature.inputs]
    to_onnx(str(saved.folder), saved.endpoints[0], inputs, saved.outputs, places, folder / "m.onnx", opset=17)
    return (folder / "m.onnx").read_bytes(), sorted(path.name for path in saved.folder.glob("detached/*.npy"))


def _mixture():
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = L.Embedding(10, 8, name="table")(tokens)
    x = L.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = L.Conv1D(8, 3, padding="same", name="conv")(x) + L.Dense(8, name="dense")(x)
    x = L.LSTM(4, name="lstm")(x)
    return keras.Model(tokens, L.Dense(3, activation="softmax", name="head")(x), name="mixture")


def test_files_are_the_same_with_and_without_detached_weights(tmp_path, monkeypatch):
    keras.utils.set_random_seed(0)
    model = _mixture()
    whole, kept = _export(model, tmp_path / "whole")
    monkeypatch.setattr(detaching, "_LARGE_BYTES", 0)
    apart, names = _export(model, tmp_path / "apart")
    assert kept == []
    assert len(names) == 8  # a table and kernels, 4 of them of attention, but none of the recurrent layer's 2
    assert apart == whole


def test_batch_normalization_joins_a_detached_convolution(tmp_path, monkeypatch):
    monkeypatch.setattr(detaching, "_LARGE_BYTES", 0)
    keras.utils.set_random_seed(0)
    layers = [L.Conv2D(4, 3), L.BatchNormalization(), L.ReLU(), L.DepthwiseConv2D(3), L.BatchNormalization()]
    model = keras.Sequential([keras.Input((8, 8, 2)), *layers])
    for variable in model.variables:
        variable.assign(np.random.default_rng(1).uniform(0.5, 1.5, variable.shape))
    content, names = _export(model, tmp_path)
    assert names == ["bmcompress_weight_0.npy", "bmcompress_weight_1.npy"]
    operators = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert sorted(set(operators) - {"Transpose"}) == ["Conv", "Relu"]
    assert operators.count("Conv") == 2
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 2), dtype="float32")
    session = onnxruntime.InferenceSession(content)
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x})[0], model(x), rtol=1e-4)


def _graph(nodes, weights, constants, outputs):
    """Return a model whose inputs are `x` and the weights."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in weights.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    made = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([helper.make_node(*node[:3], **node[3]) for node in nodes], "g", values, ends, made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _run(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})


@pytest.fixture
def moved():
    """A model that moves its two weights about before it takes them, and what it returns for `x`."""
    weights = {"w": np.arange(24, dtype="float32").reshape(2, 3, 4), "v": np.arange(12, dtype="float32").reshape(4, 3)}
    nodes = [
        ("Transpose", ["w"], ["a"], {"perm": [2, 0, 1]}),
        ("Reshape", ["a", "sizes"], ["b"], {}),  # [0, -1]: keeps 4, and 6 are left
        ("Unsqueeze", ["b", "first"], ["c"], {}),
        ("Squeeze", ["c", "first"], ["d"], {}),
        ("Identity", ["d"], ["e"], {}),
        ("MatMul", ["x", "e"], ["y"], {}),
        ("Relu", ["v"], ["r"], {}),  # computes, so it stays
        ("MatMul", ["x", "r"], ["z"], {}),
    ]
    constants = {"sizes": np.array([0, -1]), "first": np.array([0])}
    model = _graph(nodes, weights, constants, ["y", "z"])
    x = np.ones((2, 4), "float32")
    b = weights["w"].transpose(2, 0, 1).reshape(4, 6)
    return model, weights, x, [x @ b, x @ weights["v"]]


def test_moves_of_weights_are_computed_once(moved):
    model, weights, x, wanted = moved
    found = fold_weights(model.graph, weights)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Relu", "MatMul"]
    assert [value.name for value in model.graph.input] == ["x"]
    embed_weights(model.graph, found)
    assert found == {}
    for output, expected in zip(_run(model, x), wanted, strict=True):
        np.testing.assert_array_equal(output, expected)


def test_a_file_written_weight_by_weight_is_what_protobuf_writes(moved, tmp_path):
    model, weights, _, _ = moved
    model.doc_string, model.graph.doc_string, model.graph.initializer[0].doc_string = "one", "two", ""
    model.metadata_props.add(key="a", value="b")
    found = fold_weights(model.graph, weights)
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    embed_weights(whole.graph, dict(found))
    write_model(model, add_stand_ins(model.graph, found), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == whole.SerializeToString(deterministic=True)


def test_only_products_and_sums_per_channel_join_a_convolution():
    kernel = np.random.default_rng(0).standard_normal((4, 2, 1, 1)).astype("float32")
    constants = {
        "bias": np.arange(4, dtype="float32"),
        "scale": np.arange(1, 5, dtype="float32").reshape(1, 4, 1, 1),
        "one": np.float32(3),
        "wide": np.arange(4, dtype="float32"),  # along the last axis, not along channels
    }
    nodes = [
        ("Conv", ["x", "w", "bias"], ["a"], {}),
        ("Mul", ["scale", "a"], ["b"], {}),
        ("Add", ["b", "one"], ["c"], {}),
        ("Mul", ["c", "wide"], ["y"], {}),
    ]
    model = _graph(nodes, {"w": kernel}, constants, ["y"])
    x = np.random.default_rng(1).standard_normal((2, 2, 4, 4)).astype("float32")
    convolved = np.einsum("nihw,oi->nohw", x, kernel[:, :, 0, 0]) + constants["bias"].reshape(1, 4, 1, 1)
    wanted = (convolved * constants["scale"] + 3) * constants["wide"]
    found = fold_weights(model.graph, {"w": kernel})
    fuse_scales(model.graph, found)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Mul"]
    embed_weights(model.graph, found)
    np.testing.assert_allclose(_run(model, x)[0], wanted, rtol=1e-4, atol=1e-4)


def _memory_mib(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def convert_alone(folder, inputs, outputs):
    """Return by how many MiB a conversion takes this process above what it took before."""
    before = _memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    to_onnx(folder, ("serve", None), inputs, outputs, Places([], "m"), Path(folder) / "m.onnx", opset=17)
    return _memory_mib("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversion_takes_little_more_memory_than_the_weights(tmp_path):
    model = keras.Sequential([keras.Input((2048,)), *[L.Dense(2048, activation="relu") for _ in range(4)]])
    signature = read_signature(model)
    saved = write_saved_model(model, signature, tmp_path / "saved", ["onnx"])
    inputs = [info.name for info in signature.inputs]
    arguments = {"folder": str(saved.folder), "inputs": inputs, "outputs": saved.outputs}
    grown = run_in_worker("test_onnx_weights:convert_alone", arguments)
    weights = 4 * 4 * 2048**2 / MIB
    assert (saved.folder / "m.onnx").stat().st_size > weights * MIB
    assert grown < 5 * weights  # which counts the 100 MiB that TensorFlow takes for any graph; it was 46 times
