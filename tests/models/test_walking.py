"""Layer paths and the choice of kernels."""

from __future__ import annotations

import keras
import pytest
from keras import layers

from compress.errors import UsageError
from compress.models.walking import find_kernels, find_layers


def encoder() -> keras.Model:
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x), name="encoder")


def nested() -> keras.Model:
    left, right = keras.Input((6, 6, 2), name="left"), keras.Input((6, 6, 2), name="right")
    shared, head = encoder(), layers.Dense(4, name="head")
    x = layers.add([head(shared(left)), head(shared(right))], name="sum")
    return keras.Model([left, right], x)


def paths(model: keras.Model, **options) -> list[str]:
    return [kernel.path for kernel in find_kernels(model, **options)[0]]


def test_nested_and_shared_layers_appear_once():
    found = [path for path, layer in find_layers(nested()) if layer.weights]
    assert found == ["encoder/conv", "encoder/bn", "head"]


def test_kernels_and_reasons():
    model = nested()
    kernels, skipped = find_kernels(model)
    assert [(kernel.path, kernel.layer_path) for kernel in kernels] == [
        ("encoder/conv/kernel", "encoder/conv"),
        ("head/kernel", "head"),
    ]
    assert kernels[1].variable is model.get_layer("head").kernel
    assert [(each.path, each.reason) for each in skipped] == [("encoder/bn", "BatchNormalization has no kernel")]


def test_paths_are_the_same_after_loading(tmp_path):
    model = nested()
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert paths(loaded) == paths(model) == ["encoder/conv/kernel", "head/kernel"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ["encoder"]}, ["encoder/conv/kernel"]),
        ({"include": ["*/conv", "head/kernel"]}, ["encoder/conv/kernel", "head/kernel"]),
        ({"exclude": ["encoder/*"]}, ["head/kernel"]),
        ({"exclude": ["head"]}, ["encoder/conv/kernel"]),
    ],
    ids=str,
)
def test_patterns(options, expected):
    assert paths(nested(), **options) == expected


def test_layers_inside_layers_stay_inside():
    keras.utils.clear_session()  # numbers of made-up names start afresh
    inputs = keras.Input((5, 4))
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True), name="both")(inputs)
    x = layers.MultiHeadAttention(1, 2, name="attention")(x, x)
    x = layers.TimeDistributed(layers.Dense(3, name="inner"), name="each")(x)
    x = layers.SeparableConv1D(2, 2, name="separable")(x)
    assert paths(keras.Model(inputs, x)) == [
        "both/forward_lstm/lstm_cell/kernel",
        "both/forward_lstm/lstm_cell/recurrent_kernel",
        "both/backward_lstm/lstm_cell/kernel",
        "both/backward_lstm/lstm_cell/recurrent_kernel",
        "attention/query/kernel",
        "attention/key/kernel",
        "attention/value/kernel",
        "attention/attention_output/kernel",
        "each/inner/kernel",
        "separable/depthwise_kernel",
        "separable/pointwise_kernel",
    ]


def test_frozen_and_unknown_are_reported():
    class Scale(layers.Layer):
        def build(self, shape):
            self.factor = self.add_weight(shape=(shape[-1],), name="factor")

        def call(self, x):
            return x * self.factor

    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, name="fixed"), Scale(name="scale"), layers.Dense(2, name="free")]
    )
    model.get_layer("fixed").trainable = False
    kernels, skipped = find_kernels(model, exclude=["scale"])
    assert [kernel.path for kernel in kernels] == ["free/kernel"]
    assert {each.path: each.reason for each in skipped} == {
        "scale": "Scale has no kernel",
        "fixed/kernel": "frozen",
    }


def test_weights_that_a_subclassed_model_holds_itself():
    class Own(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.parts = [layers.Dense(3, name="part")]
            self.kernel = self.add_weight(shape=(3, 2), name="kernel")

        def call(self, x):
            return self.parts[0](x) @ self.kernel

    model = Own()
    model(keras.ops.ones((1, 4)))
    assert paths(model) == ["part/kernel", "own/kernel"]


def test_nothing_to_do():
    with pytest.raises(UsageError, match="matches no layer") as error:
        find_kernels(nested(), include=["heat"])
    assert "head" in error.value.help
    with pytest.raises(UsageError, match="at least one trainable kernel") as error:
        find_kernels(nested(), include=["encoder/bn"])
    assert "encoder/conv/kernel: not included" in error.value.help
    quantized = nested()
    quantized.trainable = False
    with pytest.raises(UsageError, match="at least one trainable kernel") as error:
        find_kernels(quantized)
    assert "head/kernel: frozen" in error.value.help
