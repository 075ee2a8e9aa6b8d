"""Integer TFLite files compute what the deploy model computes, with its scales, in integers only."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tflite_nets import (
    ATTENTION_AXES,
    L,
    Marker,
    attention,
    convolutional,
    marker,
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

from compress.deploy.tflite_flatbuffer import Op, TfliteFile, Type
from compress.deploy.tflite_quantized import float_operators, quantize_file
from compress.errors import ExportError

NETS = {"convolutional": convolutional, "attention": attention, "recurrent": recurrent, "several": several}
RNN_OPERATORS = {"ADD", "FULLY_CONNECTED", "GATHER", "LOGISTIC", "MUL", "RESHAPE", "SPLIT", "STRIDED_SLICE", "TANH"}


@pytest.fixture(scope="module")
def made():
    """Return `get(name, bits)`: a deploy model, its weights and its float file; each is made once."""
    kept = {}

    def get(name, bits):
        if (name, bits) not in kept:
            keras.utils.set_random_seed(0)
            model = NETS[name](bits)
            weights = quantize(model, axes=ATTENTION_AXES)
            kept[name, bits] = model, weights, to_float_file(model)
        return kept[name, bits]

    return get


def _tensors(content):
    file = TfliteFile(content)
    return [tensor for graph in file.graphs for tensor in graph.tensors]


def _stored(content, *kinds):
    """Return the constants of these types."""
    file = TfliteFile(content)
    return [tensor for tensor in _tensors(content) if tensor.type in kinds and _data(file, tensor) is not None]


def _data(file, tensor):
    return file.model.buffers[tensor.buffer].data


def _scales(tensors):
    return sorted(tuple(np.asarray(tensor.quantization.scale).ravel()) for tensor in tensors)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", NETS)
def test_the_file_agrees_with_keras_in_output_steps(made, tmp_path, name, bits):
    model, weights, source = made(name, bits)
    content, notes = quantize_file(source, weights, compute="integer")
    x = samples(model)
    steps = [grid[0] for grid in output_grids(content)]
    for expected, received, step in zip(outputs(model, x), run(content, tmp_path, x), steps, strict=True):
        difference = np.abs(expected - received) / step
        assert difference.mean() < (0.5 if bits == 8 else 1)
        assert (expected.argmax(-1) == received.argmax(-1)).mean() >= (0.97 if bits == 8 else 1)
    found = float_operators(content, places(model))
    if name == "recurrent":
        assert {layer for _, layer in found} == {"recurrent"}
        assert {operator for operator, _ in found} == RNN_OPERATORS
    else:
        assert found == []
    assert notes == []
    assert content == quantize_file(source, weights, compute="integer")[0]


@pytest.mark.parametrize("bits", [8, 16])
def test_every_scale_in_the_file_is_one_of_the_model(made, bits):
    model, weights, source = made("convolutional", bits)
    content, _ = quantize_file(source, weights, compute="integer")
    expected = np.unique([np.float32(layer.step) for layer in model.layers if isinstance(layer, Marker)])
    file = TfliteFile(content)
    computed = [tensor for tensor in _tensors(content) if tensor.type == Type.INT16 or _data(file, tensor) is None]
    found = np.unique([tensor.quantization.scale for tensor in computed if tensor.type in (Type.INT8, Type.INT16)])
    assert all(np.isclose(found, step, rtol=3e-7).any() for step in expected)
    assert all(np.isclose(expected, step, rtol=3e-7).any() for step in found)
    assert _scales(_stored(content, Type.INT8)) == sorted(tuple(weight.scale.ravel()) for weight in weights)


def test_biases_have_64_bits_beside_activations_of_16(made):
    _, weights, source = made("convolutional", 16)
    file = TfliteFile(quantize_file(source, weights, compute="integer")[0])
    graph = file.graphs[0]
    biases = [graph.tensors[op.inputs[2]].type for op in graph.operators if file.code(op) == Op.CONV_2D]
    assert biases == [Type.INT64, Type.INT64]


def test_learned_scales_and_few_bits_survive(tmp_path):
    """A converter would derive other scales from these weights: no channel reaches 127 steps."""
    keras.utils.set_random_seed(1)
    model = convolutional()
    bits = {"conv": 5, "depthwise": 8, "pointwise": 3, "transposed": 8, "hidden": 4, "head": 2}
    weights = quantize(model, bits=bits, shrink=1.13)
    content, notes = quantize_file(to_float_file(model), weights, compute="integer")
    assert _scales(_stored(content, Type.INT8)) == sorted(tuple(weight.scale.ravel()) for weight in weights)
    assert notes == [
        "Layer 'conv': TFLite stores its 5-bit weights in 8 bits each.",
        "Layer 'head': TFLite stores its 2-bit weights in 8 bits each.",
        "Layer 'hidden': TFLite stores its 4-bit weights in 8 bits each.",
        "Layer 'pointwise': TFLite stores its 3-bit weights in 8 bits each.",
    ]
    x = samples(model)
    difference = np.abs(outputs(model, x)[0] - run(content, tmp_path, x)[0]) * 256
    assert difference.mean() < 0.5


def test_packed_weights_take_half_a_byte_and_compute_the_same(tmp_path):
    keras.utils.set_random_seed(1)
    model = convolutional()
    weights = quantize(model, bits=4)
    source = to_float_file(model)
    plain, _ = quantize_file(source, weights, compute="integer")
    assert _stored(plain, Type.INT4) == []
    packed, notes = quantize_file(source, weights, compute="integer", int4="packed")
    assert len(_stored(packed, Type.INT4)) == 5
    assert notes == ["Layer 'transposed': TFLite stores its 4-bit weights in 8 bits each."]
    x = samples(model)
    difference = np.abs(run(plain, tmp_path, x)[0] - run(packed, tmp_path, x)[0]) * 256
    assert difference.mean() < 0.2
    assert difference.max() <= 2


def test_activations_of_16_bits_have_no_zero_point():
    inputs = keras.Input((4,), name="x")
    skewed = Call(lambda x: tf.quantization.fake_quant_with_min_max_vars(x, 0.0, 4.0, num_bits=16))
    model = keras.Model(inputs, keras.ops.reshape(skewed(inputs), (-1, 2, 2)), name="net")
    with pytest.raises(ExportError, match="Received: zero point -32768"):
        quantize_file(to_float_file(model), [], compute="integer")


def test_dynamic_batches(made, tmp_path):
    model, weights, _ = made("attention", 8)
    content, _ = quantize_file(to_float_file(model, single=False), weights, compute="integer")
    x = samples(model)
    assert float_operators(content, places(model)) == []
    single, _ = quantize_file(made("attention", 8)[2], weights, compute="integer")
    np.testing.assert_array_equal(run(content, tmp_path, x)[0], run(single, tmp_path, x)[0])


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_integer_inputs_and_outputs(made, tmp_path, kind):
    model, weights, source = made("several", 8)
    x = samples(model)
    expected = run(quantize_file(source, weights, compute="integer")[0], tmp_path, x)
    content, _ = quantize_file(source, weights, compute="integer", io=kind)
    assert not [tensor for tensor in _tensors(content) if tensor.type == Type.FLOAT32]
    for one, other in zip(expected, run(content, tmp_path, x), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [round(scale, 7) for scale, _ in output_grids(content)] == [0.0156863, 0.0039062]


def test_a_bias_beside_dead_weights_does_not_overflow(tmp_path):
    """The scale of a dead channel is so small that its bias has no 32-bit integer."""
    keras.utils.set_random_seed(0)
    mark, inputs = marker(), keras.Input((5,), name="x")
    model = keras.Model(inputs, mark(L.Dense(3, name="head")(mark(inputs))), name="net")
    kernel = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    kernel[:, 1] *= 1e-12
    model.get_layer("head").kernel.assign(kernel)
    weights = quantize(model)
    model.get_layer("head").bias.assign([0.25, -1.5, 0.5])
    content, _ = quantize_file(to_float_file(model), weights, compute="integer")
    x = samples(model)
    difference = np.abs(outputs(model, x)[0] - run(content, tmp_path, x)[0])
    assert difference.max() < 4 / 255 * 1.01
    assert (run(content, tmp_path, x)[0][:, 1] < -1.49).all()


class Call(L.Layer):
    """An operation that keras.ops does not have."""

    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def call(self, x):
        return self.function(x)

    def compute_output_spec(self, x):
        return keras.KerasTensor((None, *self.function(tf.zeros((1, *x.shape[1:]))).shape[1:]), x.dtype)


ops = keras.ops
OPERATORS = {
    "add": lambda x: x + x, "sub": lambda x: x - x[:, ::-1], "mul": lambda x: x * x, "scaled": lambda x: x * 0.37,
    "shifted": lambda x: 1.0 - x, "mean": lambda x: ops.mean(x, axis=(1, 2)), "sum": lambda x: ops.sum(x, axis=1),
    "relu": L.ReLU(), "relu6": L.ReLU(6.0), "leaky": L.LeakyReLU(), "swish": ops.hard_swish, "gelu": ops.gelu,
    "tanh_gelu": lambda x: ops.gelu(x, approximate=True), "elu": ops.elu, "exp": ops.exp, "abs": ops.absolute,
    "softmax": ops.softmax, "sigmoid": ops.sigmoid, "tanh": ops.tanh, "log_softmax": ops.log_softmax,
    "l2": Call(lambda x: tf.math.l2_normalize(x, axis=-1)), "max_pool": L.MaxPooling2D(),
    "average_pool": L.AveragePooling2D(2), "max": lambda x: ops.max(x, axis=(1, 2)),
    "min": lambda x: ops.min(x, axis=(1, 2)), "bilinear": L.UpSampling2D(interpolation="bilinear"),
    "nearest": Call(lambda x: tf.image.resize(x, (8, 8), "nearest")), "transpose": L.Permute((2, 3, 1)),
    "pad": L.ZeroPadding2D(), "mirror": lambda x: ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], mode="reflect"),
    "crop": L.Cropping2D(), "strided": lambda x: x[:, ::2, 1:], "take": lambda x: ops.take(x, [0, 2], axis=3),
    "split": lambda x: ops.split(x, 2, axis=3)[1], "stack": lambda x: ops.stack([x, x], axis=1),
    "unstack": lambda x: ops.unstack(x, axis=1)[1], "tile": lambda x: ops.tile(x, (1, 2, 1, 1)),
    "flip": lambda x: ops.flip(x, axis=1), "concatenate": lambda x: ops.concatenate([x, x[:, :2]], axis=1),
    "maximum": lambda x: ops.maximum(x, x[:, ::-1]), "minimum": lambda x: ops.minimum(x, 0.5),
    "where": lambda x: ops.where(ops.arange(4) > 1, x, x[:, ::-1]), "reshape": lambda x: ops.reshape(x, (-1, 16, 4)),
    "matmul": lambda x: ops.matmul(x, ops.swapaxes(x, 2, 3)), "difference": Call(lambda x: tf.math.squared_difference(x, x[:, ::-1])),
    "to_depth": Call(lambda x: tf.nn.space_to_depth(x, 2)), "to_space": Call(lambda x: tf.nn.depth_to_space(x, 2)),
    "wide": lambda x: ops.broadcast_to(x[:, None], (1, 3, 4, 4, 4)),
}  # fmt: skip
RANGES = {"matmul": (-16, 16), "sum": (-8, 8), "exp": (0, 8), "difference": (0, 8), "log_softmax": (-255 / 16, 0)}
FLOAT = {
    8: set(),
    16: {
        "DEPTH_TO_SPACE", "ELU", "GELU", "HARD_SWISH", "L2_NORMALIZATION", "LOG_SOFTMAX", "REVERSE_V2",
        "SPACE_TO_DEPTH", "SQUARED_DIFFERENCE", "SUM", "TILE",
    },
}  # fmt: skip


@pytest.mark.parametrize("bits", [8, 16])
def test_operators_compute_on_integers(tmp_path, bits):
    mark, inputs = marker(bits), keras.Input((4, 4, 4), name="x")
    x = mark(inputs)
    results = {name: mark(call(x), *RANGES.get(name, (-2, 2))) for name, call in OPERATORS.items()}
    model = keras.Model(inputs, list(results.values()), name="net")
    content, _ = quantize_file(to_float_file(model), [], compute="integer")
    assert {operator for operator, _ in float_operators(content, places(model))} == FLOAT[bits]
    arrays = samples(model, 20)
    steps = [scale for scale, _ in output_grids(content)]
    received = run(content, tmp_path, arrays)
    for name, expected, found, step in zip(results, _by_name(model, arrays), received, steps, strict=True):
        difference = np.abs(expected - found) / step
        assert difference.mean() < 0.4, name
        assert difference.max() < (1.01 if bits == 8 else 3.01), name


def _by_name(model, arrays):
    parts = [[np.asarray(value) for value in model(arrays[0][i : i + 1])] for i in range(len(arrays[0]))]
    return [np.concatenate(values) for values in zip(*parts, strict=True)]
