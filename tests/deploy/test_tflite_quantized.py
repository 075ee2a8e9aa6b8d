"""TFLite files whose weights are stored in few bits: exact where they compute in float, and as hybrid kernels round."""

import keras
import numpy as np
import pytest
from tflite_nets import (
    L,
    convolutional,
    output_grids,
    outputs,
    places,
    quantize,
    recurrent,
    run,
    samples,
    several,
    to_float_file,
)

from compress.deploy.litert import LiteRtRuntime
from compress.deploy.tflite_flatbuffer import Op, TfliteFile, Type
from compress.deploy.tflite_quantized import float_operators, quantize_file
from compress.errors import ExportError
from compress.quantization.stored import StoredWeight


def _constants(content, kind):
    file = TfliteFile(content)
    found = [tensor for graph in file.graphs for tensor in graph.tensors if tensor.type == kind]
    return [tensor for tensor in found if file.model.buffers[tensor.buffer].data is not None]


def _float_weights(content):
    """Return the shapes of constants that hold more than a bias."""
    shapes = [tuple(tensor.shape) for tensor in _constants(content, Type.FLOAT32) if tensor.shape is not None]
    return [shape for shape in shapes if len(shape) > 1 and np.prod(shape) > max(shape)]


def _operators(content):
    file = TfliteFile(content)
    return [file.operator_name(operator) for graph in file.graphs for operator in graph.operators]


def _text():
    inputs = keras.Input((6,), dtype="int32", name="tokens")
    x = L.Embedding(10, 8, name="table")(inputs)
    return keras.Model(inputs, L.Dense(3, name="head")(L.GlobalAveragePooling1D(name="mean")(x)), name="net")


def _volume():
    inputs = keras.Input((4, 4, 4, 2), name="x")
    return keras.Model(inputs, L.Conv3D(3, 2, name="conv")(inputs), name="net")


NETS = {
    "convolutional": lambda: convolutional(None),
    "lstm": lambda: recurrent(None),
    "gru": lambda: recurrent(None, L.GRU),
    "several": lambda: several(None),
    "text": _text,
    "volume": _volume,
}


@pytest.fixture(scope="module")
def made():
    """Return `get(name)`: a model whose weights have 4 bits, its weights and its float file; each is made once."""
    kept = {}

    def get(name):
        if name not in kept:
            keras.utils.set_random_seed(0)
            model = NETS[name]()
            weights = quantize(model, bits=4)
            kept[name] = model, weights, to_float_file(model, single=name in ("lstm", "gru"))
        return kept[name]

    return get


@pytest.mark.parametrize("int4", ["int8", "packed"])
@pytest.mark.parametrize("name", NETS)
def test_stored_weights_are_exact(made, tmp_path, name, int4):
    model, weights, source = made(name)
    content, notes = quantize_file(source, weights, compute="weights", int4=int4)
    assert _float_weights(content) == []
    kept_wide = [weight.layer for weight in weights if int4 == "int8" or weight.layer == "table"]
    assert notes == [f"Layer {layer!r}: TFLite stores its 4-bit weights in 8 bits each." for layer in _once(kept_wide)]
    x = samples(model, 20)
    for expected, received in zip(outputs(model, x), run(content, tmp_path, x), strict=True):
        np.testing.assert_allclose(received, expected, atol=2e-6)
    assert name != "convolutional" or len(content) < len(source)
    assert content == quantize_file(source, weights, compute="weights", int4=int4)[0]
    assert (content == quantize_file(source, weights, compute="weights")[0]) == (int4 == "packed")


def _once(layers):
    return sorted(set(layers))


@pytest.mark.parametrize(("kind", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_weights_in_half_precision(tmp_path, kind, bits):
    keras.utils.set_random_seed(0)
    model = recurrent(None)
    weights = []
    for layer in model.layers:
        for variable in layer.trainable_variables:
            values = _half(np.asarray(variable), kind)
            variable.assign(values)
            weights.append(StoredWeight(variable.path, layer.name, values, None, 16, kind))
    source = to_float_file(model)
    content, notes = quantize_file(source, weights, compute="weights")
    assert _float_weights(content) == []
    assert [note for note in notes if "bfloat16" in note] == notes == notes[: kind == "bfloat16"]
    x = samples(model, 20)
    np.testing.assert_allclose(run(content, tmp_path, x)[0], outputs(model, x)[0], atol=1e-6)


def _half(values, kind):
    if kind == "float16":
        return values.astype("float16").astype("float32")
    return (values.view("uint32") & 0xFFFF0000).view("float32")


@pytest.mark.parametrize("int4", ["int8", "packed"])
@pytest.mark.parametrize(("size", "group_size"), [(32, 8), (20, 8)])
def test_groups_of_weights(tmp_path, int4, size, group_size):
    """Scales of groups along the inputs; the last group may be short."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3, size), name="x")
    outer = L.EinsumDense("abc,cde->abde", (None, 2, 3), name="outer")
    model = keras.Model(inputs, L.Dense(5, name="head")(L.Reshape((3, 6))(outer(inputs))), name="net")
    kernel = np.asarray(outer.kernel)
    groups = -(-size // group_size)
    padded = np.pad(kernel, [(0, groups * group_size - size), (0, 0), (0, 0)]).reshape(groups, group_size, 2, 3)
    scale = (np.abs(padded).max(1) / 7).astype("float32")
    values = np.clip(np.rint(kernel / np.repeat(scale, group_size, 0)[:size]), -7, 7).astype("int8")
    weight = StoredWeight("outer/kernel", "outer", values, scale, 4, group_size=group_size, axis=0)
    outer.kernel.assign(weight.dequantize())
    content, _ = quantize_file(to_float_file(model), [weight], compute="weights", int4=int4)
    assert len(_constants(content, Type.INT4 if int4 == "packed" else Type.INT8)) == 1
    x = samples(model, 20)
    np.testing.assert_allclose(run(content, tmp_path, x)[0], outputs(model, x)[0], atol=2e-6)


PRODUCTS = {
    "scalar": lambda x, layer: layer(x) * 0.3,
    "negative": lambda x, layer: layer(x) * np.arange(-3, 3, dtype="float32"),
    "outputs": lambda x, layer: L.BatchNormalization(name="norm")(layer(x)),
    "inputs": lambda x, layer: layer(x * np.arange(1, 9, dtype="float32")),
}


@pytest.mark.parametrize("compute", ["weights", "dynamic"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_that_the_converter_multiplies_are_stored_all_the_same(tmp_path, name, compute):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,), name="x")
    model = keras.Model(inputs, PRODUCTS[name](inputs, L.Dense(6, name="layer")), name="net")
    weights = quantize(model)
    content, _ = quantize_file(to_float_file(model), weights, compute=compute)
    stored = _constants(content, Type.INT8)
    assert [sorted(tensor.shape) for tensor in stored] == [[6, 8]]
    x = samples(model, 20)
    expected = outputs(model, x)[0]
    np.testing.assert_allclose(
        run(content, tmp_path, x)[0], expected, atol=np.abs(expected).max() * (2e-6 if compute == "weights" else 0.02)
    )


def _rounded(x, axes):
    """Return what hybrid kernels make of activations: 8 bits over the range along `axes`, which has zero in it."""
    low, high = np.minimum(x.min(axes, keepdims=True), 0), np.maximum(x.max(axes, keepdims=True), 0)
    scale = (high - low) / np.float32(255)
    zero_point = np.clip(np.rint(-128 - low / scale), -128, 127)
    return (np.clip(np.rint(x / scale) + zero_point, -128, 127) - zero_point) * scale


@pytest.mark.parametrize(
    ("layer", "shape", "axes"),
    [
        (L.Dense(8, name="layer"), (16,), (1,)),
        (L.Dense(8, name="layer"), (5, 16), (2,)),
        (L.Conv2D(8, 3, padding="same", name="layer"), (6, 6, 4), (1, 2, 3)),
        (L.Conv2D(8, 1, name="layer"), (6, 6, 4), (3,)),
        (L.DepthwiseConv2D(3, name="layer"), (6, 6, 4), (1, 2, 3)),
        (L.Conv2DTranspose(8, 3, name="layer"), (6, 6, 4), (1, 2, 3)),
        (L.Conv1D(8, 3, name="layer"), (9, 4), (1, 2)),
    ],
    ids=["dense", "dense3", "conv", "pointwise", "depthwise", "transposed", "conv1d"],
)
def test_hybrid_kernels_round_activations_as_documented(tmp_path, layer, shape, axes):
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape, name="x")
    model = keras.Model(inputs, layer(inputs), name="net")
    weights = quantize(model)
    content, _ = quantize_file(to_float_file(model, single=False), weights, compute="dynamic")
    assert "DEQUANTIZE" not in _operators(content)
    assert len(_constants(content, Type.INT8)) == 1
    x = samples(model, 20)[0] + np.float32(0.7)
    expected = outputs(model, [_rounded(x, axes)])[0]
    np.testing.assert_allclose(run(content, tmp_path, [x])[0], expected, atol=1e-5)


def test_dynamic_files_of_recurrent_models(made, tmp_path):
    """The products inside the loop read integers too."""
    model, weights, source = made("lstm")
    content, _ = quantize_file(source, weights, compute="dynamic")
    assert "DEQUANTIZE" not in _operators(content)
    x = samples(model, 20)
    assert np.abs(run(content, tmp_path, x)[0] - outputs(model, x)[0]).mean() < 0.01


def test_rows_of_tables_are_read_before_they_become_float(made):
    for per_row in (True, False):
        model, weights, source = made("text")
        if not per_row:
            table = model.get_layer("table").embeddings
            original = np.asarray(table)
            scale = np.float32(0.01).reshape(1, 1)
            values = np.clip(np.rint(original / scale), -127, 127).astype("int8")
            table.assign(values * scale)
            weights = [StoredWeight("table/embeddings", "table", values, scale), weights[1]]
            source = to_float_file(model)
            table.assign(original)
        content, _ = quantize_file(source, weights, compute="weights")
        file = TfliteFile(content)
        reads = [operator for operator in file.graphs[0].operators if file.code(operator) == Op.GATHER]
        kinds = [file.graphs[0].tensors[operator.inputs[0]].type for operator in reads]
        assert kinds == [Type.INT8, Type.FLOAT32] if per_row else [Type.INT8]


def test_a_weight_that_the_file_has_not_is_named(made):
    _, weights, source = made("text")
    other = StoredWeight("net/gone/kernel", "gone", np.ones((3, 5), "int8"), np.ones((1, 1), "float32"))
    with pytest.raises(ExportError, match="none for 'net/gone/kernel'"):
        quantize_file(source, [*weights, other], compute="weights")


@pytest.mark.parametrize("compute", ["integer", "weights"])
def test_integer_inputs_need_integer_activations(made, compute):
    _, weights, source = made("several")
    with pytest.raises(ExportError, match=r"Received: (input|io)"):
        quantize_file(source, weights, compute=compute, io="int8")


def test_float_operators_are_named_with_their_layer(made):
    model, _, source = made("several")
    found = float_operators(source, places(model))
    assert ("FULLY_CONNECTED", "shared") in found
    assert ("LOGISTIC", "sigmoid") in found
    assert ("CONCATENATION", "join") in found
    assert output_grids(source) == [None, None]


def test_the_runtime_takes_and_returns_real_values(tmp_path):
    keras.utils.set_random_seed(0)
    model = several()
    weights = quantize(model)
    content, _ = quantize_file(to_float_file(model), weights, compute="integer", io="int8")
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    runtime = LiteRtRuntime(path, threads=1)
    assert [(info.name, info.dtype) for info in runtime.inputs] == [("left", "int8"), ("right", "int8")]
    assert {info.dtype for info in runtime.outputs} == {"int8"}
    x = samples(model)
    received = runtime.run(x)
    for expected, values, (scale, _) in zip(outputs(model, x), received, output_grids(content), strict=True):
        assert values.dtype == "float32"
        assert np.abs(values - expected).mean() < 0.3 * scale
    steps = np.clip(np.rint(x[0] / np.float32(4 / 255)), -128, 127).astype("int8")  # the zero point is 0
    right = np.clip(np.rint(x[1] / np.float32(6 / 255)), -128, 127).astype("int8")
    np.testing.assert_array_equal(runtime.run([steps, right])[0], received[0])
