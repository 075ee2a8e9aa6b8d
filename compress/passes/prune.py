"""The pass `prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from compress.options import parse_fraction
from compress.passes.base import Pass
from compress.passes.training import TeacherOption, resolve_teacher, train_copy
from compress.pruning.schedules import PolynomialSchedule, Schedule
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data


class MagnitudePruning(Training, Pass):
    """Set the smallest weights of each kernel to zero while training goes on (Zhu and Gupta 2017, arXiv:1710.01878).

    The file gets smaller when it is compressed. Runtimes that have no sparse kernels do not get faster from it.
    """

    type: Literal["prune"] = "prune"
    sparsity: Annotated[float, Field(ge=0, lt=1), BeforeValidator(parse_fraction, json_schema_input_type=float | str)]
    """Fraction of zeros in every selected kernel at the end, hit exactly: `0.8` or `80%`."""
    schedule: Schedule = PolynomialSchedule()
    """How sparsity grows during the training of this pass."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over layer paths; only these layers are pruned."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over layer paths; these layers are left alone."""
    distribution: Literal["uniform", "global"] = "uniform"
    """`uniform`: every kernel gets this sparsity; `global`: all of them together do."""
    epochs: int = Field(default=3, ge=0, le=1_000_000)
    """Epochs of training over which sparsity grows; 0 prunes at once and needs no data."""
    teacher: TeacherOption = None
    """A model that teaches meanwhile: a `.keras` file, or `input` for the model that the recipe starts from."""

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a sparse copy of `model`."""
        if self.epochs == 0:
            from compress.pruning.magnitude import prune_weights

            return prune_weights(
                model,
                self.sparsity,
                include=self.include,
                exclude=self.exclude,
                distribution=self.distribution,
            )
        from compress.pruning.callback import Pruning

        pruning = Pruning(
            self.sparsity,
            schedule=self.schedule,
            include=self.include,
            exclude=self.exclude,
            distribution=self.distribution,
        )
        return train_copy(model, data, self, teacher=resolve_teacher(self.teacher, model), callbacks=[pruning])

    def check(self, model: keras.Model) -> None:
        """Raise UsageError if a pattern matches nothing or no kernel is left to prune."""
        from compress.models.walking import find_kernels

        find_kernels(model, self.include, self.exclude)

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that training reads; pruning at once reads none."""
        return ("train",) if self.epochs else ()
