"""The choices that make up a pruning, checked as soon as they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.errors import UsageError
from compress.pruning.distributions import DISTRIBUTIONS, MEASURED, DistributionLike
from compress.pruning.masks import resolve_sparsity
from compress.pruning.patterns import Pattern, parse_pattern
from compress.pruning.schedules import ConstantSchedule, IterativeSchedule, PolynomialSchedule, Regrowth, StepSchedule
from compress.pruning.scores import Score, ScoreLike, find_score
from compress.pruning.tfmot_schedules import adopt_schedule, is_tfmot_schedule

ScheduleLike = ConstantSchedule | PolynomialSchedule | IterativeSchedule | StepSchedule
"""Ours, and those of tfmot, which are in training steps until the length of the training is known."""


@dataclass(frozen=True)
class PruningOptions:
    """What `Pruning` and `Pruner` are told; see there for each option.

    Raises:
        UsageError: an option that makes no sense whatever the model.
    """

    sparsity: float
    schedule: ScheduleLike
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    score: Score
    score_name: str
    distribution: DistributionLike
    pattern: Pattern
    regrow: Regrowth | None
    data: Any
    seed: int

    def __post_init__(self) -> None:
        _require_known(self.distribution)
        if not isinstance(self.schedule, StepSchedule):
            self._check_start()
        wants = "regrow" if self.regrow else f"the score {self.score_name}" if self.score.needs_gradients else None
        if wants and self.data is None:
            raise UsageError(f"{wants} needs data to compute gradients from. Received: data=None", "Pass data=(x, y).")
        if self.distribution == MEASURED and self.data is None:
            raise UsageError(f"the distribution {MEASURED} needs data to measure on. Received: data=None")

    def for_training(self, steps: int) -> PruningOptions:
        """Return the options with a schedule in fractions of a training of so many steps."""
        if not isinstance(self.schedule, StepSchedule):
            return self
        return replace(self, schedule=self.schedule.in_training(steps))

    def _check_start(self) -> None:
        start = self.schedule.sparsity_at(0.0, self.sparsity)
        first = self.schedule.sparsity_at(self.schedule.begin, self.sparsity)
        if max(start, first) > self.sparsity:
            raise UsageError(
                f"expected an initial sparsity of at most the final {self.sparsity}. Received: {max(start, first)}"
            )
        if self.score.needs_movement and start > 0:
            raise UsageError(
                f"the score {self.score_name} needs training before weights are pruned. "
                f"Received: a schedule with sparsity {start:.4g} at the start",
                "Give the schedule a later begin, such as begin=0.1.",
            )


def make_options(
    sparsity: float | None,
    schedule: ScheduleLike | None,
    include: Sequence[str],
    exclude: Sequence[str],
    score: ScoreLike,
    distribution: DistributionLike,
    pattern: str | Pattern,
    regrow: Regrowth | None,
    data: Any,
    seed: int,
) -> PruningOptions:
    """Return the options with names resolved, or raise UsageError."""
    chosen = parse_pattern(pattern)
    if is_tfmot_schedule(schedule):
        schedule = adopt_schedule(schedule)
    if isinstance(schedule, StepSchedule):
        if sparsity is not None and sparsity != schedule.final_sparsity:
            raise UsageError(
                f"expected one final sparsity. Received: sparsity={sparsity}, and {schedule.final_sparsity} in the "
                "schedule",
                "Leave out sparsity.",
            )
        sparsity = schedule.final_sparsity if ":" not in str(pattern) else sparsity
    return PruningOptions(
        sparsity=resolve_sparsity(sparsity, chosen),
        schedule=schedule if schedule is not None else PolynomialSchedule(),
        include=tuple(include),
        exclude=tuple(exclude),
        score=find_score(score),
        score_name=score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__),
        distribution=distribution,
        pattern=chosen,
        regrow=regrow,
        data=data,
        seed=seed,
    )


def _require_known(distribution: DistributionLike) -> None:
    if isinstance(distribution, str) and distribution not in (*DISTRIBUTIONS, MEASURED):
        raise UsageError(
            f"expected distribution to be one of {[*DISTRIBUTIONS, MEASURED]}, or sparsities by pattern. "
            f"Received: {distribution!r}"
        )
