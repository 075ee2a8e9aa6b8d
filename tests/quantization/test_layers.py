"""The layers of fake-quantized models: what they compute, train, keep and save."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from compress.errors import DataError, ModelError, UsageError
from compress.models.walking import find_kernels
from compress.quantization.layers import FakeQuant, QuantizedLayer, weight_names
from compress.quantization.weight_format import WeightFormat

IMAGE, SEQUENCE, TOKENS = (2, 8, 8, 4), (2, 6, 4), (2, 3)

LAYERS = {
    "Dense": (lambda: layers.Dense(3), SEQUENCE),
    "Conv1D": (lambda: layers.Conv1D(3, 3), SEQUENCE),
    "Conv2D": (lambda: layers.Conv2D(3, 3), IMAGE),
    "Conv3D": (lambda: layers.Conv3D(3, 2), (2, 4, 4, 4, 2)),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), IMAGE),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(3, 3), IMAGE),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(3, 3), SEQUENCE),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 3), IMAGE),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), SEQUENCE),
    "Embedding": (lambda: layers.Embedding(10, 4), TOKENS),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), SEQUENCE),
    "LSTM": (lambda: layers.LSTM(3), SEQUENCE),
    "GRU": (lambda: layers.GRU(3, dropout=0.5), SEQUENCE),
    "Bidirectional": (lambda: layers.Bidirectional(layers.LSTM(3)), SEQUENCE),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(3)), SEQUENCE),
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 3), SEQUENCE),
}


@keras.saving.register_keras_serializable(package="tests")
class Pair(keras.layers.Layer):
    """A custom layer with two sublayers, the names of which Keras makes up."""

    def build(self, input_shape):
        self.first, self.second = layers.Dense(4), layers.Dense(4)
        self.first.build(input_shape)
        self.second.build(input_shape)

    def call(self, x):
        return self.first(x) - self.second(x)


LAYERS["custom"] = (Pair, SEQUENCE)


def sample(shape):
    rng = np.random.default_rng(0)
    return rng.integers(0, 10, shape) if shape == TOKENS else rng.normal(size=shape).astype("float32")


def make(kind, seed=0):
    keras.utils.set_random_seed(seed)
    factory, shape = LAYERS[kind]
    layer, x = factory(), sample(shape)
    return layer, (x, x) if kind == "MultiHeadAttention" else (x,)


def kernel_formats(layer, **options):
    kernels = {name: v for name, v in weight_names(layer).items() if "bias" not in name}
    return {name: WeightFormat(channel_axes=(len(v.shape) - 1,), **options) for name, v in kernels.items()}


def wrapped_dense(bits=8, **options):
    keras.utils.set_random_seed(0)
    inner = layers.Dense(3, name="head", **options)
    inner.build((None, 4))
    return QuantizedLayer(inner, {"kernel": WeightFormat(bits, (1,))})


# --- FakeQuant ---


def test_ranges_move_from_the_first_batch_on():
    layer = FakeQuant(momentum=0.75)
    x = ops.convert_to_tensor([[-1.0, 3.0]])
    assert not layer.is_calibrated
    np.testing.assert_array_equal(layer(x * 0.1234), x * 0.1234)
    layer(x, training=True)
    assert (float(layer.minimum), float(layer.maximum), int(layer.seen)) == (-1, 3, 1)
    layer(x + 4, training=True)
    assert (float(layer.minimum), float(layer.maximum), int(layer.seen)) == (0, 4, 2)
    layer(x * 100)
    layer(x * float("nan"), training=True)
    assert (float(layer.minimum), float(layer.maximum), int(layer.seen)) == (0, 4, 2)
    assert layer.scale_and_zero_point() == (np.float32(4 / 255), -128)
    assert layer.current_range() == pytest.approx((0, 4))
    y = ops.convert_to_numpy(layer(ops.convert_to_tensor([-1.0, 2.0, 5.0])))
    np.testing.assert_allclose(y, [0, 2, 4], atol=0.5 * 4 / 255 + 1e-6)


def test_frozen_ranges_stay_and_uncalibrated_layers_say_so():
    layer = FakeQuant(ranges="frozen", name="quantizer")
    x = ops.convert_to_tensor([[0.123, 7.77]])
    np.testing.assert_array_equal(layer(x, training=True), x)
    assert not layer.is_calibrated
    with pytest.raises(ModelError, match="not calibrated at 'quantizer'"):
        layer.scale_and_zero_point()
    layer.set_range(0, 2.55)
    layer(x, training=True)
    assert float(layer.maximum) == np.float32(2.55)
    np.testing.assert_allclose(layer(x), [[0.12, 2.55]], rtol=1e-6)
    layer.enabled = False
    np.testing.assert_array_equal(layer(x), x)


def test_dynamic_and_fixed_ranges_need_no_variables():
    x = ops.convert_to_tensor([[-1.0, 0.1, 0.26, 154.0]])
    dynamic = FakeQuant(bits=5, dynamic=True)
    np.testing.assert_array_equal(dynamic(x), [[0, 0, 0, 155]])  # steps of 5
    np.testing.assert_array_equal(dynamic(x * 0), x * 0)
    fixed = FakeQuant(fixed_range=(0.0, 255 / 256))
    np.testing.assert_array_equal(fixed(x), [[0, 26 / 256, 67 / 256, 255 / 256]])
    assert fixed.scale_and_zero_point() == (1 / 256, -128)
    for layer in (dynamic, fixed):
        assert layer.is_calibrated
        assert not layer.weights
        with pytest.raises(UsageError, match="range of its own"):
            layer.set_range(0, 1)
    with pytest.raises(ModelError, match="dynamic"):
        dynamic.current_range()


def test_dynamic_ranges_are_shared_along_axes():
    x = np.array([[[-1.0, 0.0, 254.0]], [[0.0, 0.3, 2.55]]], "float32")
    whole, rows = FakeQuant(dynamic=True), FakeQuant(dynamic=True, shared_axes=(1, 2))
    np.testing.assert_allclose(whole(x), [[[-1, 0, 254]], [[0, 0, 3]]])
    for training in (False, True):
        np.testing.assert_allclose(rows(x, training=training), [[[-1, 0, 254]], [[0, 0.3, 2.55]]], rtol=1e-6)
    again = FakeQuant.from_config(rows.get_config())
    assert again.shared_axes == (1, 2)
    with pytest.raises(UsageError, match="shared_axes"):
        FakeQuant(shared_axes=(1,))


@pytest.mark.parametrize(("ranges", "expected"), [("moving", [[1, 1, 1]]), ("frozen", [[0, 1, 0]])])
def test_a_range_that_follows_its_tensor_lets_all_gradients_pass(ranges, expected):
    layer = FakeQuant(ranges=ranges)
    layer.set_range(-1.0, 1.0)
    x = tf.constant([[-5.0, 0.5, 5.0]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    np.testing.assert_array_equal(tape.gradient(y, x), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_bfloat16", "float32", "float64"])
def test_dtypes_come_back(dtype):
    layer = FakeQuant(dtype=dtype)
    layer.set_range(-1, 1)
    for given in ("float16", "bfloat16", "float32", "float64"):
        y = layer(ops.convert_to_tensor(np.ones((2, 2)), given), training=True)
        assert keras.backend.standardize_dtype(y.dtype) == given
    assert layer.minimum.dtype == "float32"
    assert keras.backend.standardize_dtype(layer(ops.ones((2,), "int32")).dtype) == "int32"
    assert layer(keras.Input((3,), dtype="float16")).dtype == "float16"


def test_learned_ranges_train_once_they_are_set():
    layer = FakeQuant(bits=3, ranges="learned")
    assert [v.name for v in layer.trainable_variables] == ["minimum", "maximum"]
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    model.fit(x, x, verbose=0)
    assert not layer.is_calibrated
    layer.set_range(-0.5, 0.5)
    before = model.evaluate(x, x, verbose=0)
    model.fit(x, x, epochs=40, verbose=0)
    assert model.evaluate(x, x, verbose=0) < 0.3 * before
    assert float(layer.maximum) > 1
    assert float(layer.minimum) < -1


def test_a_shared_quantizer_sees_every_call_and_masks_pass():
    shared = FakeQuant(momentum=0.0)
    a, b = keras.Input((2,)), keras.Input((2,))
    model = keras.Model([a, b], [shared(a), shared(b)])
    model([np.ones((1, 2)), np.full((1, 2), 5.0)], training=True)
    assert int(shared.seen) == 2
    tokens = keras.Input((3,), dtype="int32")
    embedded = layers.Embedding(5, 2, mask_zero=True)(tokens)
    outputs = layers.LSTM(2)(FakeQuant()(embedded))
    masked = keras.Model(tokens, outputs)
    plain = keras.Model(tokens, masked.layers[-1](embedded))
    np.testing.assert_array_equal(masked(np.array([[1, 2, 0]])), plain(np.array([[1, 2, 0]])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9"),
        ({"bits": 1}, "bits=1"),
        ({"ranges": "ema"}, "ranges='ema'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"dynamic": True, "fixed_range": (0, 1)}, "not both"),
    ],
)
def test_settings_of_activations_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        FakeQuant(**options)


@pytest.mark.parametrize("wrong", [(1, 0), (float("nan"), 1), (0, float("inf"))])
def test_ranges_are_checked(wrong):
    with pytest.raises(DataError, match="finite range of 'q'"):
        FakeQuant(name="q").set_range(*wrong)


# --- QuantizedLayer ---


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_computes_with_its_stored_weights_and_trains(kind):
    layer, inputs = make(kind)
    float_outputs = ops.convert_to_numpy(layer(*inputs))
    wrapper = QuantizedLayer(layer, kernel_formats(layer, bits=4), path=f"block/{layer.name}")
    outputs = ops.convert_to_numpy(wrapper(*inputs))
    assert 1e-6 < np.abs(outputs - float_outputs).max() < 1
    assert wrapper.name == layer.name
    assert [v.name for v in wrapper.weights] == [v.name for v in layer.weights]

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(wrapper(*inputs)))
    gradients = tape.gradient(loss, [v.value for v in wrapper.trainable_weights])
    assert all(g is not None and np.isfinite(ops.convert_to_numpy(ops.convert_to_tensor(g))).all() for g in gradients)

    stored = wrapper.stored_weights()
    assert all(each.path.startswith(f"block/{layer.name}/") and each.values.dtype == np.int8 for each in stored)
    assert len({each.path for each in stored}) == len(stored)
    snap(wrapper)
    np.testing.assert_array_equal(layer(*inputs), outputs)  # the float layer with what files hold
    np.testing.assert_array_equal(wrapper(*inputs), outputs)


def snap(wrapper):
    """Give the layer inside the weights that files hold."""
    for name, each in zip(wrapper.formats, wrapper.stored_weights(), strict=True):
        wrapper.weight_variable(name).assign(each.dequantize())


def scale_of(wrapper, name):
    (found,) = [variable for variable in wrapper.weights if variable.name == f"{name.replace(':', '_')}_scale"]
    return found


def every_kind_model():
    """Return a model with every layer kind, formats and learned scales among them."""
    keras.utils.set_random_seed(1)
    inputs, outputs = [], []
    for kind, (_, shape) in LAYERS.items():
        layer, example = make(kind)
        layer(*example)
        options = [{"bits": 8}, {"bits": 3, "scale": "learned"}, {"bits": 5, "scale": "stored"}, {"dtype": "bfloat16"}]
        options = options[len(inputs) % 4]
        wrapper = QuantizedLayer(layer, kernel_formats(layer, **options), name=f"{kind.lower()}_layer")
        x = keras.Input(shape[1:], dtype="int32" if shape == TOKENS else "float32")
        inputs.append(x)
        y = wrapper(x, x) if kind == "MultiHeadAttention" else wrapper(x)
        outputs.append(layers.Flatten()(FakeQuant(name=f"{kind.lower()}_range")(y)))
    return keras.Model(inputs, outputs), [sample(shape) for _, shape in LAYERS.values()]


RELOAD = """
import sys, numpy as np, keras
sys.path[:0] = [{root!r}, {tests!r}]
import compress.quantization.layers
keras.layers.Dense(2), keras.layers.LSTM(2), keras.layers.Dense(2)  # shifts the names that Keras makes up
import test_layers
model = keras.models.load_model({path!r})
data = np.load({data!r})
outputs = model.predict_on_batch([data[str(i)] for i in range(len(model.inputs))])
np.savez({results!r}, *outputs)
"""


def test_save_and_load_in_a_fresh_process(tmp_path):
    model, inputs = every_kind_model()
    model(inputs, training=True)
    paths = {k: str(tmp_path / k) for k in ("model.keras", "data.npz", "results.npz")}
    model.save(paths["model.keras"])
    np.savez(paths["data.npz"], **{str(i): x for i, x in enumerate(inputs)})
    expected = model.predict_on_batch(inputs)
    folder = __file__.rpartition("/")[0]
    code = RELOAD.format(
        root=folder.rpartition("/tests/")[0],
        tests=folder,
        path=paths["model.keras"],
        data=paths["data.npz"],
        results=paths["results.npz"],
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(paths["results.npz"]) as results:
        for kind, found, wanted in zip(LAYERS, results.values(), expected, strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=kind)


def test_save_and_load_keep_formats_scales_and_paths(tmp_path):
    model, _ = every_kind_model()
    for layer in model.layers:
        for name, each in getattr(layer, "formats", {}).items():
            if each.has_variable:
                scale_of(layer, name).assign(scale_of(layer, name) * 1.5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for layer, other in zip(model.layers, loaded.layers, strict=True):
        if isinstance(layer, QuantizedLayer):
            assert (layer.formats, layer.name) == (other.formats, other.name)
            for a, b in zip(layer.stored_weights(), other.stored_weights(), strict=True):
                assert a.path == b.path or "dense_" in a.path  # Keras makes up the names inside the custom layer
                assert (a.bits, a.dtype) == (b.bits, b.dtype)
                np.testing.assert_array_equal(a.dequantize(), b.dequantize())
        assert [v.name for v in layer.weights] == [v.name for v in other.weights]


@pytest.mark.parametrize("options", [{}, {"scale": "learned"}, {"scale": "stored"}, {"dtype": "float16"}])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_snapping_changes_nothing_that_is_computed(options, bits):
    layer = layers.Dense(5)
    x = sample(SEQUENCE)
    layer(x)
    layer.kernel.assign(layer.kernel * ops.convert_to_tensor([1e-7, 0.0, 1.0, 33.0, 0.1]))
    wrapper = QuantizedLayer(layer, {"kernel": WeightFormat(bits, (1,), **options)})
    before = ops.convert_to_numpy(wrapper(x))
    snap(wrapper)
    once = ops.convert_to_numpy(layer.kernel)
    np.testing.assert_array_equal(wrapper(x), before)
    np.testing.assert_array_equal(layer(x), before)
    snap(wrapper)
    np.testing.assert_array_equal(layer.kernel, once)
    assert not once[:, 1].any()


def test_weights_that_share_a_name_are_numbered():
    layer, (x,) = make("Bidirectional")
    layer(x)
    expected = ["kernel:0", "recurrent_kernel:0", "bias:0", "kernel:1", "recurrent_kernel:1", "bias:1"]
    assert list(weight_names(layer)) == expected
    assert weight_names(layer)["kernel:1"] is layer.backward_layer.cell.kernel
    dense = layers.Dense(2)
    dense.build((None, 3))
    assert list(weight_names(dense)) == ["kernel", "bias"]


def test_stored_scales_stay_and_can_be_set():
    layer = layers.Dense(2)
    layer.build((None, 3))
    layer.kernel.assign([[0.9, 4.0], [2.2, 5.0], [-9.0, 0.0]])
    wrapper = QuantizedLayer(layer, {"kernel": WeightFormat(4, (1,), scale="stored")})
    scale_of(wrapper, "kernel").assign([[0.5, 1.0]])
    assert [v.name for v in wrapper.non_trainable_variables] == ["kernel_scale"]
    (stored,) = wrapper.stored_weights()
    np.testing.assert_array_equal(stored.values, [[2, 4], [4, 5], [-7, 0]])
    np.testing.assert_array_equal(stored.scale, [[0.5, 1.0]])
    np.testing.assert_array_equal(wrapper(np.eye(3)), stored.dequantize())


def test_groups_are_stored_as_they_are_computed():
    layer = layers.Dense(3)
    layer.build((None, 10))
    wrapper = QuantizedLayer(layer, {"kernel": WeightFormat(4, (1,), group_size=4, axis=0)})
    (stored,) = wrapper.stored_weights()
    assert stored.scale.shape == (3, 3)
    layer.bias.assign([0.0, 0.0, 0.0])
    np.testing.assert_array_equal(wrapper(np.eye(10)), stored.dequantize())


def test_losses_regularizers_and_constraints_are_those_of_the_layer():
    wrapper = wrapped_dense(
        kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(0.1), kernel_constraint="non_neg"
    )
    plain = wrapper.layer
    x = np.abs(sample((5, 4)))
    snap(wrapper)
    plain(x)
    expected = sorted(float(loss) for loss in plain.losses)
    model = keras.Sequential([keras.Input((4,)), wrapper])
    model(x)
    assert len(expected) == 2
    assert sorted(float(loss) for loss in model.losses) == pytest.approx(expected)
    model.compile("sgd", "mse")
    model.fit(x, -10 * np.ones((5, 3)), epochs=5, verbose=0)
    assert (ops.convert_to_numpy(plain.kernel) >= 0).all()


def test_random_generators_and_statistics_advance():
    keras.utils.set_random_seed(0)

    @keras.saving.register_keras_serializable(package="tests")
    class Noisy(keras.layers.Layer):
        def build(self, input_shape):
            self.dense, self.drop, self.norm = layers.Dense(16), layers.Dropout(0.5), layers.BatchNormalization()
            self.dense.build(input_shape)
            self.norm.build((None, 16))

        def call(self, x, training=False):
            return self.norm(self.drop(self.dense(x), training=training), training=training)

    layer = Noisy()
    x = sample((32, 4))
    layer(x)
    wrapper = QuantizedLayer(layer, {"kernel": WeightFormat(8, (1,))})
    inputs = keras.Input((4,))
    model = keras.Model(inputs, wrapper(inputs))
    first, second = model(x, training=True), model(x, training=True)
    assert np.abs(first - second).max() > 0.1
    assert np.abs(ops.convert_to_numpy(layer.norm.moving_mean)).max() > 1e-4
    np.testing.assert_array_equal(model(x), model(x))
    model.compile("sgd", "mse")
    seed = ops.convert_to_numpy(layer.drop.seed_generator.state).copy()
    model.fit(x, np.zeros((32, 16)), verbose=0)
    assert (ops.convert_to_numpy(layer.drop.seed_generator.state) != seed).any()


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_models_train_and_losses_fall(policy, jit_compile):
    keras.utils.set_random_seed(0)
    conv = layers.Conv2D(4, 3, activation="relu", dtype=policy)
    head = layers.Dense(2, dtype=policy)
    conv.build((None, 8, 8, 1))
    head.build((None, 4))
    conv, head = (
        QuantizedLayer(conv, {"kernel": WeightFormat(4, (3,))}),
        QuantizedLayer(head, {"kernel": WeightFormat(4, (1,), scale="learned")}),
    )
    inputs = keras.Input((8, 8, 1))
    hidden = FakeQuant(dtype=policy)(conv(FakeQuant(dtype=policy)(inputs)))
    model = keras.Model(inputs, FakeQuant(dtype=policy)(head(layers.GlobalAveragePooling2D(dtype=policy)(hidden))))
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 64)
    x = rng.normal(0, 0.3, (64, 8, 8, 1)).astype("float32") + y[:, None, None, None]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss, jit_compile=jit_compile)
    before = [ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
    history = model.fit(x, y, batch_size=16, epochs=6, verbose=0).history["loss"]
    assert history[-1] < 0.6 * history[0]
    assert all((a != ops.convert_to_numpy(b)).any() for a, b in zip(before, model.trainable_variables, strict=True))
    if policy == "float32":
        stored = conv.stored_weights()[0].dequantize()
        conv.layer.activation = keras.activations.linear
        impulse = np.zeros((1, 3, 3, 1), "float32")
        impulse[0, 1, 2, 0] = 1
        bias = ops.convert_to_numpy(conv.layer.bias)
        np.testing.assert_allclose(conv(impulse)[0, 0, 0], stored[1, 2, 0] + bias, atol=1e-6)


def test_mixed_precision_quantizes_weights_in_float32():
    inner = layers.Dense(8, dtype="mixed_bfloat16", use_bias=False)
    inner.build((None, 64))
    wrapper = QuantizedLayer(inner, {"kernel": WeightFormat(8, (1,))})
    inputs = keras.Input((64,), dtype="bfloat16")
    model = keras.Sequential([inputs, keras.Sequential([inputs, wrapper])])
    expected = ops.cast(wrapper.stored_weights()[0].dequantize(), "bfloat16")
    outputs = model(ops.cast(ops.eye(64), "bfloat16"))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    np.testing.assert_array_equal(ops.cast(outputs, "float32"), ops.cast(expected, "float32"))


def test_a_shared_wrapper_serves_every_call():
    wrapper = wrapped_dense()
    a, b = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([a, b], layers.subtract([wrapper(a), wrapper(b)]))
    x = sample((5, 4))
    np.testing.assert_array_equal(model([x, x]), np.zeros((5, 3)))
    model.compile("sgd", "mse")
    model.fit([x, 2 * x], np.ones((5, 3)), verbose=0)
    assert len(model.trainable_variables) == 2


def test_masks_and_shapes_are_those_of_the_layer():
    embedding = layers.Embedding(10, 4, mask_zero=True)
    embedding.build((None, 3))
    lstm = layers.LSTM(2)
    lstm.build((None, 3, 4))
    tokens = keras.Input((3,), dtype="int32")
    plain = keras.Model(tokens, lstm(embedding(tokens)))
    wrapped = [QuantizedLayer(layer, kernel_formats(layer)) for layer in (embedding, lstm)]
    for wrapper in wrapped:
        snap(wrapper)
    model = keras.Model(tokens, wrapped[1](wrapped[0](tokens)))
    x = np.array([[1, 2, 0], [3, 0, 0]])
    np.testing.assert_array_equal(model(x), plain(x))
    assert wrapped[0].compute_output_shape((None, 3)) == (None, 3, 4)
    assert np.abs(model(x) - model(np.array([[1, 2, 4], [3, 5, 6]]))).max() > 1e-4


def test_pruning_finds_the_kernels_inside():
    wrapper = wrapped_dense()
    model = keras.Sequential([keras.Input((4,)), wrapper])
    kernels, _ = find_kernels(model)
    assert [kernel.path for kernel in kernels] == ["head/kernel"]
    assert kernels[0].variable is wrapper.layer.kernel
    assert wrapper.stored_weights()[0].path == "head/kernel"


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(UsageError, match="expected a built layer"):
        QuantizedLayer(layers.Dense(3), {"kernel": WeightFormat()})
    dense = layers.Dense(3)
    dense.build((None, 4))
    with pytest.raises(UsageError, match=r"\['kernel', 'bias'\].*'kernel:0'"):
        QuantizedLayer(dense, {"kernel:0": WeightFormat()})
    dense.kernel.assign(dense.kernel * float("nan"))
    with pytest.raises(UsageError, match="NaN"):
        QuantizedLayer(dense, {"kernel": WeightFormat()}).stored_weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9"),
        ({"bits": True}, "bits=True"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"scale": "max"}, "scale='max'"),
        ({"group_size": 4}, "together"),
        ({"group_size": 4, "axis": 1, "channel_axes": (1,)}, "not a channel axis"),
        ({"group_size": 0, "axis": 1}, "positive group_size"),
    ],
)
def test_formats_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        WeightFormat(**options)


def test_formats_survive_json():
    import json

    each = WeightFormat(4, (-1,), group_size=32, axis=0, scale="stored")
    assert WeightFormat.from_config(json.loads(json.dumps(each.get_config()))) == each
