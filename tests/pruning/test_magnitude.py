"""One-shot pruning of a copy."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import PassError, UsageError
from compress.pruning.magnitude import prune_weights


@pytest.fixture
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, name="one"),
            layers.BatchNormalization(),
            layers.Dense(3, name="two"),
        ]
    )


def zeros(model: keras.Model, name: str) -> int:
    return int(np.count_nonzero(model.get_layer(name).get_weights()[0] == 0))


def test_exact_and_on_a_copy(model):
    before = [value.copy() for value in model.get_weights()]
    pruned = prune_weights(model, 0.7)
    assert (zeros(pruned, "one"), zeros(pruned, "two")) == (
        14,
        10,
    )  # round(0.7 * 20), round(0.7 * 15): half to even
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    kept = pruned.get_layer("one").get_weights()[0]
    assert np.array_equal(kept[kept != 0], before[0][kept != 0])
    assert np.abs(before[0][kept == 0]).max() <= np.abs(kept[kept != 0]).min()


def test_selection_and_global(model):
    pruned = prune_weights(model, 0.5, exclude=["two"])
    assert (zeros(pruned, "one"), zeros(pruned, "two")) == (10, 0)
    pruned = prune_weights(model, 0.6, distribution="global")
    assert zeros(pruned, "one") + zeros(pruned, "two") == 21  # round(0.6 * 35)


def test_pruning_twice_keeps_zeros(model):
    once = prune_weights(model, 0.8)
    twice = prune_weights(once, 0.3)
    assert (zeros(twice, "one"), zeros(twice, "two")) == (16, 12)


def test_bfloat16():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="one", dtype="bfloat16")])
    assert zeros(prune_weights(model, 0.5), "one") == 10


def test_bad_input(model):
    with pytest.raises(UsageError, match="sparsity=1"):
        prune_weights(model, 1)
    with pytest.raises(UsageError, match="include: the pattern"):
        prune_weights(model, 0.5, include=["conv"])
    model.get_layer("two").set_weights([np.full((5, 3), np.nan), np.zeros(3)])
    with pytest.raises(PassError, match="NaN in two/kernel"):
        prune_weights(model, 0.5)
