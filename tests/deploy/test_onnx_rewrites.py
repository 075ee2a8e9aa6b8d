"""Rewrites of ONNX graphs: each keeps what the graph computes and makes the form that kernels have."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.deploy.onnx_activations import place_activations, shield_floats
from compress.deploy.onnx_graph import OnnxGraph
from compress.deploy.onnx_runtime import GRIDS_KEY, OnnxRuntime
from compress.deploy.onnx_shapes import read_shapes
from compress.deploy.onnx_steps import Step
from compress.deploy.onnx_stored import Layout, find_layout, place_tables, store_weights
from compress.deploy.onnx_structure import simplify_structure
from compress.errors import ModelError
from compress.quantization.stored import StoredWeight


def _model(nodes, constants, shape, output_rank, opset=17):
    values = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * output_rank)]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([helper.make_node(*node[:3], **node[3]) for node in nodes], "g", given, values, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _run(model, x):
    for node in model.graph.node:
        node.name = ""  # names are given in the end
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


def _kinds(model):
    return [node.op_type for node in model.graph.node]


def _pair(source, target, name="s"):
    return [
        ("QuantizeLinear", [source, f"{name}_scale", f"{name}_zero"], [f"{target}_q"], {}),
        ("DequantizeLinear", [f"{target}_q", f"{name}_scale", f"{name}_zero"], [target], {}),
    ]


def _grid(scale, zero, name="s"):
    return {f"{name}_scale": np.float32(scale), f"{name}_zero": np.uint8(zero)}


def _placed(model):
    graph = OnnxGraph(model)
    place_activations(graph)
    graph.write()
    return model


X = np.random.default_rng(0).normal(0, 1, (3, 4)).astype("float32")


def test_a_one_dimensional_convolution_is_one():
    kernel = np.random.default_rng(1).normal(size=(5, 4, 1, 3)).astype("float32")
    nodes = [
        ("Unsqueeze", ["x", "axis"], ["a"], {}),
        ("Transpose", ["a"], ["b"], {"perm": [0, 3, 1, 2]}),
        ("Conv", ["b", "kernel"], ["c"], {"kernel_shape": [1, 3], "pads": [0, 1, 0, 2], "dilations": [1, 2]}),
        ("Squeeze", ["c", "axis_2"], ["d"], {}),
        ("Add", ["d", "bias"], ["y"], {}),
    ]
    bias = np.arange(5, dtype="float32").reshape(1, 5, 1)
    constants = {"kernel": kernel, "bias": bias, "axis": np.array([1]), "axis_2": np.array([2])}
    model = _model(nodes, constants, ["n", 9, 4], 3)
    x = np.random.default_rng(2).normal(size=(2, 9, 4)).astype("float32")
    before = _run(model, x)
    graph = OnnxGraph(model)
    simplify_structure(graph, read_shapes(model), products=True)
    graph.write()
    assert _kinds(model) == ["Transpose", "Conv"]
    np.testing.assert_allclose(_run(model, x), before, rtol=1e-5, atol=1e-5)


def test_zeros_around_an_image_are_padding_of_the_convolution():
    kernel = np.random.default_rng(1).normal(size=(2, 1, 3, 3)).astype("float32")
    nodes = [
        ("Pad", ["x", "pads"], ["a"], {}),
        ("Conv", ["a", "kernel"], ["y"], {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ]
    model = _model(nodes, {"kernel": kernel, "pads": np.array([0, 0, 1, 0, 0, 0, 2, 1])}, ["n", 1, 6, 6], 4)
    x = np.random.default_rng(2).normal(size=(2, 1, 6, 6)).astype("float32")
    before = _run(model, x)
    graph = OnnxGraph(model)
    simplify_structure(graph, read_shapes(model), products=True)
    graph.write()
    assert _kinds(model) == ["Conv"]
    np.testing.assert_allclose(_run(model, x), before, rtol=1e-5, atol=1e-5)


def test_products_with_a_bias_behind_a_reshape_become_gemm():
    kernel = np.random.default_rng(1).normal(size=(4, 6)).astype("float32")
    nodes = [
        ("MatMul", ["x", "kernel"], ["a"], {}),
        ("Reshape", ["a", "shape"], ["b"], {}),
        ("Add", ["bias", "b"], ["y"], {}),
    ]
    bias = np.arange(6, dtype="float32").reshape(2, 3)
    model = _model(nodes, {"kernel": kernel, "shape": np.array([-1, 5, 2, 3]), "bias": bias}, ["n", 5, 4], 4)
    x = np.random.default_rng(2).normal(size=(2, 5, 4)).astype("float32")
    before = _run(model, x)
    graph = OnnxGraph(model)
    simplify_structure(graph, read_shapes(model), products=True)
    graph.write()
    assert _kinds(model) == ["Reshape", "Gemm", "Reshape"]
    np.testing.assert_allclose(_run(model, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "zero", "dropped"),
    [
        (("Relu", {}), 0, True),
        (("Relu", {}), 7, True),  # the grid goes below 0: the part from 0 on clips instead
        (("Clip", {"low": 0.0, "high": 2.55}), 0, True),
        (("Clip", {"low": 0.0, "high": 2.0}), 0, False),  # the grid goes beyond the limit
    ],
)
def test_clipping_is_dropped_only_where_the_grid_clips_the_same_way(node, zero, dropped):
    constants = {**_grid(0.01, zero), **{name: np.float32(value) for name, value in node[1].items()}}
    model = _model([(node[0], ["x", *node[1]], ["a"], {}), *_pair("a", "y")], constants, ["n", 4], 2)
    before = _run(model, 3 * X)
    assert (node[0] not in _kinds(_placed(model))) == dropped
    np.testing.assert_array_equal(_run(model, 3 * X), before)


def test_grids_spread_over_operators_that_move_values():
    nodes = [
        *_pair("x", "a"),
        ("Transpose", ["a"], ["b"], {"perm": [1, 0]}),
        ("Reshape", ["b", "shape"], ["c"], {}),
        ("Exp", ["c"], ["d"], {}),
        ("Squeeze", ["d", "axis"], ["e"], {}),
        *_pair("e", "y", "t"),
    ]
    constants = {**_grid(0.02, 128), **_grid(0.1, 0, "t"), "shape": np.array([1, 12]), "axis": np.array([0])}
    model = _model(nodes, constants, [3, 4], 1)
    before = _run(model, X)
    kinds = _kinds(_placed(model))
    pair = ["QuantizeLinear", "DequantizeLinear"]
    assert kinds == [*pair, "Transpose", *pair, "Reshape", *pair, "Exp", *pair, "Squeeze", *pair]
    np.testing.assert_array_equal(_run(model, X), before)


@pytest.mark.parametrize(
    ("kind", "value"), [("Mul", 0.125), ("Mul", -3.0), ("Add", 0.7), ("Sub", 0.7), ("Div", 4.0), ("Add", 0.0)]
)
def test_numbers_become_one_step_of_their_own_grid(kind, value):
    nodes = [*_pair("x", "a"), (kind, ["a", "c"], ["b"], {}), *_pair("b", "y", "t")]
    constants = {**_grid(0.02, 128), **_grid(0.031, 120, "t"), "c": np.float32(value)}
    model = _model(nodes, constants, ["n", 4], 2)
    before = _run(model, X)
    kinds = _kinds(_placed(model))
    assert kinds.count("DequantizeLinear") == 3
    assert kinds.count("Add") + kinds.count("Mul") == 1
    np.testing.assert_array_equal(_run(model, X), before)


def test_what_is_concatenated_onto_a_grid_lies_on_one():
    nodes = [
        *_pair("x", "a"),
        ("Exp", ["a"], ["b"], {}),
        ("Concat", ["a", "b"], ["c"], {"axis": 1}),
        *_pair("c", "y", "t"),
    ]
    model = _model(nodes, {**_grid(0.02, 128), **_grid(0.05, 40, "t")}, ["n", 4], 2)
    before = _run(model, X)
    pair = ["QuantizeLinear", "DequantizeLinear"]
    assert _kinds(_placed(model)) == [*pair, "Exp", *pair, "Concat", *pair]
    np.testing.assert_array_equal(_run(model, X), before)


def test_padding_of_a_pooled_tensor_adds_zero_points():
    nodes = [*_pair("x", "a"), ("Pad", ["a", "pads"], ["b"], {}), ("MaxPool", ["b"], ["y"], {"kernel_shape": [2]})]
    model = _model(nodes, {**_grid(0.02, 100), "pads": np.array([0, 0, 1, 0, 0, 1])}, ["n", 3, 4], 3)
    x = np.stack([X, 2 * X])
    before = _run(model, x)
    model = _placed(model)
    pad = next(node for node in model.graph.node if node.op_type == "Pad")
    assert next(node for node in model.graph.node if pad.input[0] in node.output).op_type == "QuantizeLinear"
    np.testing.assert_array_equal(_run(model, x), before)


def test_float_weights_behind_quantized_inputs_are_kept_apart():
    kernel = np.random.default_rng(1).normal(size=(4, 6)).astype("float32")
    model = _model(
        [*_pair("x", "a"), ("MatMul", ["a", "kernel"], ["y"], {})], {**_grid(0.02, 128), "kernel": kernel}, ["n", 4], 2
    )
    graph = OnnxGraph(model)
    shield_floats(graph, {})
    graph.write()
    assert _kinds(model) == ["QuantizeLinear", "DequantizeLinear", "Sum", "MatMul"]


def test_tables_are_looked_up_in_integers():
    table = np.array([[1, -2], [3, 4], [-127, 127]], "int8")
    weight = StoredWeight("table/embeddings", "table", table, np.array([[0.5, 0.25]], "float32"))
    nodes = [("Cast", ["x"], ["i"], {"to": TensorProto.INT64}), ("Gather", ["table", "i"], ["y"], {})]
    model = _model(nodes, {"table": weight.dequantize()}, [None], 2)
    graph = OnnxGraph(model)
    placed = store_weights(graph, [weight], unsigned=True, packed=False, is_folded=lambda operator: False)
    place_tables(graph, placed)
    graph.write()
    assert _kinds(model) == ["Cast", "Gather", "DequantizeLinear"]
    np.testing.assert_array_equal(_run(model, np.array([2, 0], "float32")), [[-63.5, 31.75], [0.5, -0.5]])


def test_layouts_are_found_by_content():
    variable = np.arange(24, dtype="float32").reshape(2, 3, 4) + 1
    assert find_layout(variable, variable.transpose(2, 0, 1).reshape(4, 6)) == Layout(None, (2, 0, 1), (4, 6))
    assert find_layout(variable, variable.reshape(1, 6, 4)) == Layout(None, (0, 1, 2), (1, 6, 4))
    assert find_layout(variable, variable[:, ::-1].reshape(6, 4)) is None
    kernel = np.arange(24, dtype="float32").reshape(3, 8) + 1  # input, forget, cell and output of two units each
    gates = np.concatenate([kernel[:, 0:2], kernel[:, 6:8], kernel[:, 2:4], kernel[:, 4:6]], axis=1).T[np.newaxis]
    assert find_layout(kernel, gates) is None
    layout = find_layout(kernel, gates, recurrent=True)
    np.testing.assert_array_equal(layout.apply(kernel), gates)


def test_steps():
    step = Step(0.5, 10, "uint8")
    assert [step.quantize(value) for value in (-100, 0, 0.74, 0.76, 1000)] == [0, 10, 11, 12, 255]
    assert step.signed() == Step(0.5, -118, "int8")


def test_shapes_with_open_sizes():
    nodes = [
        ("Shape", ["x"], ["s"], {}),
        ("Gather", ["s", "zero"], ["n"], {}),
        ("Concat", ["n", "rest"], ["target"], {"axis": 0}),
        ("Reshape", ["x", "target"], ["y"], {}),
    ]
    model = _model(nodes, {"zero": np.array([0]), "rest": np.array([2, 6])}, ["n", 3, 4], 3)
    assert read_shapes(model)["y"] == (None, 2, 6)


@pytest.mark.parametrize("text", ["[]", '{"inputs": {"x": {"scale": -1, "zero_point": 0}}}', "{"])
def test_damaged_metadata_is_an_error(tmp_path, text):
    model = _model([("Relu", ["x"], ["y"], {})], {}, ["n", 4], 2)
    helper.set_model_props(model, {GRIDS_KEY: text})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="scales and zero points"):
        OnnxRuntime(tmp_path / "m.onnx", 1)
