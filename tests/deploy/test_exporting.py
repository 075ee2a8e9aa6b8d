"""Every kind of model in both formats: what the files take, return and say about themselves."""

import hashlib

import keras
import numpy as np
import onnx
import pytest

from compress.data.split import Split
from compress.deploy.exporting import export_model, export_models
from compress.deploy.runtimes import open_runtime, predict
from compress.errors import DataError, ExportError, SetupError, UsageError

L = keras.layers
FORMATS = ["tflite", "onnx"]
NAMES = ["cnn", "several", "named", "recurrent", "mixed", "subclassed"]


@pytest.mark.parametrize("name", NAMES)
def test_records_say_what_the_files_are(exported, name):
    made = exported(name)
    for file_format, path in made.paths.items():
        record, content = made.records[file_format], path.read_bytes()
        assert record.sha256 == hashlib.sha256(content).hexdigest()
        assert (record.size_bytes, record.path) == (len(content), path.name)
        assert record.opset == (17 if file_format == "onnx" else None)
        assert record.max_abs_diff < (5e-3 if name == "mixed" else 1e-5)
        assert record.tolerance == (2e-2 if name == "mixed" else 1e-4)
        assert record.agreement == 1.0
        assert record.runtime == file_format
        batch_one = (name, file_format) == ("recurrent", "tflite")
        assert record.batch == (1 if batch_one else "dynamic")
        assert any("one sample at a time" in note for note in record.notes) == batch_one
        if made.x is None:
            assert (record.samples, record.samples_from) == (64, "synthetic")
            assert any("random inputs" in note for note in record.notes)
        else:
            assert (record.samples, record.samples_from) == (8 if batch_one else 10, "data")


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", ["several", "named", "recurrent"])
def test_files_take_and_return_tensors_in_the_order_of_the_model(exported, name, file_format):
    made = exported(name)
    runtime = open_runtime(made.paths[file_format])
    expected = {
        "several": (["z_left", "a_right", "m_tokens"], ["zeta", "probabilities", "alpha"]),
        "named": (["deep", "wide"], ["class", "sum"]),
        "recurrent": (["input_0"], ["output_0"]),
    }[name]
    assert [info.name for info in runtime.inputs] == expected[0]
    assert [info.name for info in runtime.outputs] == expected[1]
    reference = [
        keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(made.model(made.x, training=False))
    ]
    for size in (1, 3, 7, 3):
        outputs = predict(runtime, made.x, batch_size=size)
        for wanted, found in zip(reference, outputs, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("file_format", FORMATS)
def test_exporting_twice_gives_the_same_bytes(exported, tmp_path, file_format):
    made = exported("cnn")
    record = export_model(made.model, tmp_path / f"again.{file_format}", samples=Split("test", x=made.x))
    assert record.sha256 == made.records[file_format].sha256


def test_onnx_files_are_plain_onnx(exported):
    made = exported("several")
    model = onnx.load(made.paths["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 17)]
    assert model.producer_name == "bmcompress"
    dimensions = [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)]
    assert dimensions == ["batch"] * 6


def test_the_model_is_not_changed(exported):
    model = exported("mixed").model
    assert [layer.compute_dtype for layer in model.layers[1:]] == ["float16"] * 3
    assert exported("recurrent").model.get_layer("lstm").use_cudnn == "auto"


def test_a_difference_over_the_tolerance_fails_and_leaves_the_old_file(exported, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    made = exported("mixed")
    with pytest.raises(ExportError, match=r"tolerance 1e-07.*output 'head' \(largest difference \d"):
        export_model(made.model, path, tolerance=1e-7)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_requests_that_cannot_be_met(exported, tmp_path):
    model = exported("cnn").model
    with pytest.raises(UsageError, match=r"tflite, onnx. Received: 'pb'"):
        export_model(model, tmp_path / "model.pb")
    with pytest.raises(UsageError, match=r"13 to 18. Received: opset=21"):
        export_model(model, tmp_path / "model.onnx", opset=21)
    with pytest.raises(UsageError, match="tolerance=nan"):
        export_model(model, tmp_path / "model.onnx", tolerance=float("nan"))
    with pytest.raises(UsageError, match="one path for each format"):
        export_models(model, {"tflite": tmp_path / "m", "onnx": tmp_path / "m"})
    with pytest.raises(SetupError, match=r"missing/model.onnx cannot be written"):
        export_model(model, tmp_path / "missing" / "model.onnx")
    with pytest.raises(DataError, match=r"shape \(any, 8, 8, 1\). Received: shape \(2, 8, 7, 1\)"):
        export_model(model, tmp_path / "model.onnx", samples=np.zeros((2, 8, 7, 1)))
    with pytest.raises(ExportError, match="never been called"):
        export_model(keras.Sequential([L.Dense(2)]), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
