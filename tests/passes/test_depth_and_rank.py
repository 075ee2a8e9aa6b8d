"""The passes `prune_blocks` and `factorize`, and `prune_channels` to a target of a file: what they leave and record."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from pydantic import ValidationError

from compress.errors import UsageError
from compress.passes.factorize import Factorization
from compress.passes.prune_blocks import BlockPruning
from compress.passes.prune_channels import ChannelPruning
from compress.targets.files import FileCosts

X = np.random.default_rng(0).normal(size=(256, 8, 8, 3)).astype("float32")
Y = (X.mean(axis=(1, 2, 3)) > 0).astype("int64")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(32, 3, padding="same", name="first")(x)
    y = layers.ReLU()(layers.BatchNormalization(name="norm")(y))
    for name in ("one", "two"):
        y = layers.Add(name=f"sum_{name}")([y, layers.Conv2D(32, 3, padding="same", name=name)(y)])
    y = layers.Dense(2, activation="softmax", name="head")(layers.GlobalAveragePooling2D()(y))
    model = keras.Model(x, y)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(X, Y, epochs=3, verbose=0)
    return model


def accuracy(model):
    return float(model.evaluate(X, Y, verbose=0)[1])


def test_a_block_goes_and_the_rest_is_trained(model):
    cut = BlockPruning(count=1, epochs=2, teacher=model)
    result = cut(model, (X, Y))
    (dropped,) = cut.record()["dropped_blocks"]
    assert dropped["block"] in ("sum_one", "sum_two")
    assert dropped["layers"] == [dropped["block"].removeprefix("sum_")]
    assert dropped["change"] > 0
    assert cut.record()["left"]["parameters"] == pytest.approx(result.count_params() / model.count_params())
    assert accuracy(result) > accuracy(model) - 0.1
    with pytest.raises(UsageError, match="a count of 1 to 2"):
        BlockPruning(count=3).check(model)


def test_kernels_become_products_and_are_trained(model):
    cut = Factorization(target={"parameters": "60%"}, multiple_of=1, epochs=2)
    result = cut(model, (X, Y))
    record = cut.record()
    assert set(record["factorized_layers"]) <= {"first", "one", "two", "head"}
    assert record["target"]["measured"] == pytest.approx(0.6, rel=0.03)
    assert result.count_params() / model.count_params() == pytest.approx(0.6, rel=0.03)
    assert accuracy(result) > accuracy(model) - 0.1
    only = Factorization(energy="90%", epochs=0)
    assert only.needs_data() == ()
    assert only(model).count_params() < model.count_params()


def test_steps_to_a_measured_target_end_at_the_target(model, monkeypatch):
    """The clock counts parameters of the model whose files it measures."""
    monkeypatch.setattr(FileCosts, "__enter__", lambda files: files)
    monkeypatch.setattr(FileCosts, "share", lambda files, each: each.count_params() / files._original.count_params())
    cut = ChannelPruning(target={"latency": 0.3}, steps=2, multiple_of=1, epochs=0)
    result = cut(model)
    assert result.count_params() / model.count_params() == pytest.approx(0.3, rel=0.03)
    assert cut.record()["target"]["measured"] == pytest.approx(result.count_params() / model.count_params())
    assert cut.record()["target"]["predicted"] == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BlockPruning, {}),
        (BlockPruning, {"count": 1, "target": {"macs": 0.5}}),
        (BlockPruning, {"target": {"latency": 0.5}}),
        (Factorization, {}),
        (Factorization, {"energy": 0.5, "rank": 3}),
        (Factorization, {"energy": 1.5}),
        (Factorization, {"target": {"bytes": 0}}),
        (ChannelPruning, {"target": {"seconds": 0.5}}),
    ],
)
def test_options_that_make_no_sense(kind, options):
    with pytest.raises(ValidationError):
        kind(**options)
