"""The law on graphs that nobody drew: random sums, products, joins and shared layers.

`BMCOMPRESS_EXAMPLES` says how many are drawn.
"""

from __future__ import annotations

import os

import keras
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers as L
from nets import randomise

from compress.channels.groups import find_channel_groups
from compress.channels.pruning import prune_channels

STEPS = ("conv", "depthwise", "norm", "relu", "add", "multiply", "concat", "gate", "shared", "prelu", "operator")


def build(steps: list[tuple[str, int]]) -> keras.Model:
    """Return a net of 8x8 images in which each step reads one or two of the tensors before it."""
    x = keras.Input((8, 8, 3))
    tensors = [L.Conv2D(8, 3, padding="same")(x)]
    shared: dict[int, L.Layer] = {}
    for kind, choice in steps:
        y = tensors[choice % len(tensors)]
        other = tensors[(choice // 7) % len(tensors)]
        width = y.shape[-1]
        if kind == "conv":
            y = L.Conv2D(4 + choice % 9, 1 + 2 * (choice % 2), padding="same", activation="relu")(y)
        elif kind == "depthwise":
            y = L.DepthwiseConv2D(3, padding="same", depth_multiplier=1 + choice % 2)(y)
        elif kind == "norm":
            y = L.BatchNormalization()(y)
        elif kind == "relu":
            y = L.ReLU()(y)
        elif kind == "prelu":
            y = L.PReLU(shared_axes=[1, 2])(y)
        elif kind == "concat":
            y = L.Concatenate()([y, other]) if width + other.shape[-1] <= 48 else y
        elif kind == "shared":
            y = shared.setdefault(width, L.Conv2D(width, 1))(y)
        elif kind == "operator":
            y = 0.5 * y + 1.0
        elif kind == "gate":
            gate = L.Dense(width, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(y))
            y = L.Multiply()([y, gate])
        else:
            if other.shape[-1] != width:
                other = L.Conv2D(width, 1)(other)
            y = (L.Add() if kind == "add" else L.Multiply())([y, other])
        tensors.append(y)
    pooled = [L.GlobalAveragePooling2D()(each) for each in tensors[-2:]]
    return keras.Model(x, L.Dense(3)(L.Concatenate()(pooled)))


@settings(max_examples=int(os.environ.get("BMCOMPRESS_EXAMPLES", "200")), deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1000)), min_size=3, max_size=10), st.integers(0, 2**16)
)
def test_the_law(steps, seed):
    keras.utils.set_random_seed(seed)
    model = randomise(build(steps), seed)
    if not find_channel_groups(model).groups:
        return
    pruned = prune_channels(model, 0.5, importance="random", multiple_of=1, seed=seed)
    assert pruned.difference < 1e-4
    x = np.random.default_rng(seed).normal(size=(2, 8, 8, 3)).astype("float32")
    assert np.abs(np.asarray(pruned.model(x)) - np.asarray(model(x))).max() > 0  # the check compared with another model
