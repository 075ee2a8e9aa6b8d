"""Opening files of every kind, good and broken, and fitting data to what they take."""

import numpy as np
import pytest

from compress.data.split import Split
from compress.deploy.records import TensorInfo
from compress.deploy.runtimes import detect_format, fit_array, match_inputs, open_runtime, plain_name, predict
from compress.errors import DataError, ModelError

SUFFIXES = ["tflite", "onnx"]


@pytest.mark.parametrize("suffix", [*SUFFIXES, "keras", "bin", ""])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"hello, world", "is not"),
        (b"GIF89a" + bytes(99), "is not"),
    ],
    ids=["missing", "empty", "text", "gif"],
)
def test_files_that_are_no_models(tmp_path, suffix, content, message):
    path = tmp_path / f"m.{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        open_runtime(path)
    assert str(path) in error.value.message
    assert "\n" not in error.value.message


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="Is a directory"):
        open_runtime(tmp_path)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(exported, tmp_path, suffix, share):
    content = exported("cnn").paths[suffix].read_bytes()
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=str(path)) as error:
        open_runtime(path)
    assert "\n" not in error.value.message


def test_content_decides_before_the_suffix(exported, tmp_path):
    made = exported("cnn")
    (tmp_path / "model").write_bytes(made.paths["tflite"].read_bytes())
    assert detect_format(tmp_path / "model") == "tflite"
    (tmp_path / "m.onnx").write_bytes(made.paths["tflite"].read_bytes())
    assert open_runtime(tmp_path / "m.onnx").name == "tflite"


@pytest.mark.parametrize("name", ["cnn", "named", "recurrent"])
def test_a_keras_file_has_the_same_interface_as_its_exports(exported, tmp_path, name):
    made = exported(name)
    made.model.save(tmp_path / "m.keras")
    runtime = open_runtime(tmp_path / "m.keras")
    onnx = open_runtime(made.paths["onnx"])
    assert runtime.name == "keras"
    assert runtime.inputs == onnx.inputs
    assert runtime.outputs == onnx.outputs
    for mine, exported_output in zip(predict(runtime, made.x, 4), predict(onnx, made.x, 4), strict=True):
        np.testing.assert_allclose(mine, exported_output, atol=1e-5)


def test_predict_takes_splits_streams_and_wrong_names(exported):
    runtime = open_runtime(exported("named").paths["onnx"])
    x = exported("named").x
    whole = predict(runtime, x)
    assert [array.shape for array in whole] == [(10, 3), (10, 1)]
    stream = Split("test", stream=[({key: value[:4] for key, value in x.items()}, None)] * 2)
    np.testing.assert_allclose(predict(runtime, stream)[0], np.tile(whole[0][:4], (2, 1)), atol=1e-6)
    with pytest.raises(DataError, match=r"no input 'deep'. Received: a, b; expected deep, wide"):
        predict(runtime, {"a": x["wide"], "b": x["deep"]})
    with pytest.raises(DataError, match=r"2 inputs \(deep, wide\). Received: 1 arrays"):
        predict(runtime, x["wide"])


def test_a_file_of_batch_one_takes_any_number(exported):
    runtime = open_runtime(exported("recurrent").paths["tflite"])
    assert runtime.batch == 1
    assert runtime.run([np.zeros((3, 6, 3), "float32")])[0].shape == (3, 2)


def _info(dtype, *shape):
    return TensorInfo(name="x", shape=(None, *shape), dtype=dtype)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([0.1, 1e-3]), "float32"),
        (np.array([0.1], "float16"), "float32"),
        (np.array([0, 255], "uint8"), "float32"),
        (np.array([2**24]), "float32"),
        (np.array([-(2**31), 2**31 - 1]), "int32"),
        (np.array([True]), "float32"),
        (np.array([], "int64"), "int8"),
    ],
)
def test_casts_that_lose_nothing(array, dtype):
    fitted = fit_array(array, _info(dtype))
    assert fitted.dtype == dtype
    np.testing.assert_allclose(fitted, array.astype("float64"), rtol=1e-7)


@pytest.mark.parametrize(
    ("array", "dtype", "received"),
    [
        (np.array([2**31]), "int32", "int64 from 2147483648 to 2147483648"),
        (np.array([2**24 + 1]), "float32", "int64 from"),
        (np.array([0.5]), "int32", "float64 from 0.5 to 0.5"),
        (np.array([-1]), "uint8", "int64 from -1 to -1"),
        (np.array(["a"]), "float32", "<U1"),
    ],
)
def test_casts_that_would_lose_values(array, dtype, received):
    with pytest.raises(DataError, match=f"takes {dtype} values. Received: {received}"):
        fit_array(array, _info(dtype))


def test_shapes_must_fit():
    assert fit_array(np.zeros((2, 3), "float32"), _info("float32", None)).shape == (2, 3)
    for shape in [(2,), (2, 4), (2, 3, 1)]:
        with pytest.raises(DataError, match=r"shape \(any, 3\). Received: shape"):
            fit_array(np.zeros(shape, "float32"), _info("float32", 3))


def test_a_missing_channel_axis_is_added():
    assert fit_array(np.zeros((2, 3, 3), "float32"), _info("float32", 3, 3, 1)).shape == (2, 3, 3, 1)


def test_inputs_are_matched_by_name_or_order():
    a, b = np.zeros(1), np.ones(1)
    assert match_inputs(["b", "a_0"], {"a 0": a, "b": b})[0] is b
    assert match_inputs(["b", "a"], [a, b])[0] is a
    assert plain_name("a/b:0 ü") == "a_b_0__"
    assert plain_name("0x") == "t0x"
