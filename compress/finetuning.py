"""Training a model further on its own task, in one place: options, optimizer, learning-rate schedule, labels
checked.

Imports nothing heavy, as its options are a part of passes; `fine_tune` imports Keras when it is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from compress.options import Options

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data


_SAMPLE = 256


class Training(Options):
    """How a model is trained: the options of `fine_tune`, and of every pass that trains."""

    epochs: Annotated[int, Field(ge=0, le=1_000_000)] = 5
    """How often the training samples are gone through; 0 means no training."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Samples per step; a stream keeps its own."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The rate at the start; by default what suits the optimizer: 0.001, or 0.05 for `sgd`."""
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    """How the rate goes on: down to zero along half a cosine (Loshchilov 2017, arXiv:1608.03983), or not."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """What updates the weights; `sgd` has a Nesterov momentum of 0.9."""

    def base_rate(self) -> float:
        """Return the learning rate at the start."""
        return self.learning_rate or {"adam": 1e-3, "adamw": 1e-3, "sgd": 5e-2}[self.optimizer]


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
    from compress.data.split import map_arrays
    from compress.models.fitting import (
        build_optimizer,
        compiled_for_training,
        fit_guarded,
        settle_batch_norm,
        steps_in_epoch,
    )
    from compress.models.task import check_inputs, check_labels, infer_task

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
