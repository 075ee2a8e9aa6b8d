"""Re-estimated batch normalisation: exact statistics, and nothing else changed."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import DataError
from compress.training.batch_norm import reestimate_batch_norm

X = (np.random.default_rng(0).standard_normal((100, 4)) * [1, 2, 3, 4] + [0, 1, 5, -9]).astype(np.float32)


def test_mean_and_variance_are_those_of_all_samples():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(momentum=0.9), layers.Dense(2)])
    model.layers[1].trainable = True
    dense = [weight.copy() for weight in model.layers[1].get_weights()]
    assert reestimate_batch_norm(model, X, batch_size=30) == 1  # batches of 34, 34 and 32
    gamma, beta, mean, variance = model.layers[0].get_weights()
    assert np.allclose(mean, X.mean(0), rtol=1e-5, atol=1e-5)
    assert np.allclose(variance, X.var(0), rtol=1e-4)
    assert gamma.tolist() == [1] * 4 and beta.tolist() == [0] * 4
    assert model.layers[0].momentum == 0.9
    assert all(np.array_equal(a, b) for a, b in zip(dense, model.layers[1].get_weights(), strict=True))


def test_nested_shared_and_frozen_layers():
    shared = layers.BatchNormalization(name="shared")
    inner = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="inside")], name="inner")
    inputs = keras.Input((4,))
    frozen = layers.BatchNormalization(name="frozen", trainable=False)
    outputs = layers.Add()([shared(inputs), shared(layers.Rescaling(1.0, offset=10.0)(inputs)), frozen(inner(inputs))])
    model = keras.Model(inputs, outputs)
    frozen_before = frozen.get_weights()
    assert reestimate_batch_norm(model, (X, np.zeros(100)), batch_size=50) == 2
    both = np.concatenate([X, X + 10])
    assert np.allclose(shared.moving_mean, both.mean(0), rtol=1e-2)  # the two uses count alike, to a thousandth
    assert np.allclose(shared.moving_variance, X.var(0), rtol=2e-2)
    assert np.allclose(inner.layers[0].moving_mean, X.mean(0), rtol=1e-5, atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(frozen_before, frozen.get_weights(), strict=True))


def test_nothing_to_do_and_what_stays():
    assert reestimate_batch_norm(keras.Sequential([keras.Input((4,)), layers.Dense(2)]), None) == 0
    model = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5, seed=1), layers.BatchNormalization()])
    state = [np.array(variable) for variable in model.layers[0].variables]
    reestimate_batch_norm(model, X)
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(state, model.layers[0].variables, strict=True))
    with pytest.raises(DataError):
        reestimate_batch_norm(model, None)


def test_a_pass_that_fails_leaves_the_statistics():
    class Fails(layers.Layer):
        def call(self, x, training=None):
            if training:
                raise RuntimeError("no training")
            return x

    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), Fails()])
    before = model.get_weights()
    with pytest.raises(RuntimeError, match="no training"):
        reestimate_batch_norm(model, X)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert model.layers[0].momentum == 0.99
