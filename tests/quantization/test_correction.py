"""Mean errors of quantized layers go into their biases, layer after layer."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import DataError, UsageError
from compress.models.graph import repeat, rewrite_graph
from compress.quantization.calibration import calibrate
from compress.quantization.correction import correct_biases
from compress.quantization.fake_quantization import fake_quantize, prepare_graph


def damaged(model: keras.Model, bits: int = 3) -> keras.Model:
    """Return a copy whose kernels are rounded to few steps."""
    copy = keras.models.clone_model(model)

    copy.set_weights(model.get_weights())
    for variable in copy.weights:
        if variable.name == "kernel":
            value = np.array(variable)
            step = np.abs(value).max() / (2 ** (bits - 1) - 1)
            variable.assign(np.round(value / step) * step)
    return copy


def means(model: keras.Model, x, name: str) -> np.ndarray:
    output = np.array(keras.Model(model.inputs, model.get_layer(name).output)(x))
    return output.mean(axis=tuple(range(output.ndim - 1)))


@pytest.fixture
def cnn():
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 2), name="image")
    y = layers.Conv2D(6, 3, name="one")(x)
    y = layers.DepthwiseConv2D(3, name="two")(layers.ReLU()(y))
    y = layers.Conv2D(5, 1, activation="relu", name="three")(layers.ReLU()(y))
    model = keras.Model(x, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(y)))
    return model, np.random.default_rng(0).uniform(0, 2, (50, 8, 8, 2)).astype("float32")


def test_number_worked_out_by_hand():
    """Inputs 1 and 3, weight 2 instead of 1: outputs are 2 too large on the mean."""
    x = keras.Input((1,))
    right = keras.Model(x, layers.Dense(1, name="dense")(x))
    wrong = keras.models.clone_model(right)
    right.set_weights([np.ones((1, 1)), np.array([0.5])])
    wrong.set_weights([np.full((1, 1), 2.0), np.array([0.5])])
    corrected, skipped = correct_biases(right, wrong, np.array([[1.0], [3.0]], "float32"), batch_size=1)
    assert wrong.get_weights()[1].tolist() == [-1.5]
    assert [(each.path, each.before, each.after) for each in corrected] == [("dense", 2.0, 0.0)]
    assert skipped == []


def test_means_agree_in_every_layer(cnn):
    model, x = cnn
    wrong = damaged(model)
    kernels = [value for value in wrong.get_weights() if value.ndim > 1]
    weights = model.get_weights()
    before = [np.abs(means(wrong, x, name) - means(model, x, name)).max() for name in ("one", "two", "head")]
    corrected, _ = correct_biases(model, wrong, x, batch_size=16)
    after = [np.abs(means(wrong, x, name) - means(model, x, name)).max() for name in ("one", "two", "head")]
    assert min(before) > 0.01
    assert max(after) < 1e-5
    assert [each.path for each in corrected] == ["one", "two", "three", "head"]
    assert corrected[2].after < 0.2 * corrected[2].before  # a ReLU inside takes up a part of each step
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    assert all(
        np.array_equal(a, b) for a, b in zip(kernels, [v for v in wrong.get_weights() if v.ndim > 1], strict=True)
    )
    again, _ = correct_biases(model, wrong, x, batch_size=16)
    assert all(new.after <= old.after + 1e-6 for new, old in zip(again, corrected, strict=True))


def test_batches_do_not_matter_and_outputs_get_closer(cnn):
    model, x = cnn
    plain, one, many = damaged(model), damaged(model), damaged(model)
    correct_biases(model, one, x, batch_size=50)
    correct_biases(model, many, {"image": x}, batch_size=7)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(one.get_weights(), many.get_weights(), strict=True))
    fresh = np.random.default_rng(5).uniform(0, 2, (64, 8, 8, 2)).astype("float32")
    want = np.array(model(fresh))
    assert np.square(np.array(one(fresh)) - want).mean() < 0.5 * np.square(np.array(plain(fresh)) - want).mean()


def test_biases_of_wrapped_layers_and_of_other_shapes():
    class Wrapped(layers.Wrapper):
        def call(self, inputs):
            return self.layer(inputs)

    def build(wrap):
        x = keras.Input((4, 3))
        y = wrap(layers.EinsumDense("abc,cde->abde", (None, 2, 5), bias_axes="de", name="heads"))(x)
        y = wrap(layers.EinsumDense("abde,def->abf", (None, 2), bias_axes="f", name="out"))(y)
        return keras.Model(x, y)

    keras.utils.set_random_seed(0)
    model, wrong = build(lambda layer: layer), build(lambda layer: Wrapped(layer, name=layer.name))
    wrong.set_weights(damaged(model).get_weights())
    x = np.random.default_rng(0).uniform(0, 1, (20, 4, 3)).astype("float32")
    corrected, skipped = correct_biases(model, wrong, x)
    assert [each.path for each in corrected] == ["heads", "out"]
    assert skipped == []
    assert np.abs(np.array(wrong(x)).mean((0, 1)) - np.array(model(x)).mean((0, 1))).max() < 1e-5


def test_fake_quantized_model():
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 2))
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, use_bias=False, name="conv")(x)))
    model = keras.Model(x, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(y)))
    data = np.random.default_rng(0).uniform(0, 1, (32, 8, 8, 2)).astype("float32")
    reference = rewrite_graph(prepare_graph(model), repeat)
    quantized = calibrate(fake_quantize(model, bits=3), data)
    corrected, skipped = correct_biases(reference, quantized, data)
    assert ([each.path for each in corrected], skipped) == (["conv", "head"], [])
    assert all(each.after < 0.05 * each.before for each in corrected)


def test_what_cannot_be_corrected_is_reported():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    shared = layers.Dense(3, name="shared")
    y = layers.Dense(3, use_bias=False, name="none")(shared(a) + shared(b))
    y = layers.LayerNormalization(name="norm")(layers.Dense(4, name="dense")(y))
    model = keras.Model([a, b], layers.LSTM(2, name="lstm")(layers.Reshape((2, 2))(y)))
    x = [np.random.default_rng(i).normal(size=(9, 3)).astype("float32") for i in (0, 1)]
    corrected, skipped = correct_biases(model, damaged(model), x)
    assert [each.path for each in corrected] == ["dense"]
    reasons = {each.path: each.reason for each in skipped}
    assert set(reasons) == {"shared", "none", "norm", "lstm"}
    assert reasons["shared"].startswith("is called several times")


def test_bad_input(cnn):
    model, x = cnn
    with pytest.raises(DataError, match="at least one"):
        correct_biases(model, damaged(model), x[:0])
    with pytest.raises(DataError, match="inputs"):
        correct_biases(model, damaged(model), {"picture": x})
    with pytest.raises(DataError, match="finite"):
        correct_biases(model, damaged(model), np.full_like(x[:2], np.nan))
    y = keras.Input((8, 8, 2))
    with pytest.raises(UsageError, match="same name"):
        correct_biases(keras.Model(y, layers.Conv2D(2, 3, name="other")(y)), damaged(model), x)
