"""Nets of the kinds that people quantize, from Keras to both files: integer kernels, and the scales of the model."""

from __future__ import annotations

from types import SimpleNamespace

import keras
import numpy as np
import onnx
import pytest
from keras import layers as L
from onnx import numpy_helper

from compress.deploy.exporting import export_models
from compress.deploy.onnx_share import quantized_share
from compress.deploy.tflite_flatbuffer import Op, TfliteFile, Type
from compress.quantization.calibration import calibrate
from compress.quantization.deployment import snap_biases
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.layers import FakeQuant, QuantizedLayer


def normed(x, layer, activation=None):
    x = L.BatchNormalization(name=f"{layer.name}_norm")(layer(x))
    return x if activation is None else L.ReLU(activation, name=f"{layer.name}_relu")(x)


def conv(filters, size, stride=1, *, name):
    return L.Conv2D(filters, size, stride, padding="same", use_bias=False, name=name)


def head(x, inputs):
    return keras.Model(inputs, L.Dense(5, activation="softmax", name="head")(x), name="net")


def resnet():
    """The residual stages of ResNet8, narrow: one with an identity and two with a convolution as their shortcut."""
    inputs = keras.Input((12, 12, 3), name="image")
    x = L.ReLU(name="relu")(normed(inputs, conv(8, 3, name="stem")))
    for i, (filters, stride) in enumerate([(8, 1), (16, 2), (16, 2)]):
        y = L.ReLU(name=f"relu{i}")(normed(x, conv(filters, 3, stride, name=f"first{i}")))
        y = normed(y, conv(filters, 3, name=f"second{i}"))
        x = x if stride == 1 else normed(x, conv(filters, 1, stride, name=f"shortcut{i}"))
        x = L.Activation("relu", name=f"out{i}")(L.Add(name=f"add{i}")([x, y]))
    return head(L.GlobalAveragePooling2D(name="pool")(x), inputs)


def mobilenet():
    inputs = keras.Input((12, 12, 3), name="image")
    x = L.Rescaling(0.5, offset=-0.25, name="rescale")(inputs)
    x = normed(x, conv(8, 3, 2, name="stem"), 6.0)
    for i, (filters, stride) in enumerate([(16, 1), (16, 2)]):
        depthwise = L.DepthwiseConv2D(3, stride, padding="same", use_bias=False, name=f"depthwise{i}")
        x = normed(normed(x, depthwise, 6.0), conv(filters, 1, name=f"pointwise{i}"), 6.0)
    return head(L.Dropout(0.1, name="dropout")(L.GlobalAveragePooling2D(name="pool")(x)), inputs)


def transformer():
    inputs = keras.Input((16, 8), name="sequence")
    x = L.Dense(16, name="embed")(inputs)
    y = L.LayerNormalization(name="norm_a")(x)
    x = L.Add(name="add_a")([x, L.MultiHeadAttention(2, 8, name="attention")(y, y)])
    y = L.Dense(32, activation="gelu", name="up")(L.LayerNormalization(name="norm_b")(x))
    x = L.Add(name="add_b")([x, L.Dense(16, name="down")(y)])
    return head(L.GlobalAveragePooling1D(name="pool")(x), inputs)


def conv1d():
    inputs = keras.Input((32, 6), name="sound")
    x = L.MaxPooling1D(2, name="halve")(L.Conv1D(16, 5, padding="same", activation="relu", name="first")(inputs))
    x = normed(x, L.Conv1D(16, 3, padding="same", name="second"))
    return head(L.GlobalAveragePooling1D(name="pool")(L.ReLU(name="relu")(x)), inputs)


def lstm():
    inputs = keras.Input((12, 6), name="sound")
    return head(L.LSTM(16, name="lstm")(inputs), inputs)


NETS = {function.__name__: function for function in (resnet, mobilenet, transformer, conv1d, lstm)}
FLOAT = {"transformer": {"norm_a", "norm_b"}, "lstm": {"lstm"}}
"""Layers that TFLite computes in float; other nets have none."""
ONNX_FLOAT = {"transformer": ("norm_a", "norm_b", "after up"), "lstm": ("lstm",)}
FIXED = (1 / 256, -128)  # of a softmax


@pytest.fixture(scope="module", params=NETS)
def net(request, tmp_path_factory):
    """Return a net with both of its files and their records."""
    keras.utils.set_random_seed(0)
    model, generator = NETS[request.param](), np.random.default_rng(0)
    for variable in model.weights:  # as after training: no two alike, and none at its start
        spread = generator.uniform(-0.2, 0.2, variable.shape)
        variable.assign(variable + (0 if "kernel" in variable.name else spread))
    x = generator.normal(size=(64, *model.inputs[0].shape[1:])).astype("float32")
    quantized = snap_biases(calibrate(fake_quantize(model), x))
    folder = tmp_path_factory.mktemp(request.param)
    paths = {"tflite": folder / "m.tflite", "onnx": folder / "m.onnx"}
    records = {record.format: record for record in export_models(quantized, paths, samples=x)}
    return SimpleNamespace(name=request.param, model=quantized, paths=paths, records=records)


def test_onnx_runtime_computes_with_quantized_kernels(net):
    found = quantized_share(net.paths["onnx"])
    assert (found.macs > 0, found.uncounted) == (True, ())
    # ONNX has no LSTM on integers, and ONNX Runtime none with scales that are known beforehand.
    assert found.share == pytest.approx(80 / found.macs) if net.name == "lstm" else found.share >= 0.95
    kernels = {"Conv", "Gemm", "MatMul", "FusedMatMul", "FusedConv"}
    assert not kernels & set(found.operators)
    note = " ".join(net.records["onnx"].notes)
    assert bool(found.float_operators) == (net.name in ONNX_FLOAT) == bool(note)
    for layer in ONNX_FLOAT.get(net.name, ()):
        assert layer in note


def test_tflite_has_no_float_island_that_is_not_named(net):
    file = TfliteFile(net.paths["tflite"].read_bytes())
    graph, outputs = file.graphs[0], []
    for operator in graph.operators:
        if file.code(operator) not in (Op.QUANTIZE, Op.DEQUANTIZE):
            outputs += [graph.tensors[index] for index in operator.outputs]
    islands = [tensor.name.decode() for tensor in outputs if tensor.type == Type.FLOAT32]
    expected = FLOAT.get(net.name, set())
    assert all(any(layer in name for layer in expected) for name in islands)
    note = " ".join(net.records["tflite"].notes)
    assert all(layer in note for layer in expected)
    assert bool(note) == bool(expected) == bool(islands)


def test_both_files_carry_the_scales_of_the_model(net):
    quantizers = [layer for layer in net.model.layers if isinstance(layer, FakeQuant)]
    wanted = sorted({layer.scale_and_zero_point() for layer in quantizers})
    assert FIXED in wanted
    for found in (_TfliteScales(net.paths["tflite"]), _OnnxScales(net.paths["onnx"])):
        assert [zero_point for _, zero_point in found.grids] == [zero_point for _, zero_point in wanted]
        # Converters divide the range by 255 in their own way, which may give the float32 next to ours.
        np.testing.assert_allclose([scale for scale, _ in found.grids], [scale for scale, _ in wanted], rtol=2e-7)


def test_both_files_hold_the_integers_and_the_scales_of_weights(net):
    weights = [
        each for layer in net.model.layers if isinstance(layer, QuantizedLayer) for each in layer.stored_weights()
    ]
    tflite, onnx_file = _TfliteScales(net.paths["tflite"]), _OnnxScales(net.paths["onnx"])
    for weight in weights:
        wanted = _fingerprint(weight.values, weight.scale)
        assert wanted in tflite.weights, weight.path
        assert wanted in onnx_file.weights, weight.path


def _fingerprint(integers, scales):
    """Return what stays of a weight however its axes are ordered: its integers and its scales, sorted."""
    return np.sort(integers, axis=None).astype(int).tobytes(), np.unique(np.asarray(scales, "float32")).tobytes()


class _TfliteScales:
    """The grids of activations, sorted, and the weights in a `.tflite` file."""

    def __init__(self, path):
        file = TfliteFile(path.read_bytes())
        grids, self.weights = set(), set()
        for tensor in (tensor for graph in file.graphs for tensor in graph.tensors if tensor.type == Type.INT8):
            data, found = file.model.buffers[tensor.buffer].data, tensor.quantization
            if data is None:
                grids.add((float(found.scale[0]), int(found.zeroPoint[0])))
            else:
                self.weights.add(_fingerprint(np.frombuffer(bytes(data), "int8"), found.scale))
        self.grids = sorted(grids)


class _OnnxScales:
    """The same of an `.onnx` file; uint8 is told as int8."""

    def __init__(self, path):
        graph = onnx.load(path).graph
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
        grids, self.weights = set(), set()
        for node in graph.node:
            if node.op_type == "Mul" and casts.get(node.input[0]) in held:
                self.weights.add(_fingerprint(held[casts[node.input[0]]], held[node.input[1]]))
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            scale, zero_point = (held[name] for name in node.input[1:3])
            if node.input[0] in held and zero_point.dtype == "uint8":
                self.weights.add(_fingerprint(held[node.input[0]].astype(int) - 128, scale))
            elif zero_point.dtype == "uint8":  # else a bias
                grids.add((float(scale), int(zero_point) - 128))
        self.grids = sorted(grids)
