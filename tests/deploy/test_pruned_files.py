"""2:4 in the files: of each 4 neighbours along the inputs of a weight at most 2 are not zero, in float and in int8."""

from __future__ import annotations

import keras
import numpy as np
import onnx
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers
from onnx import numpy_helper

import compress

X = np.random.default_rng(0).normal(size=(64, 8, 8, 4)).astype("float32")


@pytest.fixture(scope="module")
def pruned():
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 4))
    y = layers.Conv2D(8, 3, use_bias=False)(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.Conv2D(16, 1, activation="relu")(y)
    y = layers.Dense(12, activation="relu")(layers.Flatten()(y))
    return compress.prune_weights(keras.Model(x, layers.Dense(5)(y)), pattern="2:4")


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_every_group_of_four_inputs(pruned, tmp_path, scheme):
    model = pruned
    if scheme:
        model = compress.calibrate(compress.fake_quantize(pruned, scheme), X)
    paths = {kind: tmp_path / f"m.{kind}" for kind in ("tflite", "onnx")}
    compress.export_models(model, paths, samples=X)
    for weights in (tflite_weights(paths["tflite"]), onnx_weights(paths["onnx"])):
        assert len(weights) == 4
        for weight in weights:
            groups = weight.reshape(-1, 4)
            assert (np.count_nonzero(groups, axis=1) <= 2).all()
            assert np.count_nonzero(groups) >= 0.9 * groups.size / 2


def tflite_weights(path) -> list[np.ndarray]:
    """Return the weights of a file with the inputs last, as TFLite has them."""
    interpreter = Interpreter(str(path))
    found = []
    for details in interpreter.get_tensor_details():
        try:
            values = interpreter.get_tensor(details["index"])
        except ValueError:  # computed while the file runs
            continue
        if values.ndim >= 2 and values.dtype in (np.float32, np.int8):
            found.append(values)
    return found


def onnx_weights(path) -> list[np.ndarray]:
    """Return the weights of a file with the inputs last, less their zero point."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = []
    for name, values in constants.items():
        if values.ndim < 2 or values.dtype not in (np.float32, np.uint8):
            continue
        readers = [node for node in graph.node if name in node.input]
        weight = values.astype("int32") - 128 if values.dtype == np.uint8 else values
        turned = any(each.i for node in readers for each in node.attribute if each.name == "transB")
        found.append(np.moveaxis(weight, 1, -1) if weight.ndim == 4 or turned else weight.T)
    return found
