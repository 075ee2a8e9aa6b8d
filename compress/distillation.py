"""Knowledge distillation: a student learns a teacher's outputs besides the labels.

Hinton 2015, arXiv:1503.02531, on `keras.distillation`. For data in memory the teacher's outputs are computed
once; for streams it is called in each step. The student comes back plain, and the teacher is never touched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from compress.data.split import Arrays, Data, Split, concatenate_arrays, flatten_arrays, map_arrays
from compress.errors import DataError, UsageError
from compress.models.task import OutputTask, Task, check_inputs, check_labels, infer_task, pair_labels
from compress.progress import track
from compress.training.distiller import (
    Form,
    HardLoss,
    OutputPair,
    StudentLogits,
    TeacherLogits,
    TupleDistiller,
    distillation_losses,
    teacher_logits,
)
from compress.training.fitting import (
    build_optimizer,
    fit_guarded,
    refresh_optimizer,
    settle_batch_norm,
    steps_in_epoch,
)

if TYPE_CHECKING:
    from compress.training.options import Training

_CACHE_LIMIT_BYTES = 2**30
_SAMPLE = 64
_CHUNK = 256


def distill(
    student: keras.Model,
    teacher: keras.Model,
    data: Data,
    *,
    training: Training,
    temperature: float = 2.0,
    alpha: float = 0.9,
    callbacks: Iterable[keras.callbacks.Callback] = (),
) -> keras.Model:
    """Train `student` in place to predict as `teacher` does, and return it, plain.

    The loss is `alpha * distillation + (1 - alpha) * hard`. The distillation loss is the
    temperature-softened KL divergence for classification, binary and multi-label outputs, and the mean
    squared error to the teacher for regression. The hard loss is the student's own, over the samples that
    have labels.

    Args:
        student: copy it first if the original matters; it keeps its compile settings and gets a fresh
            optimizer.
        teacher: takes the same inputs and has the same outputs; it is not changed. Heads may differ: logits
            for one and softmax for the other is fine.
        data: `train`, labelled or not (class number -1 or NaN marks a sample without label), and
            `unlabelled`.
        training: how to train.
        temperature: above 1 shows more of what the teacher thinks of the wrong classes.
        alpha: weight of the teacher, from above 0 to 1; 1 ignores the labels.
        callbacks: Keras callbacks; `self.model` is the `keras.distillation.Distiller`, its `student` the
            student.

    Raises:
        UsageError: teacher and student are one object, or `temperature` or `alpha` is out of range.
        DataError: teacher, student and data do not fit together, or the teacher's outputs are not finite.
        PassError: the loss became NaN or infinite; the student holds its last good weights.
    """
    _check_options(student, teacher, temperature, alpha)
    splits = [split for split in (data.train, data.unlabelled) if split is not None]
    if not splits:
        data.require("train", "distillation")
    pairs = _pair_outputs(student, teacher, splits[0], data)
    feed = _feed_arrays if all(split.in_memory for split in splits) else _feed_batches
    arguments, steps = feed(student, teacher, pairs, splits, training.batch_size)
    if training.epochs == 0:
        return student
    distiller = TupleDistiller(
        teacher=TeacherLogits(teacher, pairs),
        student=StudentLogits(student, pairs),
        **distillation_losses(student, pairs, temperature, alpha),
        student_loss_weight=1.0 - alpha,
    )
    distiller.built = True  # its parts are; Keras cannot trace the `**kwargs` of its call and would warn
    distiller.compile(
        optimizer=build_optimizer(training, steps * training.epochs, student),
        loss=tuple(HardLoss(pair, masked=data.unlabelled is not None) for pair in pairs),
        run_eagerly=student.compiled and student.run_eagerly,
        auto_scale_loss=False,  # the optimizer scales where it must
    )
    fit_guarded(distiller, arguments, training, steps, keep=student, callbacks=callbacks, description="distil")
    refresh_optimizer(student)
    settle_batch_norm(student, splits[-1], steps * training.epochs)
    return student


def _check_options(student: Any, teacher: Any, temperature: float, alpha: float) -> None:
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, keras.Model):
            raise UsageError(f"{role} must be a keras.Model. Received: {type(model).__name__}")
    if student is teacher:
        raise UsageError("teacher and student must be two models. Received: the same object for both")
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature must be above 0. Received: {temperature}")
    if not 0 < alpha <= 1:
        raise UsageError(f"alpha must be above 0 and at most 1. Received: {alpha}", "Without a teacher, use fine_tune.")


def _pair_outputs(student: keras.Model, teacher: keras.Model, split: Split, data: Data) -> list[OutputPair]:
    """Return the paired outputs, once models and samples are known to fit together."""
    inputs = [[tuple(t.shape)[1:] for t in getattr(m, "inputs", None) or []] for m in (teacher, student)]
    if all(inputs) and inputs[0] != inputs[1]:
        raise DataError(
            f"teacher and student must take the same inputs. Received: teacher {_text(inputs[0])}, "
            f"student {_text(inputs[1])}"
        )
    x, y = split.head(_SAMPLE)
    x, _ = check_inputs(student, x, split.name)
    y = None if split is data.unlabelled else y
    task, teacher_task = infer_task(student, _labelled(y), x), infer_task(teacher, _labelled(y), x)
    shapes = [[output.shape[1:] for output in each.outputs] for each in (teacher_task, task)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"teacher and student must have the same outputs. Received: teacher {_text(shapes[0])}, "
            f"student {_text(shapes[1])}"
        )
    weights = _loss_weights(student, task)
    return [
        OutputPair(ours, theirs, _form(ours, theirs), weight)
        for ours, theirs, weight in zip(task.outputs, teacher_task.outputs, weights, strict=True)
    ]


def _labelled(y: Arrays) -> Arrays:
    """Return the samples of `y` that have labels, as far as one can tell before the task is known."""
    leaves = flatten_arrays(y)
    if len(leaves) != 1 or leaves[0].dtype.kind not in "if":
        return y
    flat = leaves[0].reshape(len(leaves[0]), -1)
    keep = (flat != -1).all(1) if flat.dtype.kind == "i" else ~np.isnan(flat).any(1)
    return map_arrays(lambda array: array[keep], y) if keep.any() else None


def _form(student: OutputTask, teacher: OutputTask) -> Form:
    kinds = {student.kind, teacher.kind}
    forms = {
        "classification": "softmax",
        "binary": "sigmoid",
        "multilabel": "sigmoid",
        "regression": "linear",
    }
    found = {forms[kind] for kind in kinds}
    for output, other in ((student, teacher), (teacher, student)):
        if output.head == "linear" and not output.compiled:  # without labels, logits look like numbers
            found = {forms[other.kind]}
    if len(found) > 1:
        raise DataError(
            f"teacher and student must predict the same kind of thing in output {student.name!r}. "
            f"Received: teacher {teacher.kind} ({teacher.head}), student {student.kind} ({student.head})"
        )
    return found.pop()  # type: ignore[return-value]


def _loss_weights(model: keras.Model, task: Task) -> list[float]:
    given = model.get_compile_config().get("loss_weights") if model.compiled else None
    if isinstance(given, dict):
        return [float(given.get(output.name, 1.0)) for output in task.outputs]
    if isinstance(given, (list, tuple)):
        return [float(weight) for weight in given]
    return [1.0] * len(task.outputs)


def _text(shapes: list[tuple]) -> str:
    return ", ".join(str(shape) for shape in shapes)


def _feed_arrays(
    student: keras.Model,
    teacher: keras.Model,
    pairs: list[OutputPair],
    splits: list[Split],
    batch_size: int,
) -> tuple[dict[str, Any], int]:
    """Return what `fit` takes for splits in memory, the teacher's logits with them, and steps per epoch."""
    parts = [check_inputs(student, split.x, split.name)[0] for split in splits]
    labels = [_labels(pairs, split, split.y, len(split)) for split in splits]
    x = concatenate_arrays(parts)
    inputs: dict[str, Any] = {"inputs": x}
    merged = Split("train", x=x)
    per_sample = sum(math.prod(n or 1 for n in pair.teacher.shape[1:]) for pair in pairs)
    if len(merged) * per_sample * np.dtype("float32").itemsize <= _CACHE_LIMIT_BYTES:
        inputs["teacher"] = _run_teacher(teacher, pairs, merged)
    arguments = {"x": inputs, "y": concatenate_arrays(labels), "batch_size": batch_size}
    return arguments, steps_in_epoch(merged, batch_size)


def _run_teacher(teacher: keras.Model, pairs: list[OutputPair], split: Split) -> tuple[np.ndarray, ...]:
    """Return the teacher's logits for every sample, one array per output."""
    found = []
    with track("teacher", total=len(split)) as advance:
        for x, _ in split.batches(_CHUNK):
            logits = teacher_logits(_predict(teacher, x), pairs)
            found.append(tuple(keras.ops.convert_to_numpy(each) for each in logits))
            advance(len(found[-1][0]))
    return concatenate_arrays(found)


def _predict(teacher: keras.Model, x: Arrays) -> Any:
    """Return the teacher's outputs for one batch, known to be finite."""
    outputs = teacher.predict_on_batch(x)
    if not all(np.isfinite(each).all() for each in flatten_arrays(outputs)):
        raise DataError(
            "the teacher's outputs must be finite. Received: NaN or infinity",
            "Check the teacher's weights, and that its inputs are scaled as in its training.",
        )
    return outputs


def _feed_batches(
    student: keras.Model,
    teacher: keras.Model,
    pairs: list[OutputPair],
    splits: list[Split],
    batch_size: int,
) -> tuple[dict[str, Any], int]:
    """Return what `fit` takes for streams: batches of all splits in turn, for which the teacher is called."""
    x, y = splits[0].head(_SAMPLE)
    inputs, changes = check_inputs(student, x, splits[0].name)
    _predict(teacher, inputs)
    if len(splits) == 1 and len(pairs) == 1 and not changes and _is_labelled_dataset(splits[0].stream):
        _labels(pairs, splits[0], y, len(flatten_arrays(x)[0]))  # checks them
        split = replace(splits[0], stream=_map_dataset(splits[0].stream, pairs[0].student))
        return {"x": split}, steps_in_epoch(splits[0], batch_size)

    def read(split: Split) -> Iterator[tuple[Any, Any]]:
        for x, y in split.batches(batch_size):
            inputs, _ = check_inputs(student, x, split.name)
            samples = len(flatten_arrays(x)[0])
            yield {"inputs": inputs}, _labels(pairs, split, y, samples)

    def read_all() -> Iterator[tuple[Any, Any]]:
        readers = [read(split) for split in splits]
        for batches in itertools.zip_longest(*readers):
            yield from (batch for batch in batches if batch is not None)

    return {"x": read_all}, sum(steps_in_epoch(split, batch_size) for split in splits)


def _is_labelled_dataset(stream: Any) -> bool:
    """Return whether `stream` is a `tf.data.Dataset` of inputs and one array of labels."""
    spec = getattr(stream, "element_spec", None)
    return isinstance(spec, tuple) and len(spec) == 2 and hasattr(spec[1], "dtype")


def _map_dataset(dataset: Any, output: OutputTask) -> Any:
    """Return a `tf.data.Dataset` in the structure that `Distiller` takes; its batches stay out of Python."""
    import tensorflow as tf

    rank, dtype = (len(output.shape) - 1, tf.int32) if output.sparse else (len(output.shape), tf.float32)

    def pack(x: Any, y: Any) -> tuple[dict[str, Any], tuple[Any]]:
        if y.shape.rank == rank + 1:  # class numbers in a column
            y = tf.squeeze(y, -1)
        elif y.shape.rank == rank - 1:
            y = tf.expand_dims(y, -1)
        return {"inputs": x}, (tf.cast(y, dtype),)

    return dataset.map(pack, num_parallel_calls=1).prefetch(2)


def _labels(pairs: list[OutputPair], split: Split, y: Arrays, samples: int) -> tuple[np.ndarray, ...]:
    """Return checked labels by output, with -1 (class numbers) or NaN where there are none."""
    task = Task(tuple(pair.student for pair in pairs))
    if y is not None:
        check_labels(task, y, split.name, unlabelled=True)
    given = pair_labels([output.name for output in task.outputs], y)
    return tuple(_label_array(output, given[output.name], samples) for output in task.outputs)


def _label_array(output: OutputTask, y: np.ndarray | None, samples: int) -> np.ndarray:
    shape, dtype, missing = (
        (output.shape[1:-1], "int32", -1) if output.sparse else (output.shape[1:], "float32", np.nan)
    )
    if y is None:
        return np.full((samples, *(n or 1 for n in shape)), missing, dtype)
    return y.reshape(samples, *y.shape[1 : len(shape) + 1], *[1] * (len(shape) + 1 - y.ndim)).astype(dtype)
