"""Channel pruning on every backend of Keras; run as backend_checks.py is. What it keeps is compared with TensorFlow's."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import compress

sys.path.insert(0, str(Path(__file__).parents[1] / "channels"))
from nets import NETS, randomise

NAMES = ("residual", "recurrent", "without_norm")


def kept_channels(name: str) -> dict[str, list[int]]:
    """Return what channel pruning keeps of a net whose weights are the same everywhere, by the order of the layers."""
    model = randomise(NETS[name]())
    random = np.random.default_rng(0)
    model.set_weights([random.normal(0, 0.3, w.shape) if w.ndim > 1 else w for w in model.get_weights()])
    pruned = compress.prune_channels(model, 0.5)
    assert pruned.difference < 1e-4
    return {str(index): kept for index, kept in enumerate(pruned.kept.values())}


@pytest.mark.parametrize("name", NAMES)
def test_the_law(name):
    Path(os.environ["BMCOMPRESS_SHARED"], f"kept-{name}.json").write_text(json.dumps(kept_channels(name)))


def test_blocks_and_kernels():
    model = randomise(NETS["residual"]())
    x = np.random.default_rng(0).normal(size=(8, *model.input_shape[1:])).astype("float32")
    assert len(compress.prune_blocks(model, 1, data=x).dropped) == 1
    assert compress.factorize(model, rank=0.3, multiple_of=1).difference < 1e-4


def test_group_sparse_training_lets_channels_die():
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(256, 4)).astype("float32")
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    callback = compress.GroupSparsity(strength=2.0, frequency=4)
    model.fit(x, (x[:, 0] > 0).astype("int64"), epochs=16, verbose=0, callbacks=[callback])
    (lengths,) = callback.lengths.values()
    dead = sum(length < 1e-6 for length in lengths)
    assert 4 <= dead < 16
    before = keras.ops.convert_to_numpy(model(x))
    narrow = compress.prune_channels(model, dead / 16, multiple_of=1).model
    np.testing.assert_allclose(keras.ops.convert_to_numpy(narrow(x)), before, atol=1e-5)
