"""Small Keras models of every kind that users save, by name."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops


@keras.saving.register_keras_serializable(package="samples")
class Scale(layers.Layer):
    """A custom layer with one weight."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.factor = self.add_weight(shape=(input_shape[-1],), name="factor", initializer="ones")

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return inputs * self.factor


@keras.saving.register_keras_serializable(package="samples")
class Subclassed(keras.Model):
    """A model whose layers are not in its configuration."""

    def __init__(self, **options: object):
        super().__init__(**options)
        self.first = layers.Dense(3, name="first")
        self.rest = [layers.Dense(2, name="second")]

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return self.rest[0](self.first(inputs))


def image() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.RandomFlip(),
            layers.Rescaling(1 / 255, name="scaled"),
            layers.Conv2D(4, 3, padding="same", strides=2, use_bias=False, name="conv1"),
            layers.BatchNormalization(scale=False, name="norm"),
            layers.ReLU(),
            layers.SeparableConv2D(6, 3, name="separable"),
            layers.DepthwiseConv2D(2, depth_multiplier=2, name="depthwise"),
            layers.Conv2DTranspose(5, 2, strides=2, name="transposed"),
            layers.Conv2D(10, 1, groups=5, name="grouped"),
            layers.Conv2D(2, 3, padding="same", dilation_rate=2, name="dilated"),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.5),
            layers.Dense(5, activation="softmax", name="head"),
        ],
        name="image",
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def operations() -> keras.Model:
    a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    x = layers.Dense(6, name="left")(a) + layers.Dense(6, name="right")(b)
    y = ops.mean(ops.reshape(x, (-1, 2, 3)), axis=1)
    y = ops.concatenate([ops.relu(y * 2.0 - 1.0)[:, :2], x], axis=-1)
    y = layers.Activation(ops.gelu)(y)
    out = layers.Dense(2, name="out", kernel_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(2.0))(y)
    model = keras.Model([a, b], {"first": out, "second": x}, name="operations")
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, 100)
    model.compile(
        optimizer=keras.optimizers.AdamW(schedule, clipnorm=1.0),
        loss={"first": keras.losses.Huber(), "second": "mse"},
        metrics={"first": [keras.metrics.MeanAbsoluteError(), keras.losses.cosine_similarity]},
        loss_weights={"first": 1.0, "second": 0.5},
    )
    model.fit([np.ones((4, 8))] * 2, {"first": np.ones((4, 2)), "second": np.ones((4, 6))}, verbose=0)
    return model


def nested() -> keras.Model:
    encoder = keras.Sequential(
        [keras.Input((4, 4, 2)), layers.Conv2D(3, 3, name="conv1"), layers.Flatten(name="flat")],
        name="encoder",
    )
    start = keras.Input((4, 4, 2))
    tower = keras.Model(start, layers.Dense(5, name="top")(encoder(start)), name="tower")
    p, q = keras.Input((4, 4, 2), name="p"), keras.Input((4, 4, 2), name="q")
    merged = layers.Concatenate(name="joined")([tower(p), tower(q)])
    return keras.Model([p, q], layers.Dense(1, name="score")(merged), name="nested")


def text() -> keras.Model:
    words = keras.Input((12,), name="words")
    x = layers.Embedding(20, 8, name="embedding")(words)
    x = layers.LayerNormalization(name="norm")(layers.MultiHeadAttention(2, 4, name="mha")(x, x) + x)
    x = layers.Bidirectional(layers.LSTM(5, return_sequences=True, name="inner"), name="both")(x)
    x = layers.TimeDistributed(layers.Dense(3), name="each")(x)
    x = layers.GRU(4, name="gru")(x)
    return keras.Model(words, layers.Dense(2, name="head")(x), name="text")


def attention() -> keras.Model:
    start = keras.Input((6, 8))
    x = layers.GroupQueryAttention(4, 4, 2, name="gqa")(start, start)
    x = layers.SpectralNormalization(layers.Dense(8, name="inner"), name="spectral")(x)
    x = layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(4)]), True, name="stack")(x)
    x = layers.EinsumDense("abc,cd->abd", output_shape=(6, 5), name="einsum")(x)
    x = layers.Attention(name="dot")([x, x])
    return keras.Model(start, ops.matmul(ops.transpose(x, (0, 2, 1)), x), name="attention")


def video() -> keras.Model:
    frame = keras.Sequential([layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)], name="frame")
    model = keras.Sequential(
        [
            keras.Input((5, 8, 8, 2)),
            layers.ConvLSTM2D(3, 3, return_sequences=True, name="memory"),
            layers.Conv3D(2, (1, 2, 2), name="conv3d"),
            layers.TimeDistributed(frame, name="frames"),
            layers.Conv1D(3, 2, padding="causal", name="conv1d"),
            layers.Flatten(),
        ],
        name="video",
    )
    model.trainable = False
    return model


def mixed() -> keras.Model:
    layer = layers.Dense(3, dtype="mixed_float16", name="half")
    model = keras.Sequential([keras.Input((4,)), layer, layers.Dense(2, name="full")], name="mixed")
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    model.fit(np.ones((2, 4)), np.ones((2, 2)), verbose=0)
    return model


def brain_float() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype="bfloat16", name="brain")], name="brain_float")


def quantized() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False, name="int8")], name="quantized")
    model.quantize("int8")
    return model


def strings() -> keras.Model:
    vectorization = layers.TextVectorization(max_tokens=20, output_sequence_length=4)
    vectorization.adapt(["a b c", "d e"])
    start = keras.Input((), dtype="string", name="text")
    other = keras.Input((4,), dtype="string", name="tag")
    tag = layers.StringLookup(vocabulary=["a", "b"])(other)
    joined = layers.Embedding(20, 2)(vectorization(start)) + layers.Embedding(3, 2)(tag)
    return keras.Model([start, other], joined, name="strings")


def statistics() -> keras.Model:
    normalization = layers.Normalization(name="statistics")
    normalization.adapt(np.random.default_rng(0).random((10, 3)))
    return keras.Sequential([keras.Input((3,)), normalization, layers.Dense(2), layers.PReLU()], name="statistics")


def late_built() -> keras.Model:
    model = keras.Sequential([layers.Dense(3, name="a"), layers.Dense(2, name="b")], name="late_built")
    model.build((None, 7))
    return model


def dynamic() -> keras.Model:
    start = keras.Input((None, None, 3))
    x = layers.GlobalMaxPooling2D()(layers.Conv2D(4, 3, name="conv")(start))
    return keras.Model(start, layers.Dense(2, name="head")(x), name="dynamic")


def custom() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), Scale(name="scale"), layers.Dense(2, name="head")], name="custom")


def subclassed() -> keras.Model:
    model = Subclassed(name="subclassed")
    model(np.ones((1, 4)))
    return model


KERAS_ONLY: dict[str, Callable[[], keras.Model]] = {
    made.__name__: made
    for made in (
        image, operations, nested, text, attention, video, mixed, brain_float, quantized, strings, statistics,
        late_built, dynamic,
    )
}  # fmt: skip
"""Models without any custom class."""
CUSTOM: dict[str, Callable[[], keras.Model]] = {"custom": custom, "subclassed": subclassed}
"""Models that need the package `samples`."""
