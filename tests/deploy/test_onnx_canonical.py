"""Equal graphs get equal bytes, whatever their nodes are called and in which order they stand."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.deploy.onnx_canonical import canonicalize


def _model(nodes, constants, outputs):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(
        nodes,
        "any",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        values,
        [numpy_helper.from_array(np.array(value, "float32"), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _canonical(model):
    canonicalize(model, lambda name: name.partition("/")[0] if "/" in name else "")
    onnx.checker.check_model(model)
    return model


def test_names_and_order_do_not_matter():
    def make(names, swapped):
        first = helper.make_node("MatMul", ["x", names[0]], [names[1]], name="dense/" + names[1])
        second = helper.make_node("Relu", ["x"], [names[2]], name=names[2])
        last = helper.make_node("Add", [names[1], names[2]], ["y"], name=names[3])
        unused = helper.make_node("Abs", ["x"], [names[3]], name="unused")
        nodes = [second, unused, first, last] if swapped else [first, second, last]
        return _canonical(_model(nodes, {names[0]: [[1, 2], [3, 4]]}, {"y": [None, 2]}))

    model = make("abcd", swapped=False)
    assert model.SerializeToString() == make("qrst", swapped=True).SerializeToString()
    assert [node.name for node in model.graph.node] == ["dense/MatMul", "Relu_0", "Add_0"]
    assert [tensor.name for tensor in model.graph.initializer] == ["dense/MatMul/input_1"]
    x = np.array([[1, -1]], "float32")
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_array_equal(found, [[-1, -2]])  # x @ [[1, 2], [3, 4]] + relu(x)


def test_an_output_that_is_a_constant_stays():
    model = _canonical(
        _model([helper.make_node("Add", ["x", "c"], ["y"], name="n")], {"c": [5, 6]}, {"y": [None, 2], "c": [2]})
    )
    y, c = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": np.ones((1, 2), "float32")})
    np.testing.assert_array_equal(y, [[6, 7]])
    np.testing.assert_array_equal(c, [5, 6])


@pytest.mark.parametrize("swapped", [False, True])
def test_variables_of_a_loop_are_sorted_by_what_they_compute(swapped):
    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    states = [("double", "one", "two"), ("grow", "one", "three")]  # each starts with 1
    states = states[::-1] if swapped else states
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["still"]),
            helper.make_node("Add", ["in_double", "in_double"], ["out_double"]),
            helper.make_node("Mul", ["in_grow", "three"], ["out_grow"]),
        ],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])]
        + [value(f"in_{name}", TensorProto.FLOAT, []) for name, _, _ in states],
        [value("still", TensorProto.BOOL, [])] + [value(f"out_{name}", TensorProto.FLOAT, []) for name, _, _ in states],
    )
    loop = helper.make_node(
        "Loop", ["count", "", "one", "one"], [f"last_{name}" for name, _, _ in states], name="loop", body=body
    )
    model = _model(
        [loop, helper.make_node("Sub", ["last_grow", "last_double"], ["y"], name="sub")],
        {"one": 1, "three": 3},
        {"y": []},
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(3, "int64"), "count"))
    content = _canonical(model).SerializeToString()
    assert onnxruntime.InferenceSession(content).run(None, {"x": np.ones((1, 2), "float32")})[0] == 27 - 8
    bodies = [node.attribute[0].g for node in model.graph.node if node.op_type == "Loop"]
    carried = {out.name: source.name for source, out in zip(bodies[0].input[2:], bodies[0].output[1:], strict=True)}
    order = [next(node.op_type for node in bodies[0].node if node.output[0] == out) for out in carried]
    assert order == ["Mul", "Add"]  # the order of their digests, whichever stood first
