"""The pass `finetune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.passes.base import Pass
from compress.passes.training import train_copy
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data


class FineTuning(Training, Pass):
    """Train on with the model's own loss; zeros of earlier passes stay zero."""

    type: Literal["finetune"] = "finetune"

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a copy of `model` that was trained on."""
        return train_copy(model, data, self)

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that training reads."""
        return ("train",)
