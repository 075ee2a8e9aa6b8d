"""Gradients of the loss: by hand, in parts of the data, and without a trace on the model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.data.split import as_data
from compress.errors import DataError, PassError, UsageError
from compress.models.gradients import LossGradients, weight_gradients

X = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
Y = np.array([[1], [0], [2]], np.float64)


def linear(**options) -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False, kernel_initializer="ones", **options)])
    model.compile("sgd", "mse")
    return model


def test_by_hand_and_in_unequal_batches():
    model = linear()
    # d/dw of the mean of (x w - y)^2: errors 2, 7, 9
    expected = 2 / 3 * (X.T @ np.array([[2], [7], [9]]))
    for batch_size in (1, 2, 3, 99):
        (found,) = weight_gradients(model, model.trainable_variables, (X, Y), batch_size=batch_size)
        assert found.dtype == np.float32
        assert found == pytest.approx(expected, rel=1e-6)
    (first_two,) = weight_gradients(model, model.trainable_variables, (X, Y), samples=2, batch_size=3)
    assert first_two == pytest.approx(X[:2].T @ np.array([[2], [7]]), rel=1e-6)


def test_regularisation_is_part_of_the_loss():
    model = linear(kernel_regularizer=keras.regularizers.L2(0.5))
    plain, regularised = (weight_gradients(each, each.trainable_variables, (X, Y))[0] for each in (linear(), model))
    assert regularised - plain == pytest.approx(np.ones((2, 1)), rel=1e-5)  # d/dw 0.5 w^2 at w = 1


def several_outputs() -> keras.Model:
    keras.utils.set_random_seed(0)
    tokens, numbers = keras.Input((3,), dtype="int32", name="tokens"), keras.Input((4,), name="numbers")
    x = layers.Flatten()(layers.Embedding(7, 4, name="words")(tokens))
    x = layers.Concatenate()([x, layers.BatchNormalization()(layers.Dense(4, name="one")(numbers))])
    x = layers.Dropout(0.5)(layers.GaussianNoise(0.1)(x))
    outputs = {"a": layers.Dense(3, name="a")(x), "b": layers.Dense(1, name="b")(x)}
    model = keras.Model({"tokens": tokens, "numbers": numbers}, outputs)
    losses = {"a": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    model.compile("adam", losses, metrics={"a": ["accuracy"]}, loss_weights={"a": 1.0, "b": 0.0})
    return model


def batch_for_several():
    random = np.random.default_rng(0)
    x = {"tokens": random.integers(0, 6, (8, 3)), "numbers": random.standard_normal((8, 4))}
    return x, {"a": random.integers(0, 3, 8), "b": random.random((8, 1))}


@pytest.mark.parametrize(("eagerly", "trained"), [(False, True), (True, True), (False, False)])
def test_several_outputs_leave_no_trace(eagerly, trained):
    model = several_outputs()
    x, y = batch_for_several()
    if trained:
        model.fit(x, y, verbose=0)
    model.run_eagerly = eagerly
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    before = [keras.ops.convert_to_numpy(v).copy() for v in variables]
    chosen = [model.get_layer(name).trainable_variables[0] for name in ("words", "one", "a", "b")]
    words, one, a, b = weight_gradients(model, chosen, (x, y), batch_size=3)
    assert all(each.any() for each in (words, one, a))
    assert not words[6].any()  # a token that never came
    assert not b.any()  # its loss has weight 0
    again = weight_gradients(model, chosen, (x, y), batch_size=3)
    assert all(np.array_equal(p, q) for p, q in zip((words, one, a, b), again, strict=True))
    after = [keras.ops.convert_to_numpy(v) for v in variables]
    assert all(np.array_equal(p, q) for p, q in zip(before, after, strict=True))
    assert trained or not any(keras.ops.convert_to_numpy(v).any() for v in model.metrics_variables)
    model.fit(x, y, verbose=0)


def test_gradients_agree_with_differences():
    model = several_outputs()
    x, y = batch_for_several()
    kernel = model.get_layer("one").kernel
    (found,) = LossGradients(model, [kernel])(x, y)
    value = keras.ops.convert_to_numpy(kernel).copy()
    for index in ((0, 0), (3, 2)):
        losses = []
        for change in (1e-2, -1e-2):
            moved = value.copy()
            moved[index] += change
            kernel.assign(moved)
            losses.append(model.evaluate(x, y, verbose=0, return_dict=True)["loss"])
        assert found[index] == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2, abs=1e-4)


def test_weights_are_followed_when_they_change():
    model = linear()
    gradients = LossGradients(model, model.trainable_variables)
    gradients(X, Y)
    model.layers[0].kernel.assign([[2.0], [0.0]])
    assert gradients(X, Y)[0] == pytest.approx(2 / 3 * (X.T @ (2 * X[:, :1] - Y)), rel=1e-5)


def test_half_precision():
    model = linear(dtype="mixed_float16")
    (found,) = weight_gradients(model, model.trainable_variables, (X * 1e-4, Y * 1e-4))
    assert found == pytest.approx(2 / 3 * 1e-8 * (X.T @ np.array([[2], [7], [9]])), rel=1e-2)


def test_refused():
    model = linear()
    kernels = model.trainable_variables
    with pytest.raises(DataError, match="without labels"):
        weight_gradients(model, kernels, X)
    with pytest.raises(DataError, match="needs a 'train' split"):
        weight_gradients(model, kernels, as_data(None))
    with pytest.raises(PassError, match="a loss that can be computed"):
        weight_gradients(model, kernels, (X, np.ones((3, 7, 5))))
    with pytest.raises(PassError, match="NaN or infinity for"):
        weight_gradients(model, kernels, (X * np.nan, Y))
    with pytest.raises(UsageError, match="not compiled"):
        weight_gradients(keras.Sequential([keras.Input((2,)), layers.Dense(1)]), [], (X, Y))
