"""The written table of layers that cross: Keras 3 -> tf_keras -> Keras 3 gives equal outputs for each."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers as L

from compress.errors import SetupError, UsageError
from compress.legacy.dialects import LAYERS
from compress.legacy.twins import from_tf_keras, require_twins, to_tf_keras

CASES = {
    "Dense": ((5,), lambda x: L.Dense(3, activation="gelu")(x)),
    "relu6": ((5,), lambda x: L.Dense(3, activation="relu6")(x)),
    "Activation": ((5,), lambda x: L.Activation("silu")(x)),
    "leaky": ((5,), lambda x: L.Activation("leaky_relu")(x)),
    "Conv1D": ((8, 3), lambda x: L.Conv1D(4, 3, dilation_rate=2)(x)),
    "Conv2D": ((8, 8, 4), lambda x: L.Conv2D(4, 3, groups=2, padding="same", strides=2)(x)),
    "Conv3D": ((5, 5, 5, 2), lambda x: L.Conv3D(4, 3)(x)),
    "Conv1DTranspose": ((8, 3), lambda x: L.Conv1DTranspose(4, 3, strides=2)(x)),
    "Conv2DTranspose": ((8, 8, 3), lambda x: L.Conv2DTranspose(4, 3, strides=2, padding="same")(x)),
    "Conv3DTranspose": ((4, 4, 4, 2), lambda x: L.Conv3DTranspose(3, 3)(x)),
    "DepthwiseConv1D": ((8, 3), lambda x: L.DepthwiseConv1D(3, depth_multiplier=2)(x)),
    "DepthwiseConv2D": ((8, 8, 3), lambda x: L.DepthwiseConv2D(3, depth_multiplier=2)(x)),
    "SeparableConv1D": ((8, 3), lambda x: L.SeparableConv1D(4, 3)(x)),
    "SeparableConv2D": ((8, 8, 3), lambda x: L.SeparableConv2D(4, 3, depth_multiplier=2)(x)),
    "BatchNormalization": ((8, 8, 3), lambda x: L.BatchNormalization()(x)),
    "LayerNormalization": ((8, 3), lambda x: L.LayerNormalization()(x)),
    "GroupNormalization": ((8, 8, 4), lambda x: L.GroupNormalization(2)(x)),
    "UnitNormalization": ((8,), lambda x: L.UnitNormalization()(x)),
    "Normalization": ((8, 3), lambda x: L.Normalization(mean=[1, 2, 3], variance=[4, 5, 6])(x)),
    "PReLU": ((8, 8, 3), lambda x: L.PReLU(shared_axes=[1, 2])(x)),
    "LeakyReLU": ((8,), lambda x: L.LeakyReLU(0.1)(x)),
    "ELU": ((8,), lambda x: L.ELU(0.7)(x)),
    "ReLU": ((8,), lambda x: L.ReLU(6.0, 0.1, 0.2)(x)),
    "Softmax": ((8, 3), lambda x: L.Softmax(1)(x)),
    **{
        n: ((8,), lambda x, n=n: getattr(L, n)()([x, L.Dense(8)(x)]))
        for n in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate")
    },
    "Dot": ((8, 3), lambda x: L.Dot(axes=2, normalize=True)([x, L.Dense(3)(x)])),
    **{
        f"{p}Pooling{d}D": ((8,) * d + (3,), lambda x, p=p, d=d: getattr(L, f"{p}Pooling{d}D")(3, 2, padding="same")(x))
        for p in ("Max", "Average")
        for d in (1, 2, 3)
    },
    **{
        f"Global{p}Pooling{d}D": (
            (8,) * d + (3,),
            lambda x, p=p, d=d: getattr(L, f"Global{p}Pooling{d}D")(keepdims=True)(x),
        )
        for p in ("Max", "Average")
        for d in (1, 2, 3)
    },
    **{
        f"{p}{d}D": ((8,) * d + (3,), lambda x, p=p, d=d: getattr(L, f"{p}{d}D")(2)(x))
        for p in ("UpSampling", "ZeroPadding", "Cropping")
        for d in (1, 2, 3)
    },
    "UpSampling bilinear": ((6, 6, 3), lambda x: L.UpSampling2D(2, interpolation="bilinear")(x)),
    "Flatten": ((4, 3), lambda x: L.Flatten()(x)),
    "Reshape": ((4, 3), lambda x: L.Reshape((2, 6))(x)),
    "Permute": ((4, 3), lambda x: L.Permute((2, 1))(x)),
    "RepeatVector": ((4,), lambda x: L.RepeatVector(3)(x)),
    "Identity": ((4,), lambda x: L.Identity()(x)),
    "Masking": ((4, 3), lambda x: L.LSTM(2)(L.Masking(0.0)(x))),
    "Embedding": ((6,), lambda x: L.GRU(3)(L.Embedding(9, 4, mask_zero=True)(x)), "int32"),
    "LSTM": ((6, 3), lambda x: L.LSTM(4, return_sequences=True, go_backwards=True)(x)),
    "GRU": ((6, 3), lambda x: L.GRU(4)(x)),
    "GRU v1": ((6, 3), lambda x: L.GRU(4, reset_after=False)(x)),
    "SimpleRNN": ((6, 3), lambda x: L.SimpleRNN(4)(x)),
    "RNN": ((6, 3), lambda x: L.RNN([L.LSTMCell(4), L.GRUCell(3), L.SimpleRNNCell(2)])(x)),
    "state": (
        (6, 3),
        lambda x: (lambda o: L.LSTM(4)(o[0], initial_state=[o[1], o[2]]))(
            L.LSTM(4, return_sequences=True, return_state=True)(x)
        ),
    ),
    "Bidirectional": ((6, 3), lambda x: L.Bidirectional(L.LSTM(4, return_sequences=True), merge_mode="sum")(x)),
    "TimeDistributed": ((6, 3), lambda x: L.TimeDistributed(L.Dense(4))(x)),
    "ConvLSTM1D": ((4, 6, 3), lambda x: L.ConvLSTM1D(2, 3)(x)),
    "ConvLSTM2D": ((4, 6, 6, 3), lambda x: L.ConvLSTM2D(2, 3)(x)),
    "ConvLSTM3D": ((3, 4, 4, 4, 2), lambda x: L.ConvLSTM3D(2, 3)(x)),
    "MultiHeadAttention": (
        (6, 4),
        lambda x: L.MultiHeadAttention(2, 3, value_dim=5)(x, L.Dense(4)(x), use_causal_mask=True),
    ),
    "Attention": ((6, 4), lambda x: L.Attention(use_scale=True)([x, L.Dense(4)(x)])),
    "AdditiveAttention": ((6, 4), lambda x: L.AdditiveAttention()([x, L.Dense(4)(x)])),
    "EinsumDense": ((6, 4), lambda x: L.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d")(x)),
    **{
        n: ((8,), lambda x, n=n: getattr(L, n)(0.3)(x))
        for n in ("Dropout", "GaussianDropout", "GaussianNoise", "AlphaDropout")
    },
    **{
        f"SpatialDropout{d}D": ((8,) * d + (3,), lambda x, d=d: getattr(L, f"SpatialDropout{d}D")(0.3)(x))
        for d in (1, 2, 3)
    },
    "ActivityRegularization": ((8,), lambda x: L.ActivityRegularization(0.1)(x)),
    "Rescaling": ((8, 8, 3), lambda x: L.Rescaling(1 / 127.5, -1)(x)),
    "Resizing": ((8, 8, 3), lambda x: L.Resizing(5, 6)(x)),
    "CenterCrop": ((8, 8, 3), lambda x: L.CenterCrop(5, 6)(x)),
    "CategoryEncoding": ((3,), lambda x: L.CategoryEncoding(9, "multi_hot")(x), "int32"),
    "RandomFlip": ((8, 8, 3), lambda x: L.RandomFlip()(x)),
    "RandomRotation": ((8, 8, 3), lambda x: L.RandomRotation(0.1)(x)),
    "RandomZoom": ((8, 8, 3), lambda x: L.RandomZoom(0.1)(x)),
    "RandomTranslation": ((8, 8, 3), lambda x: L.RandomTranslation(0.1, 0.1)(x)),
    "RandomCrop": ((8, 8, 3), lambda x: L.RandomCrop(8, 8)(x)),
    "RandomContrast": ((8, 8, 3), lambda x: L.RandomContrast(0.1)(x)),
    "RandomBrightness": ((8, 8, 3), lambda x: L.RandomBrightness(0.1)(x)),
    "ops": (
        (8, 8, 3),
        lambda x: keras.ops.mean((x + 1) * 2 + L.Dense(3)(x) / 3 - keras.ops.relu6(x), axis=1, keepdims=True),
    ),
    "attention by operations": (
        (6, 4),
        lambda x: (
            lambda q, k, v: keras.ops.matmul(
                keras.ops.softmax(keras.ops.matmul(q, keras.ops.transpose(k, (0, 2, 1))) * 0.5), v
            )
        )(L.Dense(4)(x), L.Dense(4)(x), L.Dense(4)(x)),
    ),
    "shapes by operations": (
        (6, 4),
        lambda x: keras.ops.stack(
            [keras.ops.squeeze(keras.ops.expand_dims(x[:, 1:], 1), 1), keras.ops.log_softmax(x[:, :-1], axis=1)], axis=2
        ),
    ),
    "functions by operations": (
        (6, 4),
        lambda x: (
            keras.ops.gelu(keras.ops.leaky_relu(keras.ops.selu(x), 0.3))
            + keras.ops.hard_silu(keras.ops.rsqrt(keras.ops.square(x) + 1.0))
            * keras.ops.log(keras.ops.softplus(x) + 1.0)
        ),
    ),
    "hard_sigmoid": ((5,), lambda x: L.Dense(3, activation="hard_sigmoid")(x)),
    "hard_silu": ((8, 8, 3), lambda x: L.Activation("hard_silu")(L.Conv2D(4, 3, activation="hard_silu")(x))),
    "log_softmax": ((5,), lambda x: L.Dense(3, activation="log_softmax")(x)),
    "nested": ((8, 8, 3), lambda x: keras.Sequential([L.Conv2D(4, 3), L.BatchNormalization(), L.ReLU()])(x)),
    "shared": ((8,), lambda x: (lambda d: L.Add()([d(x), d(d(x))]))(L.Dense(8))),
}


def outputs_agree(model, x) -> None:
    twin = to_tf_keras(model)
    again = from_tf_keras(twin).model
    expected = np.asarray(model.predict(x, verbose=0))
    np.testing.assert_allclose(np.asarray(twin.predict(x, verbose=0)), expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(again.predict(x, verbose=0)), expected, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_layer_crosses_and_comes_back(name):
    shape, build, *dtype = CASES[name]
    dtype = dtype[0] if dtype else "float32"
    random = np.random.default_rng(0)
    inputs = keras.Input(shape, dtype=dtype)
    model = keras.Model(inputs, build(inputs))
    weights = [random.uniform(0.1, 0.9, w.shape) if "float" in str(w.dtype) else w for w in model.get_weights()]
    model.set_weights(weights)
    x = random.standard_normal((2, *shape)) if dtype == "float32" else random.integers(0, 9, (2, *shape))
    outputs_agree(model, x.astype(dtype))


def test_table_of_layers_is_complete():
    """Each layer type of the table is in a case above; a new row needs one."""
    used = set()
    for shape, build, *dtype in CASES.values():
        inputs = keras.Input(shape, dtype=dtype[0] if dtype else "float32")
        pending = [keras.Model(inputs, build(inputs)).get_config()]
        while pending:
            item = pending.pop()
            if isinstance(item, dict):
                used.add(item.get("class_name"))
                pending += item.values()
            elif isinstance(item, (list, tuple)):
                pending += item
    assert used >= LAYERS, LAYERS - used


@pytest.mark.parametrize(
    ("application", "size"), [("MobileNetV2", 64), ("ResNet50", 48), ("EfficientNetB0", 48), ("MobileNetV3Small", 48)]
)
def test_applications_cross_and_come_back(application, size):
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, application)(weights=None, input_shape=(size, size, 3), classes=10)
    random = np.random.default_rng(0)
    for layer in model.layers:  # statistics as a training leaves them, so that outputs tell inputs apart
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights(
                [gamma, random.normal(0, 0.1, beta.shape), mean, random.uniform(0.5, 1.5, variance.shape)]
            )
    x = random.uniform(0, 255 if application == "EfficientNetB0" else 1, (2, size, size, 3)).astype("float32")
    twin = to_tf_keras(model)
    again = from_tf_keras(twin).model
    # Before the softmax, which would hide differences: relative to the largest activation.
    ours, back = (keras.Model(m.inputs, m.layers[-2].output) for m in (model, again))
    expected, found = (np.asarray(m.predict(x, verbose=0)) for m in (ours, back))
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(
        np.asarray(twin.predict(x, verbose=0)), np.asarray(model.predict(x, verbose=0)), atol=1e-5
    )


def test_what_cannot_cross_is_named_all_at_once():
    inputs = keras.Input((8, 4))
    x = L.RMSNormalization(name="norm")(inputs)
    x = L.LSTM(4, recurrent_activation="hard_sigmoid", return_sequences=True, name="gate")(x)
    x = keras.ops.cumsum(L.GroupQueryAttention(2, 2, 1, name="attention")(x, x), axis=1)
    with pytest.raises(UsageError) as raised:
        require_twins(keras.Model(inputs, x))
    for name in ("'norm' is a RMSNormalization", "'gate'", "hard_sigmoid", "'attention'", "Cumsum"):
        assert name in str(raised.value)


def test_other_backends_are_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    model = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    with pytest.raises(SetupError, match="jax"):
        to_tf_keras(model)
