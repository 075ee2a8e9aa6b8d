"""ONNX files for the gate: two answers in each sample, and a net that picks one of them after some work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

CLASSES = 10


def write_net(path: Path, answer: int, layers: int, width: int = 64, output: str = "y") -> Path:
    """Write a net whose scores are the answer 0 or 1 of each sample, and whose time goes with `layers`."""
    generator = np.random.default_rng(0)
    nodes, weights = [], []

    def add(kind: str, inputs: list[str], name: str) -> str:
        nodes.append(helper.make_node(kind, inputs, [name]))
        return name

    def weight(name: str, value: np.ndarray) -> str:
        weights.append(helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.astype("float32").ravel()))
        return name

    choose = np.zeros((2 * CLASSES, CLASSES))
    choose[CLASSES * answer + np.arange(CLASSES), np.arange(CLASSES)] = 1
    scores = add("MatMul", ["x", weight("choose", choose)], "scores")
    last = add("MatMul", ["x", weight("first", generator.standard_normal((2 * CLASSES, width)) / 4)], "first_out")
    for layer in range(layers):
        kernel = generator.standard_normal((width, width)) / width**0.5
        last = add(
            "Tanh", [add("MatMul", [last, weight(f"kernel{layer}", kernel)], f"product{layer}")], f"layer{layer}"
        )
    nothing = add("MatMul", [last, weight("last", np.zeros((width, CLASSES)))], "nothing")
    add("Add", [scores, nothing], output)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2 * CLASSES])
    y = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", CLASSES])
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def write_samples(path: Path, samples: int, wrong: tuple[int, int]) -> Path:
    """Write samples of which the answers 0 and 1 are wrong on the first so many."""
    labels = np.random.default_rng(1).integers(0, CLASSES, samples)
    answers = []
    for number in wrong:
        said = np.where(np.arange(samples) < number, (labels + 1) % CLASSES, labels)
        answers.append(np.eye(CLASSES)[said])
    np.savez(path, x_test=np.concatenate(answers, axis=1).astype("float32"), y_test=labels)
    return path
