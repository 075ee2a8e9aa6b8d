"""Comparisons of real files: nested, shared and custom layers, several outputs, float and int8, damaged and sound."""

from __future__ import annotations

import json
import sys
from itertools import count

import jsonschema
import keras
import numpy as np
import onnx
import onnxruntime.quantization as ort_quantization
import pytest
import tensorflow as tf

from compress.deploy.exporting import export_models
from compress.errors import DataError, ModelError, UsageError
from compress.measure.comparing import compare_models, judge_layers
from compress.measure.comparison import Comparison
from compress.measure.layer_comparison import compare_files

L = keras.layers
CUSTOM = (__name__.partition(".")[0],)
_numbers = count()


class Shift(L.Layer):
    """A custom layer that nobody registered."""

    def build(self, shape):
        self.amount = self.add_weight(shape=(shape[-1],), initializer="random_normal", name="amount")

    def call(self, x):
        return x + self.amount


class Subclassed(keras.Model):
    """Layers that are known to Python alone, behind a `call` that symbolic tensors cannot pass."""

    def __init__(self, **options):
        super().__init__(**options)
        self.head = L.Dense(3, name="head")

    def call(self, x):
        return self.head(tf.convert_to_tensor(x.numpy()) if hasattr(x, "numpy") else tf.nn.relu(x))


def _build():
    keras.utils.set_random_seed(7)
    image = keras.Input((8, 8, 3), name="image")
    x = L.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(image)
    x = L.ReLU(name="relu")(L.BatchNormalization(name="norm")(x))
    layers = [L.DepthwiseConv2D(3, padding="same", activation="relu", name="dw"), L.Conv2D(4, 1, name="pw")]
    block = keras.Sequential([keras.Input((8, 8, 4)), *layers], name="block")
    x = L.Add(name="add")([x, block(x)])
    x = L.GlobalAveragePooling2D(name="pool")(Shift(name="shift")(keras.ops.tanh(x)))
    shared = L.Dense(4, activation="tanh", name="shared")
    x = shared(shared(x))
    outputs = {"class": L.Dense(3, activation="softmax", name="head")(x), "size": L.Dense(1, name="size")(x)}
    model = keras.Model(image, outputs, name="net")
    model.get_layer("norm").moving_mean.assign([0.1, -0.2, 0.3, 0.0])
    return model


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, samples):
    """A sound model and its exports, one with a damaged layer, and int8 files that other tools made."""
    place = tmp_path_factory.mktemp("files")
    model = _build()
    model.save(place / "net.keras")
    export_models(model, {"tflite": place / "net.tflite", "onnx": place / "net.onnx"}, samples=samples)
    _write_int8(model, place, samples)
    inner = model.get_layer("block").get_layer("pw")
    kernel, bias = inner.get_weights()
    inner.set_weights([kernel + 0.5 * np.random.default_rng(1).normal(size=kernel.shape), bias])
    model.save(place / "damaged.keras")
    _damage_onnx(place / "net.onnx", place / "damaged.onnx")
    return place


def _damage_onnx(source, target):
    """Change the kernel of the convolution `block/pw`."""
    graph = onnx.load(source)
    node = next(node for node in graph.graph.node if node.name == "block/pw/Conv")
    kernel = next(constant for constant in graph.graph.initializer if constant.name == node.input[1])
    values = onnx.numpy_helper.to_array(kernel)
    noise = np.random.default_rng(1).normal(size=values.shape).astype("float32")
    kernel.CopyFrom(onnx.numpy_helper.from_array(values + 0.5 * noise, kernel.name))
    onnx.save(graph, target)


def _write_int8(model, place, samples):
    for name, kind in (("int8", None), ("int8_io", tf.int8)):
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row[None]] for row in samples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        if kind is not None:
            converter.inference_input_type = converter.inference_output_type = kind
        (place / f"{name}.tflite").write_bytes(converter.convert())

    class Reader(ort_quantization.CalibrationDataReader):
        batches = iter([{"image": samples}])

        def get_next(self):
            return next(self.batches, None)

    unsigned = ort_quantization.QuantType.QUInt8
    ort_quantization.quantize_static(
        str(place / "net.onnx"), str(place / "int8.onnx"), Reader(), per_channel=True,
        weight_type=unsigned, activation_type=unsigned,
    )  # fmt: skip


@pytest.fixture
def facts(tmp_path, samples):
    """Return a function that compares two files in this process."""
    from compress.measure.inputs import write_inputs

    def compare(a, b, x=samples):
        place = tmp_path / str(next(_numbers))
        place.mkdir()
        if x is not None:
            write_inputs(place / "inputs", x)
        return compare_files(str(a), str(b), str(place), 16, 0 if x is not None else 16, 0, CUSTOM)

    return compare


def _levels(facts):
    """Return SQNR by layer; infinite where there is no error, `None` where there is no counterpart."""
    return {
        fact["layer"]: None if fact["counterpart"] is None else np.inf if fact["mse"] == 0 else fact["sqnr_db"]
        for fact in facts["layers"]
    }


LAYERS = [
    "conv", "norm", "relu", "block/dw", "block/pw", "add", "tanh", "shift", "pool", "shared (call 1)",
    "shared (call 2)", "head", "size",
]  # fmt: skip


def _plain(levels):
    """Name the operation behind `keras.ops.tanh`, whose number depends on what was built before."""
    return {("tanh" if name.startswith("tanh") else name): level for name, level in levels.items()}


def test_a_file_equals_itself(folder, facts):
    found = facts(folder / "net.keras", folder / "net.keras")
    assert set(_plain(_levels(found))) == set(LAYERS)
    assert set(_levels(found).values()) == {np.inf}
    assert found["quantized"] == [False, False]


@pytest.mark.parametrize("kind", ["tflite", "onnx"])
def test_exports_agree_layer_by_layer(folder, facts, kind):
    levels = _plain(_levels(facts(folder / "net.keras", folder / f"net.{kind}")))
    missing = {name for name, level in levels.items() if level is None}
    assert missing <= {"conv", "norm", "tanh", "shift"}  # what converters fuse
    assert min(level for level in levels.values() if level is not None) > 100


@pytest.mark.parametrize(
    ("sound", "damaged"),
    [("net.keras", "damaged.keras"), ("net.keras", "damaged.onnx"), ("damaged.keras", "net.tflite")],
)
def test_a_damaged_layer_is_the_first_that_parts(folder, facts, sound, damaged):
    found = facts(folder / sound, folder / damaged)
    _, first, largest = judge_layers(found["layers"], False, 30)
    assert first.layer == largest.layer == "block/pw"
    assert first.sqnr_db < 20
    assert first.drop_db > 80


def test_a_damaged_layer_is_found_between_files_without_layers(folder, facts):
    found = facts(folder / "net.tflite", folder / "damaged.onnx")
    _, first, _ = judge_layers(found["layers"], False, 30)
    assert "block" in first.layer
    assert "pw" in first.layer


@pytest.mark.parametrize("file", ["int8.tflite", "int8_io.tflite", "int8.onnx"])
def test_int8_files_stay_above_the_threshold(folder, facts, file):
    found = facts(folder / "net.keras", folder / file)
    assert found["quantized"] == [False, True]
    levels = _plain(_levels(found))
    assert {"relu", "block/dw", "block/pw", "add", "pool", "head", "size"} <= {k for k, v in levels.items() if v}
    assert all(12 < level < 70 for level in levels.values() if level is not None)
    assert judge_layers(found["layers"], True, 10)[1] is None


def test_random_inputs_of_a_file_that_takes_integers_are_real(folder, facts):
    found = facts(folder / "int8_io.tflite", folder / "net.keras", None)
    levels = [level for level in _levels(found).values() if level is not None]
    assert len(levels) >= 8
    assert min(levels) > 10


def test_a_damaged_layer_stands_out_against_int8(folder, facts):
    found = facts(folder / "damaged.keras", folder / "int8.tflite")
    _, _, largest = judge_layers(found["layers"], True, 10)
    assert largest.layer == "block/pw"
    assert largest.drop_db > 15


def test_int8_files_of_two_formats_can_be_compared(folder, facts):
    levels = _levels(facts(folder / "int8.tflite", folder / "int8.onnx"))
    assert sum(level is not None and level > 15 for level in levels.values()) >= 8


def test_subclassed_models_are_compared_by_their_outputs(tmp_path, facts):
    model = Subclassed(name="python")
    model(np.ones((1, 4), "float32"))
    model.save(tmp_path / "python.keras")
    found = facts(tmp_path / "python.keras", tmp_path / "python.keras", np.ones((4, 4), "float32"))
    assert list(_levels(found).values())[-1] == np.inf


def test_files_with_other_inputs_are_refused(folder, make_dense_onnx, facts):
    other = make_dense_onnx("other", np.eye(4))
    with pytest.raises(ModelError, match=r"same inputs.*image \(any, 8, 8, 3\).*x \(any, 4\)"):
        facts(folder / "net.onnx", other)


def test_samples_that_do_not_fit_are_refused(folder, facts):
    with pytest.raises(DataError, match="image"):
        facts(folder / "net.onnx", folder / "net.onnx", np.zeros((4, 5), "float32"))


def test_values_that_are_not_finite_have_no_level(make_dense_onnx, facts):
    sound, broken = (
        make_dense_onnx("sound", np.eye(3), np.eye(3)),
        make_dense_onnx("nan", np.eye(3), np.full((3, 3), np.nan)),
    )
    found = facts(sound, broken, np.ones((4, 3), "float32"))
    layers, first, _ = judge_layers(found["layers"], False, 30)
    assert layers[0].mse == 0
    assert (first.layer, first.sqnr_db) == ("y", None)
    assert "not finite" in layers[1].reasons["sqnr_db"]


def _fact(name, level, inputs=(), between=()):
    matched = level is not None
    return {
        "layer": name, "kind": "Op", "shape": [1], "counterpart": name if matched else None, "mse": 1.0 if matched else None,
        "sqnr_db": level, "cosine": 1.0, "inputs": list(inputs), "between": list(between), "reason": "fused or absent",
    }  # fmt: skip


def test_verdict_on_layers():
    facts = [_fact("a", 38.0), _fact("b", None, [0]), _fact("c", 8.0, [0], [1]), _fact("d", 5.0, [2])]
    layers, first, largest = judge_layers(facts, True, 10.0)
    assert (first.layer, first.drop_db, first.suspects) == ("c", 30.0, ["b"])
    assert largest == first
    assert [layer.drop_db for layer in layers] == [2.0, None, 30.0, 3.0]
    assert judge_layers(facts, True, 0.0)[1] is None


def test_whole_comparison_with_labels(folder, samples):
    labels = {"class": np.arange(32) % 3, "size": np.ones((32, 1), "float32")}
    sys.modules.setdefault(CUSTOM[0], sys.modules[__name__])
    found = compare_models(
        folder / "net.keras", folder / "damaged.onnx", (samples, labels), samples=8, allow_imports=CUSTOM
    )
    assert found.first_parting.layer == "block/pw"
    assert (found.layer_samples, found.data.samples, found.sqnr_threshold_db) == (8, 32, 30)
    by_name = {output.output: output for output in found.outputs}
    assert by_name["class"].decisions == 32
    assert by_name["class"].right_to_wrong is not None
    assert by_name["size"].metrics_b["mse"].drop is not None
    jsonschema.validate(json.loads(found.to_json(), parse_constant=pytest.fail), Comparison.model_json_schema())
    assert any("first layer where they part: block/pw" in line for line in found.sentences())
    header, rows = found.layer_rows()
    assert {len(row) for row in rows} == {len(header)}


def test_without_data_random_inputs_are_drawn_and_said(make_dense_onnx):
    a = make_dense_onnx("a", np.eye(4, 3), np.eye(3))
    found = compare_models(a, a, samples=4)
    assert found.data is None
    assert any("random" in note for note in found.notes)
    assert {layer.mse for layer in found.layers} == {0}
    assert found.first_parting is found.largest_drop is None


def test_other_outputs_leave_the_layers(make_dense_onnx):
    found = compare_models(make_dense_onnx("a", np.eye(3)), make_dense_onnx("b", np.eye(3), np.eye(3, 2)), np.eye(3))
    assert found.outputs == []
    assert any("outputs cannot be compared" in note for note in found.notes)
    assert found.layers[0].mse == 0


def test_numbers_that_make_no_sense(make_dense_onnx):
    a = make_dense_onnx("a", np.eye(3))
    with pytest.raises(UsageError, match="samples"):
        compare_models(a, a, samples=0)
    with pytest.raises(UsageError, match="sqnr_db"):
        compare_models(a, a, sqnr_db=float("nan"))
    with pytest.raises(ModelError, match="does not exist"):
        compare_models(a, a.with_name("none.onnx"))
