"""How sparsity grows during training, and how many weights change places meanwhile. Times are fractions of it, so a
schedule fits any number of epochs.

Polynomial: Zhu and Gupta 2017, arXiv:1710.01878. Rounds and rewinding: Renda et al. 2020, arXiv:2003.02389; Frankle et
al. 2019, arXiv:1912.05671. Regrowth: Evci et al. 2020 (RigL), arXiv:1911.11134.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from compress.errors import UsageError
from compress.options import Options, Share, parse_fraction

Start = Annotated[float, BeforeValidator(parse_fraction), Field(ge=0, lt=1)]
"""A moment before the end of training, as a fraction of it."""


class ConstantSchedule(Options):
    """The final sparsity at once, then training with the masks as they are.

    There is no frequency: a pruned weight stays at zero, so a second look would choose the same weights.
    """

    type: Literal["constant"] = "constant"
    begin: Start = 0.0
    """When the weights are pruned, as a fraction of the training."""

    @property
    def end(self) -> float:
        """When the final sparsity is reached, as a fraction of the training."""
        return self.begin

    @property
    def frequency(self) -> None:
        """Training steps between mask updates: there is one update only."""
        return None

    def sparsity_at(self, progress: float, final: float) -> float:
        """Return the sparsity at `progress` (0 is the start of training, 1 its end)."""
        return final if progress >= self.begin else 0.0


class PolynomialSchedule(Options):
    """Sparsity that grows fast while many weights are superfluous, and ever slower towards the end.

    `s = final + (initial - final) * (1 - t) ** power`, with `t` from 0 at `begin` to 1 at `end`.
    """

    type: Literal["polynomial"] = "polynomial"
    begin: Start = 0.0
    """When pruning starts, as a fraction of the training."""
    end: Start = 0.7
    """When the final sparsity is reached; the rest of the training recovers accuracy."""
    initial_sparsity: Share = 0.0
    """Sparsity at `begin`."""
    power: Annotated[float, Field(gt=0)] = 3.0
    """Exponent: 1 is linear, 3 the cubic of the paper."""
    frequency: Annotated[int, Field(ge=1)] | None = None
    """Training steps between mask updates. By default about 50 updates, at least 20 steps apart."""

    @model_validator(mode="after")
    def _order(self) -> PolynomialSchedule:
        if self.begin >= self.end:
            raise ValueError(f"expected begin before end. Received: begin={self.begin}, end={self.end}")
        return self

    def sparsity_at(self, progress: float, final: float) -> float:
        """Return the sparsity at `progress` (0 is the start of training, 1 its end)."""
        if progress < self.begin:
            return 0.0
        if progress >= self.end:
            return final
        remaining = (self.end - progress) / (self.end - self.begin)
        return final + (self.initial_sparsity - final) * remaining**self.power


class IterativeSchedule(Options):
    """Rounds of training and pruning: the training has one part more than rounds; all parts but the last end in one.

    Every round prunes the same share of the weights that are left. With `rewind_to`, the weights that stay then return
    to what they were at that early moment, and the next part trains them anew.
    """

    type: Literal["iterative"] = "iterative"
    rounds: Annotated[int, Field(ge=1, le=1000)] = 4
    """How often weights are pruned."""
    rewind_to: Start | None = None
    """A moment before the first round, as a fraction of the training; none means no rewinding."""

    @model_validator(mode="after")
    def _order(self) -> IterativeSchedule:
        if self.rewind_to is not None and self.rewind_to >= self.begin:
            raise ValueError(
                f"expected rewind_to before the first of {self.rounds} rounds at {self.begin:.4g}. "
                f"Received: rewind_to={self.rewind_to}"
            )
        return self

    @property
    def begin(self) -> float:
        """When the first round ends, as a fraction of the training."""
        return 1 / (self.rounds + 1)

    @property
    def end(self) -> float:
        """When the final sparsity is reached, as a fraction of the training."""
        return self.rounds / (self.rounds + 1)

    @property
    def frequency(self) -> int:
        """Training steps between looks at the schedule; masks are updated at the end of a round only."""
        return 1

    def sparsity_at(self, progress: float, final: float) -> float:
        """Return the sparsity at `progress` (0 is the start of training, 1 its end)."""
        rounds = min(self.rounds, math.floor(progress * (self.rounds + 1) + 1e-9))
        return final if rounds == self.rounds else 1 - (1 - final) ** (rounds / self.rounds)


class StepSchedule(Options):
    """Sparsity that grows between two training steps, as tfmot has it, whatever the length of the training."""

    type: Literal["steps"] = "steps"
    final_sparsity: Share
    """Sparsity at the end."""
    initial_sparsity: Share = 0.0
    """Sparsity at `begin_step`."""
    begin_step: Annotated[int, Field(ge=0)] = 0
    """The step at which pruning starts."""
    end_step: Annotated[int, Field(ge=0)]
    """The step at which the final sparsity is reached; `begin_step` for all at once."""
    power: Annotated[float, Field(gt=0)] = 3.0
    """Exponent of the polynomial."""
    frequency: Annotated[int, Field(ge=1)] = 100
    """Training steps between mask updates; the end is one, too."""

    def in_training(self, steps: int) -> ConstantSchedule | PolynomialSchedule:
        """Return the schedule in fractions of a training of so many steps.

        Raises:
            UsageError: the training ends before the schedule does.
        """
        if max(self.begin_step + 1, self.end_step) > steps:
            raise UsageError(
                f"expected a schedule that ends before the training of {steps} steps does. Received: an end at step "
                f"{max(self.begin_step, self.end_step)}",
                "Train for more steps, or let the schedule end earlier.",
            )
        if self.end_step <= self.begin_step:
            return ConstantSchedule(begin=self.begin_step / steps)
        return PolynomialSchedule(
            begin=self.begin_step / steps,
            end=min(self.end_step / steps, math.nextafter(1.0, 0.0)),
            initial_sparsity=self.initial_sparsity,
            power=self.power,
            frequency=self.frequency,
        )


Schedule = Annotated[
    ConstantSchedule | PolynomialSchedule | IterativeSchedule | StepSchedule, Field(discriminator="type")
]
"""Any of the schedules; in YAML, `type` tells which."""


Part = Annotated[float, BeforeValidator(parse_fraction), Field(gt=0, lt=1)]
"""A fraction between 0 and 1, both excluded."""


class Regrowth(Options):
    """How many of the kept weights change places with pruned ones; the sparsity stays as the schedule wants it."""

    fraction: Part = 0.3
    """Share of the kept weights that is dropped, and regrown elsewhere, at the first update."""
    end: Part = 0.75
    """When it has fallen to zero, along half a cosine, as a fraction of the training."""

    def share_at(self, progress: float) -> float:
        """Return the share of the kept weights that change places at `progress` (0 is the start of training)."""
        return self.fraction / 2 * (1 + math.cos(math.pi * min(1.0, progress / self.end)))
