"""The pass `prune`."""

from __future__ import annotations

from glob import escape
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from compress.errors import UsageError
from compress.options import parse_fraction
from compress.passes.base import Pass
from compress.passes.engines import EngineOption
from compress.passes.training import TeacherOption, resolve_teacher, train_copy
from compress.pruning.schedules import PolynomialSchedule, Regrowth, Schedule, StepSchedule
from compress.pruning.tfmot_schedules import adopt_schedule, is_tfmot_schedule
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data


Sparsity = Annotated[float, Field(ge=0, lt=1), BeforeValidator(parse_fraction, json_schema_input_type=float | str)]
"""A fraction of zeros, such as `0.8` or `80%`."""


class MagnitudePruning(EngineOption, Training, Pass):
    """Set the least important weights to zero while training goes on (Zhu and Gupta 2017, arXiv:1710.01878).

    The file gets smaller when it is compressed. Runtimes that have no sparse kernels do not get faster from it.
    """

    changes_structure: ClassVar[bool] = True
    type: Literal["prune"] = "prune"
    sparsity: Sparsity | None = None
    """Fraction of zeros in the selected kernels at the end, hit exactly: `0.8` or `80%`. N:M says it by itself."""
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
    distribution: Literal["uniform", "global", "erk", "lamp", "sensitivity"] | dict[str, Sparsity] = "uniform"
    """`uniform`: every kernel gets this sparsity; `global`, `erk` (Evci et al. 2020, arXiv:1911.11134) and `lamp` (Lee
    et al. 2021, arXiv:2010.07611): all of them together do; `sensitivity`: so do they, and what is measured first is
    how much of each the outputs bear; or the sparsity by pattern over layer paths."""
    profile: Literal["xnnpack"] | None = None
    """`xnnpack`: prune just the 1x1 convolutions that LiteRT's sparse kernels accept. Promises no speed."""
    regrow: Regrowth | None = None
    """Lets kept weights change places with pruned ones where gradients are greater (Evci et al. 2020,
    arXiv:1911.11134); `{}` for its defaults."""
    reestimate_batch_norm: bool = False
    """Give batch normalisation the statistics of the pruned model's activations at the end; reads training samples."""
    epochs: int = Field(default=3, ge=0, le=1_000_000)
    """Epochs of training over which sparsity grows; 0 prunes at once and needs no data."""
    teacher: TeacherOption = None
    """A model that teaches meanwhile: a `.keras` file, or `input` for the model that the recipe starts from."""

    @model_validator(mode="before")
    @classmethod
    def _take_tfmot_schedule(cls, values: Any) -> Any:
        """Take a schedule object of tfmot, and the final sparsity from a schedule that says it."""
        if not isinstance(values, dict) or values.get("schedule") is None:
            return values
        schedule = values["schedule"]
        schedule = adopt_schedule(schedule) if is_tfmot_schedule(schedule) else schedule
        final = schedule.get("final_sparsity") if isinstance(schedule, dict) else None
        final = schedule.final_sparsity if isinstance(schedule, StepSchedule) else final
        if final is not None and values.get("sparsity") is None:
            values = {**values, "sparsity": final}
        return {**values, "schedule": schedule}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if isinstance(self.schedule, StepSchedule) and self.sparsity != self.schedule.final_sparsity:
            raise ValueError(
                f"expected one final sparsity. Received: sparsity={self.sparsity}, and {self.schedule.final_sparsity} "
                "in the schedule"
            )
        if self.sparsity is None and ":" not in self.pattern:
            raise ValueError(f"expected a sparsity, such as 80%, for the pattern {self.pattern}. Received: none")
        if self.engine == "tfmot" and self.schedule.type == "iterative":
            raise ValueError("expected a constant or polynomial schedule with engine: tfmot. Received: iterative")
        if self.regrow and self.epochs == 0:
            raise ValueError("expected epochs of training to regrow weights in. Received: epochs=0")
        return self

    @classmethod
    def ours_alone(cls) -> tuple[str, ...]:
        """Return the names of options that tfmot has no counterpart for."""
        return ("score", "distribution", "profile", "regrow", "reestimate_batch_norm", "teacher")

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a sparse copy of `model`."""
        if self.engine == "tfmot":
            return self._apply_tfmot(model, data)
        options = {
            "include": self._included(model),
            "exclude": self.exclude,
            "score": self.score,
            "distribution": self.distribution,
            "pattern": self.pattern,
            "data": data.require("train", "pruning by gradients or sensitivity") if self._reads_data else None,
        }
        if self.epochs == 0:
            from compress.pruning.magnitude import prune_weights

            result = prune_weights(model, self.sparsity, **options)
        else:
            from compress.pruning.callback import Pruning

            pruning = Pruning(self.sparsity, schedule=self.schedule, regrow=self.regrow, **options)
            teacher = resolve_teacher(self.teacher, model)
            result = train_copy(model, data, self, teacher=teacher, callbacks=[pruning])
        if self.reestimate_batch_norm:
            from compress.training.batch_norm import reestimate_batch_norm

            reestimate_batch_norm(result, data)
        return result

    def check(self, model: keras.Model) -> None:
        """Raise UsageError where no kernel is left to prune, or one cannot be pruned as the options say."""
        from compress.pruning.masks import require_plan, resolve_sparsity
        from compress.pruning.selection import select_kernels

        self.check_engine(model)
        kernels, layouts, _ = select_kernels(model, self._included(model), self.exclude)
        sparsity = resolve_sparsity(self.sparsity, self.pattern)
        if self.profile:
            from compress.pruning.xnnpack import MINIMUM_SPARSITY

            if sparsity <= MINIMUM_SPARSITY:
                raise UsageError(
                    f"expected more than two thirds of zeros for the profile {self.profile}: LiteRT's sparse kernels "
                    f"start there. Received: sparsity={sparsity:.4g}"
                )
        require_plan(kernels, layouts, sparsity, self.distribution, self.pattern, self.score)

    def expectations(self) -> list[str]:
        """Return what this pattern of zeros does not do, in whatever runtime."""
        if self.profile == "xnnpack":
            return [
                "zeros make the compressed file smaller; LiteRT may run these layers faster on Arm if the file stores "
                "them sparsely (`sparse: auto` of the export), but not on x86 with AVX, and ONNX Runtime does not"
            ]
        return [
            f"zeros ({self.pattern}) make the compressed file smaller; neither LiteRT nor ONNX Runtime runs faster "
            "because of them: consider 8 bits or fewer channels for speed"
        ]

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that it reads; pruning at once reads none, unless a choice is made by the data."""
        return ("train",) if self.epochs or self._reads_data or self.reestimate_batch_norm else ()

    @property
    def _reads_data(self) -> bool:
        return self.score == "taylor" or self.distribution == "sensitivity" or self.regrow is not None

    def _apply_tfmot(self, model: keras.Model, data: Data) -> keras.Model:
        from compress.legacy.engine import Growth, prune_with_tfmot
        from compress.pruning.masks import resolve_sparsity

        def growth(steps: int) -> Growth:
            schedule = self.schedule
            schedule = schedule.in_training(steps) if isinstance(schedule, StepSchedule) else schedule
            return Growth(
                final=resolve_sparsity(self.sparsity, self.pattern),
                begin=schedule.begin,
                end=schedule.end,
                initial=getattr(schedule, "initial_sparsity", 0.0),
                power=getattr(schedule, "power", 1.0),
                frequency=schedule.frequency,
            )

        which = {"pattern": self.pattern, "include": self.include, "exclude": self.exclude}
        return prune_with_tfmot(model, data, self, growth, **which)

    def _included(self, model: keras.Model) -> tuple[str, ...]:
        if self.profile is None:
            return self.include
        from compress.pruning.xnnpack import select_xnnpack

        return tuple(escape(path) for path in select_xnnpack(model, self.include))
