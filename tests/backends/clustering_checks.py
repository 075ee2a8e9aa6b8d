"""What clustering promises on every backend of Keras; run as backend_checks.py is."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import compress
from compress.models.clusters import count_values

X = np.random.default_rng(0).standard_normal((64, 12)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 64)


def build(optimizer=None, **settings):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(10, activation="relu", name="first"),
            keras.layers.Dense(3, name="last"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(0.02), loss, **settings)
    return model


def kernels(model):
    return [keras.ops.convert_to_numpy(each) for each in model.trainable_variables if len(each.shape) > 1]


@pytest.mark.parametrize("options", [{}, {"granularity": "per_channel"}, {"reassign_every": 1}, {"reassign_every": 0}])
def test_fit_leaves_few_values_and_learns(options):
    model = build()
    axes = (-1,) if "granularity" in options else ()
    losses = model.fit(X, Y, batch_size=16, epochs=6, verbose=0, callbacks=[compress.Clustering(4, **options)]).history[
        "loss"
    ]
    assert [count_values(kernel, axes) for kernel in kernels(model)] == [4, 4]
    assert losses[-1] < losses[0]
    assert all(variable.constraint is None for variable in model.trainable_variables)


def test_zeros_and_earlier_clusters_stay():
    model = build()
    model.fit(X, Y, verbose=0, callbacks=[compress.Pruning(0.5, schedule=compress.ConstantSchedule())])
    zeros = [kernel == 0 for kernel in kernels(model)]
    for callback in (compress.Clustering(5), compress.Clustering(None)):
        model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[callback])
        for kernel, zero in zip(kernels(model), zeros, strict=True):
            assert (kernel[zero] == 0).all()
            assert count_values(kernel) <= 5


def test_members_change_their_cluster():
    """Each step reassigns: on JAX this must not need the step to be compiled anew."""
    model = build()
    start = compress.cluster_weights(model, 4)
    model.fit(X, Y, batch_size=16, epochs=8, verbose=0, callbacks=[compress.Clustering(4, reassign_every=1)])
    before, after = kernels(start)[0], kernels(model)[0]
    groups = [np.unique(values, return_inverse=True)[1] for values in (before, after)]
    assert 0 < np.mean(groups[0] != groups[1]) < 0.9


def test_a_checkpoint_in_mid_training_is_plain(tmp_path):
    model = build()
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[compress.Clustering(4), checkpoint])
    assert [count_values(kernel) for kernel in kernels(keras.saving.load_model(tmp_path / "1.keras"))] == [4, 4]
