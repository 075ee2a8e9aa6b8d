"""Pruning during `fit`, without wrapper layers: the training step itself applies the masks.

So any checkpoint is sparse; the callback moves the masks as the schedule says. Source of gradual pruning: Zhu and Gupta
2017, arXiv:1710.01878.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from compress.errors import UsageError
from compress.models.walking import Kernel, Skipped
from compress.pruning.distributions import DistributionLike
from compress.pruning.masked_weights import MaskConstraint
from compress.pruning.options import ScheduleLike, make_options
from compress.pruning.patterns import Pattern
from compress.pruning.pruner import ScheduledMasks
from compress.pruning.schedules import Regrowth, StepSchedule
from compress.pruning.scores import ScoreLike
from compress.training.weight_constraints import remove_constraints


class Pruning(keras.callbacks.Callback):
    """Prunes the least important weights while a model trains; afterwards the model is an ordinary one with zeros.

    ```python
    model.fit(x, y, epochs=5, callbacks=[Pruning(sparsity=0.8)])
    ```
    Weights that are zero when training starts stay zero (in a kernel that is not all zeros), so with
    `sparsity=0` the callback does nothing but keep an earlier pruning. Any checkpoint is sparse and plain,
    wherever the checkpoint callback stands. Callbacks that replace the weights, such as `SwapEMAWeights` and
    `EarlyStopping(restore_best_weights=True)`, belong before this one in the list. A constraint of the layer,
    such as `MaxNorm`, is applied first. If `fit` raises, call `remove()` before training without this
    callback. For a training loop of your own there is `Pruner`.

    Args:
        sparsity: final fraction of zeros in the selected kernels, at least 0 and less than 1, met exactly. May be
            left out with an N:M pattern, which implies it.
        schedule: how sparsity grows, in fractions of this training; or a `PolynomialDecay` or `ConstantSparsity` of
            tfmot, in its steps, which says the final sparsity, too.
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
        kernels: what is pruned, from the start of training on.
        skipped: what is left alone, and why.

    Raises:
        UsageError: an option that makes no sense; when training starts: a pattern that matches nothing or does not
            fit a kernel, no kernel selected, a kernel that is frozen, quantized or pruned by another callback, a
            training of unknown length or too short for the schedule.
        PassError: during training, when a weight or gradient became NaN.
    """

    async_safe = True  # on_train_batch_end only counts; otherwise Keras would wait for each step to end

    def __init__(
        self,
        sparsity: float | None = None,
        *,
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
        super().__init__()
        self._options = make_options(
            sparsity, schedule, include, exclude, score, distribution, pattern, regrow, data, seed
        )
        self._masks: ScheduledMasks | None = None
        self.sparsity = self._options.sparsity
        self.schedule = self._options.schedule
        self.kernels: list[Kernel] = []
        self.skipped: list[Skipped] = []

    def set_model(self, model: keras.Model) -> None:
        """Take the model; masks that a training which raised left on it are removed."""
        super().set_model(model)
        # Keras calls this for all callbacks before on_train_begin of any, so masks found here are not in use.
        remove_constraints(model, MaskConstraint)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Select the kernels and put a mask on each; zeros of an earlier pruning stay."""
        params = self.params or {}
        self._epochs: int = params.get("epochs", 1)
        self._steps: int | None = params.get("steps")  # per epoch
        in_steps = isinstance(self.schedule, StepSchedule)
        if self._steps is None and (in_steps or (self._epochs < 2 and self.schedule.end > 0)):
            raise UsageError(
                f"expected a training whose length is known. Received: {self._epochs} epochs of unknown length",
                "Pass steps_per_epoch to fit, "
                + ("or use a schedule of compress." if in_steps else "train longer, or use ConstantSchedule()."),
            )
        self._epoch: int | None = None
        self._batches_seen = 0
        options = self._options.for_training(self._epochs * self._steps) if in_steps else self._options
        self._masks = ScheduledMasks(self.model, options)
        self.kernels, self.skipped = self._masks.masked.kernels, self._masks.masked.skipped
        self._at_once = max(1, getattr(self._masks.masked.model, "steps_per_execution", 1) or 1)
        if self._steps:
            self._masks.require_length(self._epochs * self._steps)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Bring the masks to where the schedule is; after the first epoch its number of steps is known."""
        if self._epoch is not None and self._steps is None:
            self._steps = self._batches_seen
            self._masks.require_length(self._epochs * self._steps)
        self._epoch = epoch
        if self._steps:
            self._masks.advance(epoch * self._steps, self._epochs * self._steps)
        else:
            self._masks.advance(epoch, self._epochs)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Move the masks to where the schedule is once the next steps are done; they start at index `batch`."""
        if self._steps:
            done = min(batch + self._at_once, self._steps)
            self._masks.advance(self._epoch * self._steps + done, self._epochs * self._steps)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count; `batch` is the index of the last batch that was run."""
        self._batches_seen = batch + 1

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Apply the masks to weights that something other than the optimizer has replaced."""
        self._masks.masked.clean_zeros()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Bring the weights to the final sparsity and give the variables back their own constraints."""
        self._masks.finish()

    def remove(self) -> None:
        """Give the variables back the constraints that they had; needed only after a `fit` that raised."""
        if self._masks is not None:
            self._masks.masked.remove()
