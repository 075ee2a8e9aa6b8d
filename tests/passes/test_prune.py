"""The options of `prune` that combine the parts of pruning; what is refused before anything is trained."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from pydantic import ValidationError

from compress.errors import DataError, UsageError
from compress.passes.cluster import WeightClustering
from compress.passes.prune import MagnitudePruning

X = np.random.default_rng(0).normal(2, 3, (256, 8)).astype("float32")
Y = (X[:, 0] > X[:, 1]).astype("int64")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    x = keras.Input((8,))
    y = layers.BatchNormalization(name="norm")(layers.Dense(16, name="first")(x))
    y = layers.Dense(16, activation="relu", name="second")(layers.ReLU()(y))
    model = keras.Model(x, layers.Dense(2, activation="softmax", name="last")(y))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(X, Y, epochs=2, verbose=0)
    return model


def zeros(model, name: str) -> np.ndarray:
    return np.array(model.get_layer(name).kernel) == 0


def test_a_pattern_of_n_of_m_needs_no_sparsity(model):
    pruned = MagnitudePruning(pattern="2:4", epochs=0)(model)
    groups = zeros(pruned, "second").reshape(4, 4, 16).sum(axis=1)
    assert (groups == 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected a sparsity"),
        ({"pattern": "4x1"}, "expected a sparsity"),
        ({"sparsity": 0.5, "regrow": {}, "epochs": 0}, "epochs of training to regrow"),
        ({"sparsity": 0.5, "regrow": {"fraction": 2}}, "less than 1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValidationError, match=message):
        MagnitudePruning(**options)


def test_regrowth_keeps_the_sparsity_and_changes_which_weights_stay(model):
    options = {"sparsity": 0.5, "epochs": 2, "batch_size": 8, "schedule": {"type": "constant"}}
    fixed = MagnitudePruning(**options)(model, (X, Y))
    moved = MagnitudePruning(**options, regrow={"fraction": 0.5})(model, (X, Y))
    assert zeros(fixed, "second").sum() == zeros(moved, "second").sum() == 128
    assert (zeros(fixed, "second") != zeros(moved, "second")).any()


def test_batch_norm_fits_the_pruned_model(model):
    options = {"sparsity": 0.8, "epochs": 0}
    with pytest.raises(DataError, match="train"):
        MagnitudePruning(**options, reestimate_batch_norm=True)(model)
    before = MagnitudePruning(**options)(model)
    after = MagnitudePruning(**options, reestimate_batch_norm=True)(model, (X, Y))
    np.testing.assert_array_equal(before.get_layer("first").kernel, after.get_layer("first").kernel)
    inputs = X @ np.array(after.get_layer("first").kernel) + np.array(after.get_layer("first").bias)
    np.testing.assert_allclose(after.get_layer("norm").moving_mean, inputs.mean(axis=0), rtol=1e-3, atol=1e-3)
    assert np.abs(np.array(before.get_layer("norm").moving_mean) - inputs.mean(axis=0)).max() > 0.1


def test_data_are_asked_for_where_a_choice_reads_them():
    assert MagnitudePruning(sparsity=0.5, epochs=0).needs_data() == ()
    for options in ({"score": "taylor"}, {"distribution": "sensitivity"}, {"reestimate_batch_norm": True}):
        assert MagnitudePruning(sparsity=0.5, epochs=0, **options).needs_data() == ("train",)


def test_sensitive_layers_keep_more(model):
    pruned = MagnitudePruning(sparsity=0.6, epochs=0, distribution="sensitivity")(model, (X, Y))
    counts = [int(zeros(pruned, name).sum()) for name in ("first", "second", "last")]
    assert sum(counts) == pytest.approx(0.6 * (128 + 256 + 32), abs=2)
    assert counts != [77, 154, 19]


def test_the_profile_wants_many_zeros_and_layers_that_qualify(model):
    with pytest.raises(UsageError, match="two thirds"):
        MagnitudePruning(sparsity=0.5, profile="xnnpack").check(small_mobilenet())
    with pytest.raises(UsageError, match="first: is a Dense"):
        MagnitudePruning(sparsity=0.8, profile="xnnpack").check(model)


def test_the_profile_prunes_only_what_qualifies():
    pruned = MagnitudePruning(sparsity=0.75, profile="xnnpack", epochs=0)(small_mobilenet())
    assert zeros(pruned, "pointwise").mean() == 0.75
    assert not zeros(pruned, "stem").any()
    with pytest.raises(UsageError, match="stem: is a convolution of 3x3"):
        MagnitudePruning(sparsity=0.75, profile="xnnpack", include=("stem",)).check(small_mobilenet())


def small_mobilenet() -> keras.Model:
    x = keras.Input((16, 16, 3))
    y = layers.ZeroPadding2D(1)(x)
    y = layers.Conv2D(8, 3, strides=2, activation="relu", name="stem")(y)
    y = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(y)
    y = layers.Conv2D(16, 1, activation="relu", name="pointwise")(y)
    y = layers.GlobalAveragePooling2D()(y)
    return keras.Model(x, layers.Dense(4, name="head")(y))


def test_what_zeros_and_clusters_do_not_do_is_said_beforehand():
    (sentence,) = MagnitudePruning(pattern="2:4").expectations()
    assert "2:4" in sentence
    assert "neither LiteRT nor ONNX Runtime runs faster" in sentence
    (sentence,) = MagnitudePruning(sparsity=0.8, profile="xnnpack").expectations()
    assert "not on x86" in sentence
    assert "runs faster" in WeightClustering(clusters=16).expectations()[0]
