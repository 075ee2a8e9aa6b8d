"""Pruning in a training loop of one's own, on every backend of Keras: three calls, and no callbacks.

Source of gradual pruning: Zhu and Gupta 2017, arXiv:1710.01878.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from compress.data.split import Split, as_data
from compress.errors import UsageError
from compress.models.walking import Kernel, Skipped
from compress.pruning.distributions import MEASURED, DistributionLike
from compress.pruning.masked_weights import MaskedWeights
from compress.pruning.options import PruningOptions, ScheduleLike, make_options
from compress.pruning.patterns import Pattern
from compress.pruning.rewinding import Rewinding
from compress.pruning.schedules import IterativeSchedule, Regrowth
from compress.pruning.scores import ScoreLike
from compress.pruning.sensitivity import resolve_distribution
from compress.training.distiller import student_of

_DEFAULT_UPDATES = 50
_LEAST_STEPS_BETWEEN_UPDATES = 20


class Pruner:
    """Prunes the least important weights while a training loop of your own runs.

    ```python
    pruner = compress.Pruner(model, sparsity=0.8, steps=1000)
    for x, y in batches:  # 1000 of them
        train_step(x, y)
        pruner.step()
    pruner.finish()
    ```
    A stateless JAX loop hands over the values of `model.trainable_variables` and goes on with what it gets back:
    `trainable = pruner.step(trainable)`, and at the end `trainable = pruner.finish(trainable)`. Any optimizer will
    do. On TensorFlow and PyTorch a Keras optimizer applies the masks inside its update, too, so that several steps
    in one `tf.function` are exact; trace it after the pruner is made. For `fit` there is the callback `Pruning`.

    Args:
        model: a built model.
        sparsity: final fraction of zeros in the selected kernels, at least 0 and less than 1, met exactly. May be
            left out with an N:M pattern, which implies it.
        steps: training steps in all; `step` is called after each.
        schedule: how sparsity grows, in fractions of the training; or a schedule of tfmot, in its steps.
        include: shell patterns over layer or kernel paths (`"encoder/conv*"`).
        exclude: shell patterns over layers or kernels to leave alone.
        score: importance of a weight: `"magnitude"`, `"random"`, `"taylor"`, `"movement"`, or a function
            `ScoreInput -> array`.
        distribution: `"uniform"`: each kernel has this sparsity; `"global"`, `"erk"`, `"lamp"`: all of them together
            have; `"sensitivity"`: so do they, as much as each bears, which is measured first (needs `data`); or
            sparsities by shell pattern.
        pattern: `"unstructured"`, `"2:4"` (n of each m along the inputs stay), or `"4x1"` (whole blocks).
        regrow: lets kept weights change places with pruned ones; needs `data`.
        data: `(x, y)` or other data with labels, from whose first samples gradients are computed; for `"taylor"` and
            `regrow`.
        seed: seed of the score `"random"`.

    Attributes:
        kernels: what is pruned.
        skipped: what is left alone, and why.
        sparsity: the final sparsity.
        current: the sparsity that the masks have now.

    Raises:
        UsageError: an option that makes no sense or does not fit the model or the length of the training; a kernel
            that is frozen, quantized or pruned by someone else.
        PassError: while training, when a weight or gradient became NaN.
    """

    def __init__(
        self,
        model: keras.Model,
        sparsity: float | None = None,
        *,
        steps: int,
        schedule: ScheduleLike | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        score: ScoreLike = "magnitude",
        distribution: DistributionLike = "uniform",
        pattern: str | Pattern = "unstructured",
        regrow: Regrowth | None = None,
        data: Any = None,
        seed: int = 0,
    ):
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
            raise UsageError(f"expected at least one training step. Received: steps={steps!r}")
        options = make_options(sparsity, schedule, include, exclude, score, distribution, pattern, regrow, data, seed)
        self.steps = int(steps)
        self._done = 0
        self._progress = ScheduledMasks(model, options.for_training(self.steps))
        self._progress.require_length(self.steps)
        self._progress.advance(0, self.steps)

    @property
    def kernels(self) -> list[Kernel]:
        """What is pruned."""
        return self._progress.masked.kernels

    @property
    def skipped(self) -> list[Skipped]:
        """What is left alone, and why."""
        return self._progress.masked.skipped

    @property
    def sparsity(self) -> float:
        """The final sparsity."""
        return self._progress.options.sparsity

    @property
    def current(self) -> float:
        """The sparsity that the masks have now."""
        return self._progress.current

    def step(self, trainable: Sequence[Any] | None = None) -> list[Any] | None:
        """Move the masks if the schedule says so, and apply them; call it after each training step.

        Args:
            trainable: in a stateless JAX loop, the values of `model.trainable_variables`; the state of other
                variables, such as moving statistics, is read from the model.

        Returns:
            The values to go on with, or `None` if the weights live in the model's variables.

        Raises:
            UsageError: more steps than were announced.
        """
        self._done += 1
        if self._done > self.steps:
            raise UsageError(
                f"expected at most {self.steps} steps, as announced. Received: step {self._done}",
                "Pass the number of all training steps as steps.",
            )
        return self._with_values(trainable, self._progress.is_due(self._done, self.steps), self._advance)

    def finish(self, trainable: Sequence[Any] | None = None) -> list[Any] | None:
        """Bring the weights to the final sparsity, exactly, and take the masks off; returns as `step` does."""
        return self._with_values(trainable, True, self._progress.finish)

    def remove(self) -> None:
        """Take the masks off; needed only when the training loop raised before `finish`."""
        self._progress.masked.remove()

    def _advance(self) -> None:
        self._progress.advance(self._done, self.steps)
        self._progress.masked.apply()

    def _with_values(
        self, trainable: Sequence[Any] | None, on_host: bool, action: Callable[[], None]
    ) -> list[Any] | None:
        if trainable is None:
            action()
            return None
        if not on_host:
            return self._progress.masked.masked_values(trainable)
        variables = self._progress.masked.model.trainable_variables
        for variable, value in zip(variables, trainable, strict=True):
            variable.assign(value)
        action()
        # Copies: the loop may donate what it gets, and the model keeps its own.
        return [keras.ops.copy(variable) for variable in variables]


class ScheduledMasks:
    """Masks that move along a schedule, told at which step of how many a training is; `Pruning` is built on it.

    Args:
        model: the model that is trained.
        options: what to prune and how.
    """

    def __init__(self, model: keras.Model, options: PruningOptions):
        self._measured = options.distribution == MEASURED
        if self._measured:
            options = replace(options, distribution=_measure(model, options))
        self.options = options
        self.masked = MaskedWeights(model, options)
        self.current = 0.0  # sparsity that the masks were made for
        self._last: float | None = None  # progress at the last look at the schedule
        self._split: Split | None = None
        try:
            if options.data is not None:
                self._split = as_data(options.data).require("train", "computing gradients")
                self.masked.require_gradients(self._split)
        except Exception:
            self.masked.remove()
            raise
        rewind_to = getattr(options.schedule, "rewind_to", None)
        self._rewinding = None if rewind_to is None else Rewinding(model, rewind_to)

    def require_length(self, steps: int) -> None:
        """Raise UsageError if the schedule does not reach the final sparsity in so many steps."""
        schedule, final = self.options.schedule, self.options.sparsity
        reached = schedule.sparsity_at(1.0, final)
        short = isinstance(schedule, IterativeSchedule) and steps <= schedule.rounds
        if short or schedule.end > 1 or not math.isclose(reached, final):
            self.masked.remove()
            what = f"{schedule.rounds} rounds" if short else f"its end at step {schedule.end * steps:g}"
            raise UsageError(
                f"expected a schedule that ends before the training of {steps} steps does. Received: {what}; "
                f"{self.masked.kernels[0].path} would not reach sparsity {final:g}",
                "Train for more steps, or let the schedule end earlier.",
            )

    def is_due(self, step: int, total: int) -> bool:
        """Return whether `advance` would read or change weights."""
        progress = self._snapped(step, total)
        if self._rewinding is not None and self._rewinding.is_due(step / total):
            return True
        return self._target(progress) > self.current or self._regrows(progress) or self._observes(progress)

    def advance(self, step: int, total: int) -> None:
        """Bring the masks to where the schedule is after `step` of `total` steps.

        Updates lie on a grid of steps, whatever happened before: resumed training has the same masks.
        """
        resumed = self._last is None and step > 0
        progress = self._snapped(step, total)
        if resumed:
            self._require_resumable(step)
        if self._rewinding is not None and self._rewinding.is_due(step / total):
            self._rewinding.remember()
        due = self._target(progress) > self.current, self._regrows(progress), self._observes(progress)
        self._last = progress
        if not any(due):
            return
        try:
            self._update(progress, *due)
        except Exception:
            self.masked.remove()
            raise

    def finish(self) -> None:
        """Bring the weights to the final sparsity and give the variables back their own constraints."""
        self.masked.apply()  # an optimizer with a moving average has just overwritten the weights
        if self.current != self.options.sparsity:
            warnings.warn(
                f"training stopped at sparsity {self.current:.3f}, before the schedule reached "
                f"{self.options.sparsity}: the rest is pruned now, without training to recover from it",
                stacklevel=3,
            )
            try:
                self._prune(self.options.sparsity)
            except Exception:
                self.masked.remove()
                raise
        self.masked.clean_zeros()
        self.masked.remove()

    def _update(self, progress: float, prunes: bool, regrows: bool, observes: bool) -> None:
        self.masked.held.sync()
        if prunes:
            self._prune(self._target(progress))
        elif observes:
            self.masked.observe()
        if regrows:
            self.masked.regrow(self.options.regrow.share_at(progress), self._split)
        if prunes and self._rewinding is not None:
            self._rewinding.restore()
            self.masked.apply()
            self.masked.restart()

    def _prune(self, sparsity: float) -> None:
        self.masked.prune(sparsity, self._split)
        self.current = sparsity

    def _target(self, progress: float) -> float:
        return self.options.schedule.sparsity_at(progress, self.options.sparsity)

    def _regrows(self, progress: float) -> bool:
        regrow = self.options.regrow
        moved_on = self._last is not None and progress > self._last
        return regrow is not None and moved_on and self.options.schedule.begin < progress < regrow.end

    def _observes(self, progress: float) -> bool:
        growing = self.options.schedule.begin <= progress < self.options.schedule.end
        return self.options.score.needs_movement and growing and progress != self._last

    def _snapped(self, step: int, total: int) -> float:
        """Return the progress at the last point of the grid."""
        schedule, progress = self.options.schedule, step / total
        end = max(schedule.end, self.options.regrow.end if self.options.regrow else 0.0)
        if schedule.begin <= progress < end:
            first = math.ceil(schedule.begin * total)
            frequency = self._frequency(total, end)
            snapped = (first + (step - first) // frequency * frequency) / total
            # The end of the schedule is a point of the grid wherever it lies.
            return max(snapped, schedule.end) if snapped < schedule.end <= progress else snapped
        return progress

    def _frequency(self, total: int, end: float) -> int:
        if self.options.schedule.frequency is not None:
            return self.options.schedule.frequency
        span = (end - self.options.schedule.begin) * total
        return max(_LEAST_STEPS_BETWEEN_UPDATES, round(span / _DEFAULT_UPDATES))

    def _require_resumable(self, step: int) -> None:
        lost = None
        if self.options.score.needs_movement:
            lost = "how far its weights have moved"
        elif self._rewinding is not None and step > 0:
            lost = "the weights to rewind to"
        elif self._measured:
            lost = "what each kernel bore before it was pruned"
        if lost:
            self.masked.remove()
            raise UsageError(
                f"expected a training from its start: no checkpoint holds {lost}. Received: a start at step {step}",
                "Start anew, or use another score or a schedule without rewinding.",
            )


def _measure(model: keras.Model, options: PruningOptions) -> DistributionLike:
    return resolve_distribution(
        options.distribution,
        student_of(model),
        options.data,
        options.sparsity,
        include=options.include,
        exclude=options.exclude,
        score=options.score,
        pattern=options.pattern,
        seed=options.seed,
    )
