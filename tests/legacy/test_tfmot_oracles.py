"""tfmot and TensorFlow as oracles: the same weights, schedule and step give the same masks, grids and centroids."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import compress
from compress.clustering.centroids import place_linear
from compress.errors import UsageError
from compress.pruning.masks import make_masks
from compress.pruning.tfmot_schedules import adopt_schedule
from compress.quantization.arithmetic import fake_quantize_activation, fake_quantize_weight


def tfmot_mask(tfmot, weight: np.ndarray, schedule, step: int, **options) -> np.ndarray:
    """Return the mask that tfmot makes of `weight` at a training step."""
    from tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl import Pruning

    variables = [tf.Variable(weight), tf.Variable(np.ones_like(weight)), tf.Variable(0.0)]
    defaults = {"block_size": (1, 1), "block_pooling_type": "AVG"}
    pruning = Pruning(
        training_step_fn=lambda: tf.constant(step, tf.int64),
        pruning_vars=[tuple(variables)],
        pruning_schedule=schedule,
        **(defaults | options),
    )
    if options:  # N:M masks are made once only, in a way of their own
        return pruning._maybe_update_block_mask(variables[0])[1].numpy() != 0
    pruning.conditional_mask_update()
    return variables[1].numpy() != 0


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (17, 9), (5, 3, 8)])
@pytest.mark.parametrize("step", [10, 20, 30, 50, 90])
def test_masks_at_the_same_step(tfmot, shape, step):
    weight = np.random.default_rng(step).standard_normal(shape).astype("float32")
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.1, 0.8, 10, 90, frequency=10)
    ours = adopt_schedule(schedule).in_training(100)
    sparsity = ours.sparsity_at(step / 100, 0.8)
    due, theirs = schedule(tf.constant(step, tf.int64))
    assert bool(due) and sparsity == pytest.approx(float(theirs), abs=1e-6)
    (mask,) = make_masks([weight], sparsity, paths=["kernel"])
    np.testing.assert_array_equal(mask, tfmot_mask(tfmot, weight, schedule, step))


def test_ties_are_the_documented_difference(tfmot):
    """tfmot keeps every weight as large as its threshold, and so too many; our sparsity is exact."""
    weight = np.repeat(np.arange(1, 5, dtype="float32"), 5).reshape(4, 5)
    schedule = tfmot.sparsity.keras.ConstantSparsity(0.6, 0, -1, 1)
    (mask,) = make_masks([weight], 0.6, paths=["kernel"])
    theirs = tfmot_mask(tfmot, weight, schedule, 0)
    assert (~mask).sum() == 12 and (~theirs).sum() == 10
    assert (mask <= theirs).all()


@pytest.mark.parametrize("shape", [(8, 6), (3, 3, 8, 4)])
def test_two_of_four(tfmot, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype("float32")
    model = keras.Sequential([keras.Input((8,) if len(shape) == 2 else (8, 8, 8)), layer_for(shape)])
    model.layers[0].set_weights([weight])
    pruned = keras.ops.convert_to_numpy(compress.prune_weights(model, pattern="2:4").layers[0].kernel)
    schedule = tfmot.sparsity.keras.ConstantSparsity(0.5, 0, -1, 1)
    np.testing.assert_array_equal(pruned != 0, tfmot_mask(tfmot, weight, schedule, 0, sparsity_m_by_n=(2, 4)))


def layer_for(shape):
    if len(shape) == 2:
        return keras.layers.Dense(shape[-1], use_bias=False)
    return keras.layers.Conv2D(shape[-1], 3, use_bias=False)


def test_depthwise_kernels_are_the_documented_difference(tfmot, k2):
    """tfmot leaves them as they are without a word; ours prunes them."""
    api = tfmot.sparsity.keras
    layer = k2.layers.DepthwiseConv2D(3, input_shape=(8, 8, 4))
    wrapped = api.prune_low_magnitude(k2.Sequential([layer]), api.ConstantSparsity(0.5, 0))
    assert not any("mask" in weight.name for weight in wrapped.weights)
    model = keras.Sequential([keras.Input((8, 8, 4)), keras.layers.DepthwiseConv2D(3)])
    kernel = keras.ops.convert_to_numpy(compress.prune_weights(model, 0.5).layers[0].kernel)
    assert (kernel == 0).mean() == 0.5


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 2.0), (0.0, 6.0), (-3.0, 0.0), (-0.013, 5.7), (0.5, 2.0), (-2.0, -1.0)]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_per_tensor_fake_quantization(low, high, bits):
    x = np.random.default_rng(0).uniform(-7, 7, 4096).astype("float32")
    ours = keras.ops.convert_to_numpy(fake_quantize_activation(x, np.float32(low), np.float32(high), bits, False))
    # Ours always includes zero in the range, as files need it; TensorFlow's operator asks the caller to.
    theirs = tf.quantization.fake_quant_with_min_max_args(x, min(low, 0.0), max(high, 0.0), bits).numpy()
    step = (max(high, 0.0) - min(low, 0.0)) / (2**bits - 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * step + 1e-6, err_msg="beyond ties")


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (16, 5)])
def test_per_channel_fake_quantization(shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype("float32")
    ours = keras.ops.convert_to_numpy(fake_quantize_weight(weight, (len(shape) - 1,), 8, None, None))
    ends = np.abs(weight).max(axis=tuple(range(len(shape) - 1)))
    theirs = tf.quantization.fake_quant_with_min_max_vars_per_channel(weight, -ends, ends, 8, narrow_range=True)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5)  # our scales have few bits, so that products are exact
    np.testing.assert_array_equal(np.round(ours / (ends / 127)), np.round(theirs.numpy() / (ends / 127)))


@pytest.mark.parametrize("clusters", [4, 16, 32])
def test_centroids_after_linear_initialisation(tfmot, clusters):
    from tensorflow_model_optimization.python.core.clustering.keras import clustering_centroids

    weight = np.random.default_rng(1).standard_normal((3, 3, 4, 8)).astype("float32")
    theirs = clustering_centroids.LinearCentroidsInitialisation(tf.constant(weight), clusters)
    np.testing.assert_allclose(
        place_linear(np.sort(weight.reshape(-1)), clusters), theirs.get_cluster_centroids().numpy(), atol=1e-6
    )


def test_schedule_objects_are_taken(tfmot):
    api = tfmot.sparsity.keras
    decay = api.PolynomialDecay(0.2, 0.75, 5, 45, frequency=5)
    x, y = np.random.default_rng(0).standard_normal((64, 8)).astype("float32"), np.zeros((64, 1), "float32")

    def model():
        made = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(1)])
        made.compile("sgd", "mse")
        return made

    def sparsity(trained):
        return float((keras.ops.convert_to_numpy(trained.layers[0].kernel) == 0).mean())

    for schedule in (decay, api.ConstantSparsity(0.75, 5)):
        trained = model()
        trained.fit(x, y, batch_size=8, epochs=8, verbose=0, callbacks=[compress.Pruning(schedule=schedule)])
        assert sparsity(trained) == 0.75
    pruner = compress.Pruner(trained := model(), schedule=decay, steps=50)
    for _ in range(50):
        trained.train_on_batch(x[:8], y[:8])
        pruner.step()
    pruner.finish()
    assert sparsity(trained) == 0.75
    made = compress.MagnitudePruning(schedule=decay, epochs=8, batch_size=8)
    assert made.sparsity == 0.75 and compress.MagnitudePruning.model_validate(made.model_dump()) == made
    assert sparsity(made(model(), (x, y))) == 0.75
    with pytest.raises(UsageError, match="50 steps|16 steps"):
        model().fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[compress.Pruning(schedule=decay)])
    with pytest.raises(UsageError, match="one final sparsity"):
        compress.Pruning(0.5, schedule=decay)

    class Own(api.ConstantSparsity):
        pass

    Own.__module__ = api.ConstantSparsity.__module__
    with pytest.raises(UsageError, match="Own"):
        compress.Pruning(schedule=Own(0.5, 0))
