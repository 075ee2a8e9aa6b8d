"""Streams of batches: what is taken of them, and preprocessing while they are read.

Imports Keras and TensorFlow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from compress.data.preprocessing import preprocess_arrays
from compress.data.references import SourceOptions, Step
from compress.data.split import flatten_arrays
from compress.errors import DataError

_BATCH_SIZE = 128


def choose_samples(stream: Any, source: SourceOptions, where: str) -> Any:
    """Return `stream` without the samples that `source` skips and after those it takes, in batches as before.

    Raises:
        DataError: the stream is not a `tf.data.Dataset`, whose samples can be chosen.
    """
    if source.shuffle:
        raise DataError(
            f"{where}: `shuffle` works on arrays and image folders. Received: a stream",
            "Shuffle where the stream is made.",
        )
    chosen = bool(source.skip) or source.take is not None
    if not isinstance(stream, tf.data.Dataset):
        if chosen:
            raise DataError(
                f"{where}: `take` and `skip` work on arrays, image folders and tf.data. "
                f"Received: {type(stream).__name__}",
                "Choose the samples in the function that makes it.",
            )
        return stream
    if chosen:
        first = next(iter(stream.take(1)), None)
        batch_size = _BATCH_SIZE if first is None else len(flatten_arrays(first)[0])
        samples = stream.unbatch().skip(source.skip)
        stream = samples.take(source.take if source.take is not None else -1).batch(batch_size)
    return stream


def check_end(stream: Any, where: str) -> None:
    """Raise DataError when `stream` is known to have no end."""
    if isinstance(stream, tf.data.Dataset) and stream.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise DataError(
            f"{where}: the tf.data.Dataset must end. Received: one that repeats for ever",
            "Leave out .repeat().",
        )
    if isinstance(stream, keras.utils.PyDataset) and stream.num_batches is None:
        raise DataError(f"{where}: the PyDataset must end. Received: one whose num_batches is None")


def preprocess_stream(stream: Any, steps: Sequence[Step], labels: bool, where: str) -> Any:
    """Return `stream` with `steps` applied to each batch as it is read, and labels only when `labels`."""
    if not steps and labels:
        return stream
    if isinstance(stream, tf.data.Dataset):
        _check_axes(stream.element_spec, steps, where)
        return stream.map(lambda *batch: _preprocess_tensors(batch, steps, labels), num_parallel_calls=tf.data.AUTOTUNE)
    if isinstance(stream, keras.utils.PyDataset):
        return PreprocessedBatches(stream, steps, labels, where)
    raise DataError(
        f"{where}: `preprocess` works on arrays, tf.data and PyDataset. Received: {type(stream).__name__}",
        "Preprocess in the function that makes it.",
    )


def _check_axes(spec: Any, steps: Sequence[Step], where: str) -> None:
    """Raise DataError when `expand_dims` would move the axis of the samples."""
    for step in steps:
        for leaf in tf.nest.flatten(spec[0] if isinstance(spec, tuple) else spec):
            rank = leaf.shape.rank
            if step.expand_dims is not None and rank is not None and not -rank <= step.expand_dims <= rank:
                raise DataError(
                    f"{where}: preprocessing step `{step}`: expected an axis from {-rank} to {rank}. "
                    f"Received: {step.expand_dims}"
                )


class PreprocessedBatches(keras.utils.PyDataset):
    """The batches of another PyDataset, preprocessed as NumPy arrays.

    Args:
        batches: gives `x`, `(x, y)` or `(x, y, sample_weight)`.
        steps: what is done to each batch.
        labels: whether `y` is kept.
        where: what messages call the data.
    """

    def __init__(self, batches: keras.utils.PyDataset, steps: Sequence[Step], labels: bool, where: str):
        super().__init__(
            workers=batches.workers,
            use_multiprocessing=batches.use_multiprocessing,
            max_queue_size=batches.max_queue_size,
        )
        self.batches, self.steps, self.labels, self.where = batches, tuple(steps), labels, where

    def __len__(self) -> int:
        return self.batches.num_batches

    def __getitem__(self, index: int) -> Any:
        batch = self.batches[index]
        parts = batch if isinstance(batch, tuple) else (batch,)
        x, y = preprocess_arrays(self.steps, parts[0], parts[1] if self.labels and len(parts) > 1 else None, self.where)
        return (x,) if y is None else (x, y, *parts[2:])

    def on_epoch_begin(self) -> None:
        self.batches.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self.batches.on_epoch_end()


def _preprocess_tensors(batch: tuple, steps: Sequence[Step], labels: bool) -> tuple:
    x, rest = batch[0], batch[1:] if labels else ()
    for step in steps:
        if step.one_hot is None:
            x = tf.nest.map_structure(partial(_change, step=step), x)
        elif rest:
            rest = (tf.nest.map_structure(partial(_one_hot, classes=step.one_hot), rest[0]), *rest[1:])
    return (x, *rest)  # without labels a tuple too: Keras would take several inputs for `(x, y)`


def _change(tensor: tf.Tensor, step: Step) -> tf.Tensor:
    if step.rescale is not None or step.offset is not None:
        tensor = tensor if tensor.dtype.is_floating else tf.cast(tensor, tf.float32)
        scaled = tensor * tf.cast(1 if step.rescale is None else step.rescale, tensor.dtype)
        return scaled if step.offset is None else scaled + tf.cast(step.offset, tensor.dtype)
    if step.expand_dims is not None:
        return tf.expand_dims(tensor, step.expand_dims)
    if step.flatten:
        sizes = tensor.shape[1:]
        return (
            tf.reshape(tensor, (-1, sizes.num_elements()))
            if sizes.is_fully_defined()
            else keras.ops.reshape(tensor, (tf.shape(tensor)[0], -1))
        )
    return tf.cast(tensor, step.cast)


def _one_hot(labels: tf.Tensor, classes: int) -> tf.Tensor:
    if labels.shape.rank is not None and labels.shape.rank > 1 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    wide = tf.cast(labels, tf.int64)
    inside = tf.debugging.assert_equal(
        tf.reduce_all((wide >= 0) & (wide < classes)),
        True,
        f"one_hot: expected labels from 0 to {classes - 1}",
    )
    with tf.control_dependencies([inside] if inside is not None else []):
        return tf.one_hot(wide, classes)
