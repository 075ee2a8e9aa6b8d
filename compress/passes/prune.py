"""The pass `prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from compress.options import parse_fraction
from compress.passes.base import Pass
from compress.passes.training import TeacherOption, resolve_teacher, train_copy
from compress.pruning.schedules import PolynomialSchedule, Schedule
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data


Sparsity = Annotated[float, Field(ge=0, lt=1), BeforeValidator(parse_fraction, json_schema_input_type=float | str)]
"""A fraction of zeros, such as `0.8` or `80%`."""


class MagnitudePruning(Training, Pass):
    """Set the least important weights to zero while training goes on (Zhu and Gupta 2017, arXiv:1710.01878).

    The file gets smaller when it is compressed. Runtimes that have no sparse kernels do not get faster from it.
    """

    changes_structure: ClassVar[bool] = True
    type: Literal["prune"] = "prune"
    sparsity: Sparsity
    """Fraction of zeros in the selected kernels at the end, hit exactly: `0.8` or `80%`. With N:M, `1 - N/M`."""
    score: Literal["magnitude", "random", "taylor", "movement"] = "magnitude"
    """What makes a weight important: its size, chance, what the loss would suffer (Molchanov et al. 2019,
    arXiv:1906.10771), or whether training moves it away from zero (Sanh et al. 2020, arXiv:2005.07683)."""
    pattern: str = "unstructured"
    """Which weights go together: `unstructured`, N of each M inputs stay as in `2:4`, or blocks as in `4x1`, `1x16`."""
    schedule: Schedule = PolynomialSchedule()
    """How sparsity grows during the training of this pass."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over layer paths; only these layers are pruned."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over layer paths; these layers are left alone."""
    distribution: Literal["uniform", "global", "erk", "lamp"] | dict[str, Sparsity] = "uniform"
    """`uniform`: every kernel gets this sparsity; `global`, `erk` (Evci et al. 2020, arXiv:1911.11134) and `lamp` (Lee
    et al. 2021, arXiv:2010.07611): all of them together do; or the sparsity by pattern over layer paths."""
    epochs: int = Field(default=3, ge=0, le=1_000_000)
    """Epochs of training over which sparsity grows; 0 prunes at once and needs no data."""
    teacher: TeacherOption = None
    """A model that teaches meanwhile: a `.keras` file, or `input` for the model that the recipe starts from."""

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a sparse copy of `model`."""
        options = {
            "include": self.include,
            "exclude": self.exclude,
            "score": self.score,
            "distribution": self.distribution,
            "pattern": self.pattern,
            "data": data.require("train", "the score taylor") if self.score == "taylor" else None,
        }
        if self.epochs == 0:
            from compress.pruning.magnitude import prune_weights

            return prune_weights(model, self.sparsity, **options)
        from compress.pruning.callback import Pruning

        pruning = Pruning(self.sparsity, schedule=self.schedule, **options)
        return train_copy(model, data, self, teacher=resolve_teacher(self.teacher, model), callbacks=[pruning])

    def check(self, model: keras.Model) -> None:
        """Raise UsageError where no kernel is left to prune, or one cannot be pruned as the options say."""
        from compress.pruning.masks import require_plan, resolve_sparsity
        from compress.pruning.selection import select_kernels

        kernels, layouts, _ = select_kernels(model, self.include, self.exclude)
        sparsity = resolve_sparsity(self.sparsity, self.pattern)
        require_plan(kernels, layouts, sparsity, self.distribution, self.pattern, self.score)

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that training reads; pruning at once reads none, unless its score needs gradients."""
        return ("train",) if self.epochs or self.score == "taylor" else ()
