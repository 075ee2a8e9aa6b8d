"""What `keras.distillation.Distiller` needs to do right by any pair of models: logits in float32, and losses.

Used as they come its losses hurt students (Keras 3.15): named by a string, `kl_divergence` is applied to raw
logits without softmax; heads that end in softmax are taken for logits; regularisers are dropped; the teacher
is frozen.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import keras

from compress.errors import UsageError
from compress.models.task import OutputTask, name_of

Form = Literal["softmax", "sigmoid", "linear"]
"""How outputs are compared: as class distributions, as yes-no probabilities, or as numbers."""


@dataclass(frozen=True)
class OutputPair:
    """One output of both models.

    Args:
        student, teacher: what the output is for either model.
        form: how the two are compared: as class distributions, as yes-no probabilities, or as numbers.
        weight: the output's part in the loss.
    """

    student: OutputTask
    teacher: OutputTask
    form: Form
    weight: float


def _to_logits(values: Any, head: str) -> Any:
    """Return the float32 logits behind `values`; the floor is what the dtype of a probability can hold."""
    ops, half = keras.ops, keras.backend.standardize_dtype(values.dtype) == "float16"
    values = ops.cast(values, "float32")
    if head == "softmax":
        return ops.log(ops.maximum(values, 3e-8 if half else 1e-30))
    if head == "sigmoid":
        floor = 5e-4 if half else 1e-7
        values = ops.clip(values, floor, 1.0 - floor)
        return ops.log(values) - ops.log1p(-values)
    return values


def _for_comparison(logits: Any, form: str) -> Any:
    """Return `logits` as class logits: a sigmoid is a softmax over the logit and zero, at any temperature."""
    return keras.ops.stack([logits, keras.ops.zeros_like(logits)], axis=-1) if form == "sigmoid" else logits


class TupleDistiller(keras.distillation.Distiller):
    """A `Distiller` whose labels are a tuple, as its losses are: PyTorch makes lists of a stream's tuples."""

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return the loss; arguments as of `Distiller`."""
        return super().compute_loss(x, tuple(y), y_pred, sample_weight, training)


class TeacherLogits(keras.Model):
    """Gives the teacher's logits that came with the batch, or calls the teacher where none did."""

    def __init__(self, teacher: keras.Model, pairs: list[OutputPair]):
        super().__init__(name="teacher_logits")
        self._forms = [pair.form for pair in pairs]
        # Held by a function, so that Keras does not see the teacher here and `Distiller` cannot freeze it.
        self._call_teacher = lambda x: teacher_logits(teacher(x, training=False), pairs)

    def build(self, input_shape: Any) -> None:
        """Do nothing: the teacher is built."""

    def call(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        logits = inputs["teacher"] if "teacher" in inputs else self._call_teacher(_unpack(inputs["inputs"]))
        compared = (_for_comparison(each, form) for each, form in zip(logits, self._forms, strict=True))
        return tuple(keras.ops.stop_gradient(each) for each in compared)


class StudentLogits(keras.Model):
    """Gives the student's logits; the student's own variables are its only ones."""

    def __init__(self, student: keras.Model, pairs: list[OutputPair]):
        super().__init__(name="student_logits")
        self.student = student
        self._heads = [(pair.student.head, pair.form) for pair in pairs]

    def build(self, input_shape: Any) -> None:
        """Do nothing: the student is built."""

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> tuple[Any, ...]:
        outputs = keras.tree.flatten(self.student(_unpack(inputs["inputs"]), training=training))
        return tuple(
            _for_comparison(_to_logits(values, head), form)
            for values, (head, form) in zip(outputs, self._heads, strict=True)
        )


def student_of(model: keras.Model) -> keras.Model:
    """Return the model whose layers are trained, as its owner knows it: a distiller's student, or `model` itself."""
    if not isinstance(model, keras.distillation.Distiller):
        return model
    return model.student.student if isinstance(model.student, StudentLogits) else model.student


def _unpack(x: Any) -> Any:
    """Return `x` as models take several inputs; `fit` makes tuples of lists."""
    return list(x) if isinstance(x, tuple) else x


def teacher_logits(outputs: Any, pairs: list[OutputPair]) -> list[Any]:
    """Return the float32 logits behind the teacher's outputs, one per output."""
    return [
        _to_logits(values, pair.teacher.head) for values, pair in zip(keras.tree.flatten(outputs), pairs, strict=True)
    ]


def distillation_losses(
    student: keras.Model, pairs: list[OutputPair], temperature: float, alpha: float
) -> dict[str, list[Any]]:
    """Return the losses against the teacher, one per output, and the student's own regularisers."""
    losses: list[Any] = []
    for index, pair in enumerate(pairs):
        if pair.form == "linear":
            parts = tuple(keras.losses.MeanSquaredError() if i == index else None for i in range(len(pairs)))
            losses.append(keras.distillation.FeatureDistillation(loss=parts))
        else:
            # The object, not its name: only then does Keras apply softmax and the squared temperature.
            parts = tuple(keras.losses.KLDivergence() if i == index else None for i in range(len(pairs)))
            losses.append(keras.distillation.LogitsDistillation(temperature=temperature, loss=parts))
    weights = [pair.weight for pair in pairs]
    return {
        "distillation_losses": [*losses, _Regularisation(student)],
        "distillation_loss_weights": [*weights, 1.0 / alpha],  # Distiller multiplies all of them by alpha
    }


class _Regularisation(keras.distillation.DistillationLoss):
    """The penalties that the student's layers add to any loss; `Distiller` leaves them out."""

    def __init__(self, student: keras.Model):
        self._student = student

    def compute_loss(self, teacher_outputs: Any, student_outputs: Any, **kwargs: Any) -> Any:
        return sum((keras.ops.sum(loss) for loss in self._student.losses), keras.ops.zeros(()))


class HardLoss:
    """The student's own loss over the labelled samples of a batch, as their mean."""

    def __init__(self, pair: OutputPair, masked: bool):
        self._pair, self._masked = pair, masked
        loss = keras.losses.get(pair.student.loss)
        if isinstance(loss, keras.losses.Loss):
            loss = copy.copy(loss)
            loss.reduction = "none"
        self._loss = loss

    def __call__(self, y: Any, logits: Any) -> Any:
        ops, output = keras.ops, self._pair.student
        if self._loss is None:
            return ops.zeros(())
        if self._pair.form == "sigmoid":
            logits = logits[..., 0]
        predicted = {"softmax": ops.softmax, "sigmoid": ops.sigmoid}.get(output.head, lambda z: z)(logits)
        missing = y < 0 if output.sparse else ops.isnan(y)
        losses = ops.cast(self._loss(ops.where(missing, ops.zeros_like(y), y), predicted), "float32")
        if len(losses.shape) == 0:
            if self._masked:
                raise UsageError(
                    f"with unlabelled data a loss must give one value per sample. Received: "
                    f"{name_of(output.loss)} gives one for the batch",
                    "Leave out the mean at its end; Keras takes it.",
                )
            return losses * self._pair.weight
        labelled = 1.0 - ops.cast(missing, "float32")
        while len(labelled.shape) > len(losses.shape):
            labelled = ops.min(labelled, axis=-1)
        mean = ops.sum(losses * labelled) / ops.maximum(ops.sum(labelled), 1.0)
        return mean * self._pair.weight
