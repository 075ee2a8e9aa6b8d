"""The training loop that every technique shares: `fit` with progress, stopped at once when the loss is lost.

The last good weights are put back before the error is raised, so that the caller still holds a working model.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from compress.data.split import Split
from compress.errors import BmcompressError, DataError, PassError
from compress.models.task import Task
from compress.models.walking import find_all_layers, find_layers
from compress.progress import track
from compress.training.batch_norm import reestimate_batch_norm

if TYPE_CHECKING:
    from compress.training.options import Training

_REFRESH_S = 0.1
_SETTLED_WINDOWS = 10
_INFINITE = -1  # tf.data.INFINITE_CARDINALITY


_observers: ContextVar[tuple[keras.callbacks.Callback, ...]] = ContextVar("training_observers", default=())


@contextmanager
def observed_by(*callbacks: keras.callbacks.Callback) -> Iterator[None]:
    """Have every training inside the block call `callbacks` too, after all others, such as those that log it."""
    token = _observers.set((*_observers.get(), *callbacks))
    try:
        yield
    finally:
        _observers.reset(token)


def current_observers() -> tuple[keras.callbacks.Callback, ...]:
    """Return the callbacks that `observed_by` has every training call."""
    return _observers.get()


def build_optimizer(training: Training, total_steps: int, model: keras.Model) -> keras.optimizers.Optimizer:
    """Return a fresh optimizer for `total_steps` steps; it scales the loss if `model` uses float16."""
    rate: Any = training.base_rate()
    if training.learning_rate_schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, decay_steps=max(total_steps, 1))
    if training.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)
    else:
        optimizer = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}[training.optimizer](rate)
    if any(layer.compute_dtype == "float16" for layer in find_all_layers(model)):
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def steps_in_epoch(split: Split, batch_size: int) -> int:
    """Return the number of batches in `split`; a stream of unknown length is read through once."""
    if split.in_memory:
        return math.ceil(len(split) / batch_size)
    if hasattr(split.stream, "cardinality") and int(split.stream.cardinality()) == _INFINITE:
        raise DataError(
            f"an epoch needs an end. Received: split {split.name!r} is an endless stream",
            "End it with `dataset.take(batches)`.",
        )
    try:
        return len(split.stream)
    except TypeError:  # of unknown length
        return sum(1 for _ in split.batches())


@contextmanager
def compiled_for_training(model: keras.Model, task: Task, optimizer: keras.Optimizer) -> Iterator[None]:
    """Have `model` compiled with `optimizer` inside the block, and with a fresh one of its own kind after it.

    Loss, metrics and the other settings of a compiled model stay as they are, and so need not be
    serializable; a model that is not compiled gets those of `task` and keeps them.
    """
    if not model.compiled:
        model.compile(optimizer="adam", **task.compile_arguments())
    original = model.optimizer
    _set_optimizer(model, optimizer)
    try:
        yield
    finally:
        model.optimizer = original
        refresh_optimizer(model)


def refresh_optimizer(model: keras.Model) -> None:
    """Give a compiled `model` a new optimizer with the settings of its own."""
    if model.compiled and model.optimizer is not None:
        _set_optimizer(model, type(model.optimizer).from_config(model.optimizer.get_config()))


def _set_optimizer(model: keras.Model, optimizer: keras.Optimizer) -> None:
    model.optimizer = optimizer
    if model.built:
        optimizer.build(model.trainable_variables)
    model.make_train_function(force=True)


def fit_guarded(
    model: keras.Model,
    arguments: dict[str, Any],
    training: Training,
    steps: int,
    *,
    keep: keras.Model | None = None,
    callbacks: Iterable[keras.callbacks.Callback] = (),
    description: str,
) -> dict[str, list[float]]:
    """Run `model.fit` with progress, and return the history.

    Args:
        model: a compiled model.
        arguments: what `fit` reads: arrays as `x`, `y` and `batch_size`, or a `Split` or an iterable factory
            as `x`.
        training: how many epochs.
        steps: batches per epoch.
        keep: the model whose weights are put back when the loss is lost; `model` by default.
        callbacks: further callbacks, called after the guard.
        description: what progress calls this.

    Raises:
        PassError: the loss became NaN or infinite, or a stream raised; with `epoch`, `step` and, for a lost
            loss, `learning_rate` as attributes.
    """
    with track(description, total=steps * training.epochs) as advance:
        guard = _Guard(keep or model, advance)
        source = arguments["x"]
        streamed = isinstance(source, Split) or callable(source)
        if streamed:
            arguments = _stream_arguments(source, steps)
        try:
            called = [*callbacks, guard, *current_observers()]
            history = model.fit(**arguments, epochs=training.epochs, verbose=0, callbacks=called)
        except BmcompressError:
            raise
        except Exception as error:
            if not streamed:
                raise
            raise PassError(
                f"training stopped in epoch {guard.epoch}, step {guard.step + 1}: "
                f"reading the data or training on it raised {_reason(error)}"
            ) from error
    if guard.error:
        raise guard.error
    return history.history


def _reason(error: Exception) -> str:
    """Return what went wrong in one line; TensorFlow buries the exception of a stream in its own."""
    lines = [line.strip() for line in str(error).splitlines()]
    buried = [found[0] for line in lines if (found := re.search(r"\b[A-Za-z]+(Error|Exception): .+", line))]
    plain = [line for line in lines if line and line != "Graph execution error:" and not line.startswith("Detected")]
    return (buried or [f"{type(error).__name__}: {(plain or [''])[0]}"])[0][:300]


def _stream_arguments(source: Split | Callable[[], Iterable[Any]], steps: int) -> dict[str, Any]:
    """Return what `fit` reads batches from, epoch after epoch."""
    if isinstance(source, Split):
        if isinstance(source.stream, keras.utils.PyDataset):
            return {"x": source.stream, "shuffle": True}
        if hasattr(source.stream, "element_spec"):  # a tf.data.Dataset
            return {"x": source.stream, "shuffle": False}
        source = source.batches

    def endless() -> Iterator[Any]:
        while True:
            yield from source()

    return {"x": endless(), "steps_per_epoch": steps, "shuffle": False}


class _Guard(keras.callbacks.Callback):
    """Reports progress, keeps the weights of the last finite epoch, and stops training when the loss is not
    finite.

    Training is stopped instead of raised out of, so that the `on_train_end` of other callbacks is called.
    """

    def __init__(self, keep: keras.Model, advance: Callable[..., None]):
        super().__init__()
        self._keep, self._advance = keep, advance
        self._good: list[np.ndarray] = []
        self._unreported, self._reported_at, self._loss = 0, 0.0, math.nan
        self.epoch, self.step = 1, 0
        self.error: PassError | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._good = self._keep.get_weights()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch, self.step = epoch + 1, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._unreported += batch + 1 - self.step
        self.step = batch + 1
        self._loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(self._loss):
            self._stop(f"loss became {'NaN' if math.isnan(self._loss) else 'infinite'}")
        now = time.perf_counter()
        if now - self._reported_at > _REFRESH_S:
            self._report(now)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.error:
            return
        self._report(time.perf_counter())
        weights = self._keep.get_weights()
        if not all(np.isfinite(weight).all() for weight in weights if weight.dtype.kind == "f"):
            self._stop("weights became NaN or infinite")
        else:
            self._good = weights

    def _report(self, now: float) -> None:
        self._advance(self._unreported, f"loss {self._loss:.4g}")
        self._unreported, self._reported_at = 0, now

    def _stop(self, what: str) -> None:
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self._keep.set_weights(self._good)
        self.model.stop_training = True
        self.error = PassError(
            f"{what} in epoch {self.epoch}, step {self.step}, learning rate {rate:g}",
            f"Try a lower learning rate, such as {rate / 10:.2g}, and check the scale of inputs and labels.",
        )
        self.error.epoch, self.error.step, self.error.learning_rate = self.epoch, self.step, rate


def settle_batch_norm(model: keras.Model, split: Split, total_steps: int) -> None:
    """Re-estimate the statistics of batch normalisation after a training too short for them to have settled.

    Ten times the window of the slowest average counts as long enough: 1000 steps at Keras' momentum of 0.99.
    """
    layers = [layer for _, layer in find_layers(model)]
    momenta = [each.momentum for each in layers if isinstance(each, keras.layers.BatchNormalization) and each.trainable]
    if momenta and total_steps * (1 - max(momenta)) < _SETTLED_WINDOWS:
        reestimate_batch_norm(model, split)
