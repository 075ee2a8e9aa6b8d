"""Clustering inside `fit`: every weight stays on one of few values, whatever trains it."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import compress
from compress.clustering.callback import Clustering
from compress.clustering.constraint import ClusterConstraint
from compress.errors import UsageError
from compress.models.clusters import Clusters, count_values
from compress.training.weight_constraints import HeldWeights, find_constraint

RNG = np.random.default_rng(0)
X = RNG.standard_normal((96, 8, 8, 1)).astype("float32")
Y = RNG.integers(0, 4, 96)


def build(optimizer=None, sparse=False, **settings):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu", name="conv"),
            keras.layers.DepthwiseConv2D(3, name="depthwise"),
            keras.layers.Flatten(),
            keras.layers.Dense(4, name="head"),
        ]
    )
    if sparse:
        for kernel in kernels(model):
            values = np.array(kernel)
            kernel.assign(np.where(np.abs(values) < np.quantile(np.abs(values), 0.5), 0, values))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(0.01), loss, **settings)
    return model


def kernels(model):
    return [variable for variable in model.trainable_variables if len(variable.shape) > 1]


def distinct(model, axes=()):
    return [count_values(np.asarray(kernel), axes) for kernel in kernels(model)]


class Watch(keras.callbacks.Callback):
    """Notes the most distinct values that any kernel had after any step."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def on_train_batch_end(self, batch, logs=None):
        self.most = max(self.most, *distinct(self.model))


def test_a_step_by_hand():
    """Two clusters: latent weights, centroids that move by their members' updates, a member that changes sides."""
    variable = keras.Variable(np.array([[0.0, 0.0], [1.0, 1.0]], "float32"), name="kernel")
    clusters = Clusters(np.array([[0.0, 1.0]], "float32"), np.array([[0, 0], [1, 1]]))
    held = HeldWeights(keras.Sequential())
    constraint = ClusterConstraint(
        held, variable, clusters, np.array([[-0.2, 0.2], [0.9, 1.1]]), keep_zeros=False, reassign_every=2
    )

    def step(update):
        after = constraint.project(keras.ops.convert_to_tensor(variable) + np.array(update, "float32"))
        variable.assign(after)
        return np.asarray(after)

    two, three = 2**0.75, 3**0.75
    # latent: -0.1, 0.4, 0.9, 1.1
    first = 0.3 / two
    np.testing.assert_allclose(step([[0.1, 0.2], [0, 0]]), [[first, first], [1.0, 1.0]], atol=1e-6)
    # latent: -0.1, 0.8, 0.9, 1.1; 0.8 is nearer to the second now
    first += 0.4 / two
    np.testing.assert_allclose(step([[0, 0.4], [0, 0]]), [[first, 1.0], [1.0, 1.0]], atol=1e-6)
    # the centroids follow their new members
    second = 1 + 0.3 / three
    np.testing.assert_allclose(step([[0, 0.3], [0, 0]]), [[first, second], [second, second]], atol=1e-6)


def test_zero_stays_and_pruned_weights_too():
    variable = keras.Variable(np.array([[-1.0, 0.0, 0.0, 2.0]], "float32"), name="kernel")
    clusters = Clusters(np.array([[-1.0, 0.0, 2.0]], "float32"), np.array([[0, 1, 1, 2]]))
    constraint = ClusterConstraint(
        HeldWeights(keras.Sequential()), variable, clusters, np.array(variable), keep_zeros=True, reassign_every=1
    )
    after = np.asarray(constraint.project(keras.ops.convert_to_tensor([[-0.5, 5.0, -5.0, 2.5]], "float32")))
    np.testing.assert_array_equal(after, [[-0.5, 0.0, 0.0, 2.5]])


@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 7)])
@pytest.mark.parametrize("axes", [(), (-1,), (0, -1)])
def test_members_are_nearest_after_a_reassignment(shape, axes):
    """The binary search of the compiled step against NumPy, for widths that are no power of two."""
    from compress.clustering.clustered_weights import cluster_array, nearest
    from compress.models.clusters import from_rows, to_rows

    random = np.random.default_rng(1)
    for width in (2, 3, 5, 9):
        values = random.normal(size=shape).astype("float32")
        clusters = cluster_array(values, width, "linear", axes=axes)
        variable = keras.Variable(clusters.values(), name="kernel")
        constraint = ClusterConstraint(
            HeldWeights(keras.Sequential()), variable, clusters, values, keep_zeros=False, reassign_every=1
        )
        update = random.normal(size=shape).astype("float32") / 4
        after = np.asarray(constraint.project(keras.ops.convert_to_tensor(variable) + update))
        centroids = np.asarray(constraint.centroids).reshape(clusters.centroids.shape)
        rows = to_rows(values + update, axes)
        expected = np.take_along_axis(centroids, nearest(rows, centroids), axis=1)
        np.testing.assert_allclose(after, from_rows(expected, axes, shape), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({}, ()),
        ({"reassign_every": 1, "initialisation": "linear"}, ()),
        ({"reassign_every": 0, "initialisation": "density"}, ()),
        ({"granularity": "per_channel"}, (-1,)),
    ],
)
def test_every_kernel_ends_with_few_values_and_learns(options, axes):
    model = build()
    losses = model.fit(X, Y, epochs=6, verbose=0, callbacks=[Clustering(5, **options)]).history["loss"]
    assert max(distinct(model, axes)) == 5
    assert losses[-1] < losses[0]
    assert all(variable.constraint is None for variable in model.trainable_variables)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (lambda: keras.optimizers.SGD(0.05, momentum=0.9), {"jit_compile": True}),
        (lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1), {"steps_per_execution": 3}),
        (lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9), {}),
        (lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2), {}),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)), {}),
        (lambda: keras.optimizers.Adam(0.01), {"run_eagerly": True}),
    ],
    ids=["jit", "steps-per-execution", "ema", "accumulation", "loss-scale", "eager"],
)
def test_optimizers_and_ways_to_compile(optimizer, settings):
    model, watch = build(optimizer(), sparse=True, **settings), Watch()
    zeros = [np.asarray(kernel) == 0 for kernel in kernels(model)]
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[Clustering(6, reassign_every=2), watch])
    assert watch.most <= 6
    assert max(distinct(model)) <= 6
    assert all((np.asarray(k)[zero] == 0).all() for k, zero in zip(kernels(model), zeros, strict=True))


def test_checkpoints_in_the_middle_are_plain_and_clustered(tmp_path):
    model = build()
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"), save_freq=2)
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[checkpoint, Clustering(4)])
    loaded = keras.saving.load_model(tmp_path / "1.keras")
    assert max(distinct(loaded)) == 4
    loaded.fit(X, Y, epochs=1, verbose=0)
    assert max(distinct(loaded)) > 4


def test_a_later_plain_training_is_free():
    model = build()
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[Clustering(4)])
    model.fit(X, Y, epochs=1, verbose=0)
    assert max(distinct(model)) > 4


def test_weights_that_another_callback_replaced_are_clustered_again():
    class Shake(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            for kernel in kernels(self.model):
                kernel.assign(np.asarray(kernel) + np.random.default_rng(epoch).normal(0, 0.01, kernel.shape))

    model = build(sparse=True)
    zeros = np.asarray(model.get_layer("head").kernel) == 0
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[Shake(), Clustering(4)])
    assert max(distinct(model)) <= 4
    assert (np.asarray(model.get_layer("head").kernel)[zeros] == 0).all()


def test_clusters_of_an_earlier_pass_are_kept():
    model = compress.cluster_weights(build(sparse=True), 6, include=["head", "conv"])
    before = [np.array(kernel) for kernel in kernels(model)]
    callback = Clustering(None)
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[callback])
    assert [kernel.layer_path for kernel in callback.kernels] == ["conv", "head"]
    assert [each.reason for each in callback.skipped if each.path.startswith("depthwise")] == ["not clustered"]
    conv, depthwise, head = (np.asarray(kernel) for kernel in kernels(model))
    assert max(count_values(conv), count_values(head)) <= 6
    assert (head[before[2] == 0] == 0).all()
    assert not np.array_equal(head, before[2])
    assert count_values(depthwise) > 6


def test_pruning_and_clustering_at_once():
    """Masks inside, clusters outside: the final sparsity and the number of values both hold."""
    model = build()
    callbacks = [compress.Pruning(0.6, schedule=compress.PolynomialSchedule(frequency=1)), Clustering(5)]
    model.fit(X, Y, epochs=4, batch_size=16, verbose=0, callbacks=callbacks)
    for kernel in kernels(model):
        values = np.asarray(kernel)
        assert np.count_nonzero(values == 0) >= round(0.6 * values.size)
        assert count_values(values) <= 5


def test_bfloat16_weights():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(4, dtype="bfloat16")])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[Clustering(4)])
    assert count_values(np.asarray(model.layers[-1].kernel).astype("float32")) <= 4


def test_two_callbacks_share_the_kernels_or_are_refused():
    model = build()
    apart = [Clustering(3, include=["conv"]), Clustering(6, include=["head"])]
    model.fit(X, Y, epochs=1, verbose=0, callbacks=apart)
    assert [distinct(model)[0], distinct(model)[2]] == [3, 6]
    with pytest.raises(UsageError, match="conv/kernel is clustered by two"):
        model.fit(X, Y, epochs=1, verbose=0, callbacks=[Clustering(3), Clustering(6, include=["conv"])])
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[Clustering(3)])  # what the failure left is gone
    assert find_constraint(kernels(model)[0], ClusterConstraint) is None
    assert max(distinct(model)) == 3


@pytest.mark.parametrize("options", [{"clusters": 1}, {"clusters": 4, "reassign_every": -1}])
def test_refuses_bad_options(options):
    with pytest.raises(UsageError, match="Received"):
        Clustering(**options)


def test_the_pass_holds_zeros_and_clusters_of_the_layers_that_it_leaves_alone(blobs, cnn_factory):
    model = compress.cluster_weights(compress.prune_weights(cnn_factory(), 0.5), 5, include=["head"])
    zeros = np.asarray(model.get_layer("head").kernel) == 0
    result = compress.WeightClustering(clusters=4, epochs=1, include=["conv"])(model, blobs[0])
    conv, head = (np.asarray(result.get_layer(name).kernel) for name in ("conv", "head"))
    assert count_values(conv) == 4
    assert count_values(head) == 5
    assert (head[zeros] == 0).all()
    assert np.count_nonzero(conv == 0) >= conv.size // 2


def test_with_a_teacher(blobs, cnn_factory):
    model = cnn_factory()
    result = compress.WeightClustering(clusters=4, epochs=1, teacher="input", include=["conv"])(model, blobs[0])
    assert count_values(np.asarray(result.get_layer("conv").kernel)) == 4
    assert count_values(np.asarray(result.get_layer("head").kernel)) > 4
