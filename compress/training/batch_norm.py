"""New moving statistics for batch normalisation, after its inputs have changed: exact ones over the samples, in place.

Nothing is trained. Pruning without training owes most of what it loses to statistics that no longer fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from compress.data.split import Split, as_data, flatten_arrays, map_arrays
from compress.models.fit_check import check_inputs
from compress.models.walking import find_all_layers

_MOMENTUM = 1 - 2.0**-10  # a power of two, so that dividing by it is exact
_MARK = 2.0**24  # far above any activation


def reestimate_batch_norm(model: keras.Model, data: Any, *, samples: int = 2048, batch_size: int = 128) -> int:
    """Set the moving statistics of batch normalisation to those of the samples; return how many layers.

    The mean and variance are those of all samples together, not averages over batches of the variance. As in
    training, each batch is normalised by its own statistics on its way through the net. Where a layer is used
    several times, all its uses count alike.

    Args:
        model: a built model, changed in place: only moving means and variances of `BatchNormalization` layers that
            are not frozen, wherever they are in it.
        data: `Data` with a train split, a `Split`, inputs `(samples, ...)`, `(x, y)` or a stream of batches.
        samples: how many to use: drawn at random with a fixed seed, or the first of a stream.
        batch_size: samples per forward pass.

    Raises:
        DataError: no data, or data that does not fit the model.
    """
    norms = [
        layer
        for layer in find_all_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built and layer.trainable
    ]
    if not norms:
        return 0
    split = data if isinstance(data, Split) else as_data(data).require("train", "re-estimating batch normalisation")
    if split.in_memory:
        chosen = np.random.default_rng(0).permutation(len(split))[:samples]
        x = map_arrays(lambda array: array[chosen], split.x)
    else:
        x, _ = split.head(samples)
    x, _ = check_inputs(model, x, split.name)
    # Equal batches: statistics of a small last one would be poor.
    count = len(flatten_arrays(x)[0])
    batch_size = math.ceil(count / max(1, round(count / batch_size)))
    with _lent_momentum(model, norms):
        _collect(model, norms, Split(split.name, x=x), batch_size)
    return len(norms)


@contextmanager
def _lent_momentum(model: keras.Model, norms: Sequence[keras.layers.BatchNormalization]) -> Iterator[None]:
    """Give the layers another momentum inside the block; afterwards all but their statistics is as it was."""
    statistics = {id(variable) for layer in norms for variable in (layer.moving_mean, layer.moving_variance)}
    others = [each for each in model.variables if id(each) not in statistics]
    trained = {id(each) for each in model.trainable_variables}
    before = [(each, keras.ops.copy(each)) for each in others if id(each) not in trained]
    momenta = [layer.momentum for layer in norms]
    try:
        for layer in norms:
            layer.momentum = _MOMENTUM
        yield
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
        for variable, value in before:  # random generators, ranges of fake quantization
            variable.assign(value)


def _collect(
    model: keras.Model, norms: Sequence[keras.layers.BatchNormalization], split: Split, batch_size: int
) -> None:
    """Run the batches, and give each layer the mean and variance over all of them."""
    before = [(_read(layer.moving_mean), _read(layer.moving_variance)) for layer in norms]
    try:
        uses = _count_uses(model, norms, next(split.batches(batch_size))[0])
        means, squares = ([np.zeros(mean.shape) for mean, _ in before] for _ in range(2))
        for batch, _ in split.batches(batch_size):
            size = len(flatten_arrays(batch)[0])
            for layer in norms:
                layer.moving_mean.assign(keras.ops.zeros(layer.moving_mean.shape))
                layer.moving_variance.assign(keras.ops.zeros(layer.moving_variance.shape))
            _forward(model, batch)
            for index, (layer, used) in enumerate(zip(norms, uses, strict=True)):
                share = 1 - _MOMENTUM ** max(1, used)
                mean, variance = _read(layer.moving_mean) / share, _read(layer.moving_variance) / share
                means[index] += mean * size / len(split)
                squares[index] += (variance + mean**2) * size / len(split)
        for index, used in enumerate(uses):
            if used:  # a layer that a pass leaves out keeps its statistics
                before[index] = (means[index], np.maximum(squares[index] - means[index] ** 2, 0))
    finally:
        for layer, (mean, variance) in zip(norms, before, strict=True):
            layer.moving_mean.assign(mean.astype(np.float32))
            layer.moving_variance.assign(variance.astype(np.float32))


def _count_uses(model: keras.Model, norms: Sequence[keras.layers.BatchNormalization], batch: Any) -> list[int]:
    """Return how often each layer is used in one pass: so often its momentum shrinks a great mark."""
    for layer in norms:
        layer.moving_mean.assign(keras.ops.full(layer.moving_mean.shape, _MARK))
    _forward(model, batch)
    shrunk = [float(np.median(_read(layer.moving_mean))) / _MARK for layer in norms]
    return [max(0, round(math.log(max(each, 1e-30)) / math.log(_MOMENTUM))) for each in shrunk]


def _forward(model: keras.Model, batch: Any) -> None:
    model(keras.tree.map_structure(keras.ops.convert_to_tensor, batch), training=True)


def _read(variable: keras.Variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype(np.float64)
