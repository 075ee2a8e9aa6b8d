"""Tiny model files made by hand, so that no test here needs a framework."""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper


def save_onnx(path: Path, nodes: list, inputs: dict, outputs: dict, constants: dict) -> Path:
    """Write a graph of `nodes`; inputs and outputs are float tensors by name and shape."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def save_dense_onnx(path: Path, *kernels: np.ndarray) -> Path:
    """Write a chain of products with `kernels`, each `(inputs, outputs)`, for any batch."""
    names = [f"h{index}" for index in range(len(kernels))] + ["y"]
    names[0] = "x"
    nodes = [helper.make_node("MatMul", [names[i], f"kernel_{i}"], [names[i + 1]]) for i in range(len(kernels))]
    constants = {f"kernel_{i}": kernel.astype(np.float32) for i, kernel in enumerate(kernels)}
    shapes = {"x": ["n", kernels[0].shape[0]]}, {"y": ["n", kernels[-1].shape[1]]}
    return save_onnx(path, nodes, *shapes, constants)


def save_dense_tflite(path: Path, kernel: np.ndarray, kind: int = 0, scales: tuple = (), zeros: tuple = ()) -> Path:
    """Write one FULLY_CONNECTED operator; `kernel` holds the stored numbers `(outputs, inputs)`."""
    outputs, inputs = kernel.shape

    def tensor(name: str, shape: tuple, buffer: int) -> schema.TensorT:
        made = schema.TensorT()
        made.name, made.shape, made.buffer, made.type = name, list(shape), buffer, schema.TensorType.FLOAT32
        return made

    weights = tensor("kernel", kernel.shape, 1)
    weights.type = kind
    if scales:
        weights.quantization = schema.QuantizationParametersT()
        weights.quantization.scale, weights.quantization.zeroPoint = list(scales), list(zeros)
    operator, code, graph = schema.OperatorT(), schema.OperatorCodeT(), schema.SubGraphT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = 1
    operator.inputs, operator.outputs = [0, 1, -1], [2]
    operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    operator.builtinOptions = schema.FullyConnectedOptionsT()
    graph.tensors = [tensor("x", (1, inputs), 0), weights, tensor("y", (1, outputs), 0)]
    graph.inputs, graph.outputs, graph.operators = [0], [2], [operator]
    empty, full, model = schema.BufferT(), schema.BufferT(), schema.ModelT()
    full.data = list(_stored_bytes(kernel, kind))
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [empty, full]
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def _stored_bytes(kernel: np.ndarray, kind: int) -> bytes:
    if kind == schema.TensorType.FLOAT32:
        return kernel.astype(np.float32).tobytes()
    if kind == schema.TensorType.INT8:
        return kernel.astype(np.int8).tobytes()
    nibbles = kernel.astype(np.int8).reshape(-1).view(np.uint8) & 15
    nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes()


@pytest.fixture
def make_dense_onnx(tmp_path):
    """Write `tmp_path/<name>.onnx` from kernels."""
    return lambda name, *kernels: save_dense_onnx(tmp_path / f"{name}.onnx", *kernels)


@pytest.fixture
def make_onnx(tmp_path):
    """Write `tmp_path/<name>.onnx` from nodes."""
    return lambda name, *parts: save_onnx(tmp_path / f"{name}.onnx", *parts)


@pytest.fixture
def make_dense_tflite(tmp_path):
    """Write `tmp_path/<name>.tflite` from one stored kernel."""
    return lambda name, *parts, **options: save_dense_tflite(tmp_path / f"{name}.tflite", *parts, **options)
