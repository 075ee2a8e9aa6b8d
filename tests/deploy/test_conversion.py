"""What converters cannot do is said with the operation and the layer."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf

from compress.deploy.conversion import Places
from compress.deploy.onnx_conversion import to_onnx
from compress.deploy.signature import read_signature
from compress.deploy.tflite_conversion import to_tflite
from compress.deploy.tracing import write_saved_model
from compress.errors import ExportError
from compress.models.walking import find_all_layers

L = keras.layers


class Eigen(L.Layer):
    def call(self, x):
        return keras.ops.svd(x, compute_uv=False)


class Wavelet(L.Layer):
    def call(self, x):
        return tf.math.lgamma(x)  # the TFLite converter can compose it of others, tf2onnx cannot


class Python(L.Layer):
    def call(self, x):
        doubled = tf.py_function(lambda value: 2 * value, [x], tf.float32)
        doubled.set_shape(x.shape)
        return doubled


def _saved(model, folder):
    signature = read_signature(model)
    saved = write_saved_model(model, signature, folder)
    places = Places([layer.name for layer in find_all_layers(model)], model.name)
    return saved, [info.name for info in signature.inputs], places


def _onnx(saved, inputs, places, folder):
    path = folder / "m.onnx"
    to_onnx(str(saved.folder), saved.endpoints[0], inputs, saved.outputs, places, path, opset=17)
    return path.read_bytes()


def _model(layer):
    block = keras.Sequential([keras.Input((4, 4)), L.Dense(4, name="dense"), layer], name="block")
    inputs = keras.Input((4, 4), name="x")
    return keras.Model(inputs, block(inputs), name="model")


@pytest.mark.parametrize(
    ("layer", "operator"),
    [(Eigen(name="eigen"), "Svd"), (Python(name="python_3"), "EagerPyFunc")],
    ids=["svd", "python"],
)
def test_an_operation_without_equivalent_is_named_with_its_layer(tmp_path, layer, operator):
    saved, inputs, places = _saved(_model(layer), tmp_path / "saved")
    with pytest.raises(ExportError, match=f"TFLite has no.*{operator} in layer 'block/{layer.name}'"):
        to_tflite(str(saved.folder), saved.endpoints, inputs, saved.outputs, places)
    with pytest.raises(ExportError, match=f"ONNX has no.*{operator} in layer 'block/{layer.name}'"):
        to_onnx(str(saved.folder), saved.endpoints[0], inputs, saved.outputs, places, tmp_path / "m.onnx", opset=17)


def test_formats_differ_in_what_they_have(tmp_path):
    saved, inputs, places = _saved(_model(Wavelet(name="wavelet")), tmp_path / "saved")
    content, batch = to_tflite(str(saved.folder), saved.endpoints, inputs, saved.outputs, places)
    assert content[4:8] == b"TFL3"
    assert batch is None
    with pytest.raises(ExportError, match="Lgamma in layer 'block/wavelet'"):
        to_onnx(str(saved.folder), saved.endpoints[0], inputs, saved.outputs, places, tmp_path / "m.onnx", opset=17)


def test_places():
    places = Places(["conv", "conv_1", "block", "model"], "model")
    assert places.find("model/block/conv_1/Conv2D@__inference_1") == "layer 'block/conv_1'"
    # Traced once more: every name of the model has a number more.
    assert places.find("model_1/block_1/conv_1/Conv2D@__inference_1") == "layer 'block/conv'"
    assert places.find("model_1/block_1/conv_1_1/Conv2D") == "layer 'block/conv_1'"
    assert places.find("StatefulPartitionedCall/model_1/conv_7/Conv2D") == "layer 'conv'"
    assert places.find("model_1/Svd") == "model 'model' outside its layers, at 'model_1/Svd'"


class Fixed(L.Layer):
    def call(self, x):
        return x * float(np.sqrt(x.shape[0]))  # needs to know the batch size


def test_a_model_that_must_know_its_batch_size_is_traced_for_one_sample(tmp_path):
    inputs = keras.Input(batch_shape=(1, 3), name="x")
    saved, names, places = _saved(keras.Model(inputs, Fixed(name="fixed")(inputs), name="model"), tmp_path / "saved")
    assert saved.endpoints == [("serve_single", 1)]
    assert (
        to_onnx(str(saved.folder), saved.endpoints[0], names, saved.outputs, places, tmp_path / "m.onnx", opset=17) == 1
    )


class Constant(L.Layer):
    """Holds a tensor that is no variable and too large to become a constant of the graph while tracing."""

    def __init__(self, **options):
        super().__init__(**options)
        self.shift = tf.constant(np.arange(300, dtype="float32"))

    def call(self, x):
        return x + self.shift


def test_captured_tensors_become_constants_of_the_onnx_file(tmp_path):
    inputs = keras.Input((300,), name="x")
    saved, names, places = _saved(keras.Model(inputs, Constant(name="c")(inputs), name="model"), tmp_path / "saved")
    content = _onnx(saved, names, places, tmp_path)
    session = onnxruntime.InferenceSession(content)
    assert [value.name for value in session.get_inputs()] == ["x"]
    np.testing.assert_array_equal(session.run(None, {"x": np.ones((1, 300), "float32")})[0][0], np.arange(300) + 1)


def _gru():
    inputs = keras.Input((5, 3), name="x")
    outputs = L.Bidirectional(L.GRU(4, return_sequences=True, name="gru"), name="both")(inputs)
    return keras.Model(inputs, L.Dense(2, name="head")(outputs), name="model")


def _twins():
    """Twice the same layer on the same tensor: the converter keeps one of them, whichever."""
    inputs, shared = keras.Input((4,), name="x"), L.Dense(4, use_bias=False, name="shared")
    return keras.Model(inputs, [shared(shared(inputs)), keras.ops.softmax(shared(inputs)), inputs], name="model")


@pytest.mark.parametrize("make", [_gru, _twins])
def test_onnx_bytes_depend_on_nothing_but_the_model(tmp_path, make):
    model = make()
    saved, names, places = _saved(model, tmp_path / "saved")
    files, kept = [], []
    for i in range(3):  # tf2onnx counts names up within a process, and orders nodes by where memory is free
        kept.append([object() for _ in range(1237 * i)])
        files.append(_onnx(saved, names, places, tmp_path))
    assert files[0] == files[1] == files[2]
    x = np.random.default_rng(0).standard_normal((3, *model.inputs[0].shape[1:]), dtype="float32")
    outputs = onnxruntime.InferenceSession(files[0]).run(None, {"x": x})
    for found, wanted in zip(outputs, keras.tree.flatten(model(x)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_nodes_with_weights_are_named_after_their_layer(tmp_path):
    saved, names, places = _saved(_twins(), tmp_path / "saved")
    content = _onnx(saved, names, places, tmp_path)
    graph = onnx.load_from_string(content).graph
    assert [node.name for node in graph.node if node.op_type == "MatMul"] == [
        "shared/MatMul",
        "shared/MatMul_1",
    ]
    assert [tensor.name for tensor in graph.initializer] == ["shared/MatMul/input_1"]


def test_a_saved_model_holds_each_variable_once(tmp_path):
    saved, _, _ = _saved(_gru(), tmp_path / "saved")
    stored = [shape for _, shape in tf.train.list_variables(str(saved.folder / "variables" / "variables")) if shape]
    assert len(stored) == 8  # two directions of a GRU, of 3 variables each, and a dense layer


def test_a_model_that_reads_a_table_is_written(tmp_path):
    inputs = keras.Input((2,), dtype="int64", name="x")
    model = keras.Model(inputs, L.IntegerLookup(vocabulary=[7, 9], name="lookup")(inputs), name="model")
    saved, _, _ = _saved(model, tmp_path / "saved")
    found = tf.saved_model.load(str(saved.folder)).signatures["serve"](tf.constant([[9, 3]], "int64"))
    np.testing.assert_array_equal(next(iter(found.values())), [[2, 0]])
