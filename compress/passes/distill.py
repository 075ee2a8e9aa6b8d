"""The pass `distill`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.errors import UsageError
from compress.options import Share
from compress.passes.base import Pass
from compress.passes.training import TeacherOption, resolve_teacher, train_copy
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data


class Distillation(Training, Pass):
    """Train the model to answer as its teacher does (Hinton et al. 2015, arXiv:1503.02531)."""

    type: Literal["distill"] = "distill"
    teacher: TeacherOption
    """The model to learn from, never changed: a `.keras` file, or `input` for the one that the recipe starts from."""
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Softens both models' answers, so that small probabilities teach too."""
    alpha: Share = 0.9
    """Weight of the teacher's answers; `1 - alpha` is the weight of the labels, where there are any."""
    epochs: int = Field(default=10, ge=1, le=1_000_000)
    """How often the training samples are gone through."""

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a copy of `model`, the student, that was taught."""
        teacher = resolve_teacher(self.teacher, model)
        if teacher is None:
            raise UsageError(
                "distillation needs a teacher. Received: teacher=None", "Give a keras.Model or {path: FILE}."
            )
        return train_copy(model, data, self, teacher=teacher, temperature=self.temperature, alpha=self.alpha)

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that training reads; the unlabelled one is used where the data has it."""
        return ("train",)
