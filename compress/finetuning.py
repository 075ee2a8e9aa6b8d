"""Training a model further on its own task: labels are checked, and the loss is the compiled model's or inferred."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from compress.data.split import Data, map_arrays
from compress.models.task import check_inputs, check_labels, infer_task
from compress.training.fitting import (
    build_optimizer,
    compiled_for_training,
    fit_guarded,
    settle_batch_norm,
    steps_in_epoch,
)
from compress.training.options import Training

_SAMPLE = 256


def fine_tune(
    model: keras.Model, data: Data, training: Training, *, callbacks: Iterable[keras.callbacks.Callback] = ()
) -> dict[str, list[float]]:
    """Train `model` in place on the train split, and return the loss and metrics of each epoch.

    Loss, metrics and label form are the compiled model's; where it has none they are inferred from its head
    and the labels. The model ends with a fresh optimizer, and batch normalisation is recalibrated after
    short trainings. After `keras.utils.set_random_seed` the result is the same each time on CPU.

    Args:
        model: a Keras model; copy it first if the original matters.
        data: needs a train split with labels.
        training: how to train.
        callbacks: further Keras callbacks.

    Raises:
        DataError: no train split, no labels, or data that do not fit the model.
        PassError: the loss became NaN or infinite (the last good weights are back in the model; `epoch`,
            `step` and `learning_rate` are attributes of the error), or reading a stream failed.
    """

    split = data.require("train", "fine-tuning")
    x_sample, y = split.all() if split.in_memory else split.head(_SAMPLE)
    x, notes = check_inputs(model, x_sample, split.name)
    task = infer_task(model, y, map_arrays(lambda array: array[:8], x))
    check_labels(task, y, split.name)
    if training.epochs == 0:
        return {}
    steps = steps_in_epoch(split, training.batch_size)
    arguments: dict[str, Any] = {"x": x, "y": y, "batch_size": training.batch_size}
    if not split.in_memory:
        arguments = {"x": split}
    if not split.in_memory and notes:  # batches lack the channel axis too
        arguments = {"x": lambda: ((check_inputs(model, x)[0], y) for x, y in split.batches())}
    optimizer = build_optimizer(training, steps * training.epochs, model)
    with compiled_for_training(model, task, optimizer):
        history = fit_guarded(model, arguments, training, steps, callbacks=callbacks, description="fine-tune")
    settle_batch_norm(model, split, steps * training.epochs)
    return history
