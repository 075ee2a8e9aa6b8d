"""What importance learns from samples: gradients of the loss or of the outputs, and how strong channels are.

Every function gets the groups of a model, and speaks of its weights by their `id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from compress.channels.groups import ChannelGroups
from compress.channels.rebuild import duplicate
from compress.channels.rules import channel_axis
from compress.data.split import Split, as_data, flatten_arrays, map_arrays
from compress.models.copying import copy_compile_settings
from compress.models.gradients import LossGradients, weight_gradients

_SAMPLES, _BATCH = 512, 64


def loss_gradients(groups: ChannelGroups, model: keras.Model, data: Any) -> dict[int, list[np.ndarray]]:
    """Return the gradient of the compiled loss of `model` by `id` of each trainable weight.

    Raises:
        UsageError: the model is not compiled with a loss.
        DataError: no data, or no labels.
    """
    same, weights = _trainable(groups)
    copy_compile_settings(model, same)
    found = weight_gradients(same, [variable for _, variable in weights], data)
    return {key: [gradient] for (key, _), gradient in zip(weights, found, strict=True)}


def output_gradients(groups: ChannelGroups, data: Any, seed: int) -> dict[int, list[np.ndarray]]:
    """Return gradients of random sums of the outputs by `id` of each trainable weight, one for each batch.

    Each output of each sample is added with a random sign. The square of a direction's product with such a gradient is,
    on average, that of its product with the Jacobian: the Gauss-Newton part of the Hessian, which needs no labels.
    """
    same, weights = _trainable(groups)
    outputs = keras.tree.flatten(same.output)
    same.compile("sgd", loss=[_signed_sum] * len(outputs) if len(outputs) > 1 else _signed_sum)
    gradients = LossGradients(same, [variable for _, variable in weights])
    generator = np.random.default_rng(seed)
    found: dict[int, list[np.ndarray]] = {key: [] for key, _ in weights}
    for x in _batches(data):
        shapes = [np.shape(each) for each in keras.tree.flatten(same(x, training=False))]
        signs: Any = [generator.choice(np.float32([-1, 1]), shape) for shape in shapes]
        for (key, _), gradient in zip(weights, gradients(x, signs if len(signs) > 1 else signs[0]), strict=True):
            found[key].append(gradient)
    return found


def channel_activations(groups: ChannelGroups, data: Any) -> dict[int, np.ndarray]:
    """Return the mean absolute value of each channel that a layer reads, by `id` of the atoms of the weight."""
    places = {node.path: node for node in groups.graph.nodes}
    wanted, tensors = [], []
    for weight in groups.atoms.weights:
        node = places.get(weight.path)
        if weight.role != "reads" or node is None or not node.inputs:
            continue
        x = node.inputs[0]
        axis = channel_axis(node.operation, len(x.shape))
        if x.shape[axis] == len(weight.atoms):
            others = [each for each in range(1, len(x.shape)) if each != axis]
            size = keras.ops.abs(keras.ops.cast(x, "float32"))
            wanted.append(id(weight.atoms))
            tensors.append(keras.ops.mean(size, axis=others) if others else size)
    if not tensors:
        return {}
    model = keras.Model(groups.graph.inputs, tensors)
    sums = [np.zeros(tensor.shape[-1]) for tensor in tensors]
    seen = 0
    for x in _batches(data):
        found = [keras.ops.convert_to_numpy(each) for each in keras.tree.flatten(model(x, training=False))]
        sums = [total + own.sum(axis=0, dtype="float64") for total, own in zip(sums, found, strict=True)]
        seen += len(flatten_arrays(x)[0])
    return {key: total / seen for key, total in zip(wanted, sums, strict=True)}


def _trainable(groups: ChannelGroups) -> tuple[keras.Model, list[tuple[int, keras.Variable]]]:
    """Return a model that computes the same, and the `id` and copy of each weight that channels go through."""
    model, copies = duplicate(groups)
    trained = {id(variable) for variable in model.trainable_variables}
    known = dict.fromkeys(id(weight.variable) for weight in groups.atoms.weights)
    return model, [(key, copies[key]) for key in known if key in copies and id(copies[key]) in trained]


def _signed_sum(signs: Any, outputs: Any) -> Any:
    axes: Sequence[int] = range(1, len(outputs.shape))
    return keras.ops.sum(signs * keras.ops.cast(outputs, signs.dtype), axis=tuple(axes))


def _batches(data: Any) -> Any:
    split = data if isinstance(data, Split) else as_data(data).require("train", "scoring channels")
    seen = 0
    for batch, _ in split.batches(_BATCH):
        x = map_arrays(lambda array: array[: _SAMPLES - seen], batch)  # noqa: B023
        yield x
        seen += len(flatten_arrays(x)[0])
        if seen >= _SAMPLES:
            return
