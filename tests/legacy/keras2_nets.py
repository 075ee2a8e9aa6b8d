"""Nets of tf_keras for the tests; each call makes a new one."""

from __future__ import annotations

from typing import Any

import numpy as np


def residual(k: Any) -> Any:
    """Return a classifier with batch norm, a residual connection, a depthwise convolution and ReLU6."""
    layers = k.layers
    inputs = k.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, use_bias=False, padding="same", name="stem")(inputs)
    x = shortcut = layers.ReLU(6.0)(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="body")(x)
    x = layers.Add()([layers.BatchNormalization()(x), shortcut])
    x = layers.DepthwiseConv2D(3, use_bias=False, name="spatial")(layers.ReLU()(x))
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.Dense(16, activation="relu", name="hidden")(layers.GlobalAveragePooling2D()(x))
    return k.Model(inputs, layers.Dense(4, activation="softmax", name="head")(x), name="residual")


def plain(k: Any) -> Any:
    """Return a classifier without batch norm."""
    layers = k.layers
    inputs = k.Input((8, 8, 3), name="image")
    x = layers.MaxPooling2D()(layers.Conv2D(6, 3, activation="relu", name="conv")(inputs))
    x = layers.Dense(12, activation="relu", name="hidden")(layers.Flatten()(x))
    return k.Model(inputs, layers.Dense(4, activation="softmax", name="head")(x), name="plain")


def train(k: Any, model: Any, data: Any, *callbacks: Any, epochs: int = 2, rate: float = 3e-3) -> Any:
    """Train a net in a few steps; batch norm, masks, centroids and ranges move."""
    model.compile(k.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    model.fit(*data, batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return model


def answers(model: Any, x: np.ndarray) -> np.ndarray:
    """Return what a model of either Keras answers."""
    return np.asarray(model.predict(x, verbose=0))
