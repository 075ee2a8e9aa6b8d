"""AWQ over models: the float function stays, the quantized one gets closer to it, and only exact scalings are made."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import UsageError
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.model_awq import apply_awq
from compress.quantization.restoration import quantized_layers, restore_layers


def block(residual: bool = False) -> tuple[keras.Model, np.ndarray]:
    """Return a block in which a few channels behind the norm are large, and samples."""
    keras.utils.set_random_seed(0)
    x = keras.Input((5, 16))
    y = layers.LayerNormalization(name="norm")(x)
    attended = layers.MultiHeadAttention(2, 8, name="attention")(y, y)
    z = layers.Dense(32, activation="relu", name="wide")(layers.Dropout(0.1)(attended + (y if residual else x)))
    model = keras.Model(x, layers.Dense(3, name="head")(layers.Dropout(0.1)(z)))
    gain = np.where(np.arange(16) % 5 == 0, 30.0, 1.0)
    model.get_layer("norm").gamma.assign(gain)
    return model, np.random.default_rng(0).normal(size=(60, 5, 16)).astype("float32")


def test_float_outputs_stay_and_quantized_ones_come_closer():
    model, x = block()
    expected = model.predict(x, verbose=0)
    q = fake_quantize(model, "int8_weights", bits=3)
    scaled, skipped = apply_awq(q, x)
    assert [(each.paths, each.absorbed_by) for each in scaled] == [
        (("attention/query", "attention/key", "attention/value"), "norm"),
        (("head",), "wide"),
    ]
    assert scaled[0].alpha > 0
    assert [each.path for each in skipped] == ["attention/attention_output", "wide"]
    again = restore_layers(q, quantized_layers(q)).predict(x, verbose=0)
    np.testing.assert_allclose(again, expected, atol=2e-5 * np.abs(expected).max())

    plain = fake_quantize(model, "int8_weights", bits=3).predict(x, verbose=0)
    aware = q.predict(x, verbose=0)
    assert np.square(aware - expected).mean() < 0.9 * np.square(plain - expected).mean()


def test_a_tensor_that_others_read_is_not_divided():
    model, x = block(residual=True)
    scaled, skipped = apply_awq(fake_quantize(model, "int8_weights", bits=3), x)
    assert [each.paths for each in scaled] == [("head",)]
    reasons = {each.path: each.reason for each in skipped}
    assert reasons["attention/query"] == "reads a tensor that other operations need unscaled"
    assert reasons["wide"].startswith("follows ")
    assert reasons["wide"].endswith("which cannot be divided exactly")


@pytest.mark.parametrize(
    ("activation", "scales"),
    [(layers.ReLU(), True), (layers.ReLU(6.0), False), (layers.Activation("gelu"), False)],
    ids=["relu", "relu6", "gelu"],
)
def test_activations_in_between(activation, scales):
    keras.utils.set_random_seed(0)
    x = keras.Input((6,))
    y = layers.Dense(8, name="one")(x)
    model = keras.Model(x, layers.Dense(3, name="two")(activation(y)))
    q = fake_quantize(model, "int4_weights", group_size=4)
    samples = 10 * np.random.default_rng(0).normal(size=(50, 6)).astype("float32")
    if not scales:
        with pytest.raises(UsageError, match=r"layers that AWQ can scale.*one: reads an input of the model; two: "):
            apply_awq(q, samples)
        return
    scaled, _ = apply_awq(q, samples)
    assert [(each.paths, each.absorbed_by) for each in scaled] == [(("two",), "one")]
    again = restore_layers(q, quantized_layers(q)).predict(samples, verbose=0)
    np.testing.assert_allclose(again, model.predict(samples, verbose=0), rtol=1e-4, atol=1e-4)


def test_quantized_activations_are_refused():
    model, x = block()
    with pytest.raises(UsageError, match=r"float activations for AWQ.*are quantized"):
        apply_awq(fake_quantize(model, "int8"), x)
