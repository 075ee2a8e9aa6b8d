"""How a model is trained, as options of every pass that trains. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compress.options import Options


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
