"""Gradual magnitude pruning during `fit`, without wrapper layers: each kernel's `constraint` holds its mask.

The compiled training step applies the masks after every optimizer update, so any checkpoint is sparse; the
callback moves the masks as the schedule says. Source: Zhu and Gupta 2017, arXiv:1710.01878.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np

from compress.errors import SetupError, UsageError
from compress.models.walking import Kernel, Skipped, find_kernels
from compress.pruning.magnitude import kernel_values
from compress.pruning.masks import DistributionName, magnitude_masks, require_sparsity
from compress.pruning.schedules import ConstantSchedule, PolynomialSchedule

_DEFAULT_UPDATES = 50
_LEAST_STEPS_BETWEEN_UPDATES = 20


class MaskConstraint(keras.constraints.Constraint):
    """Applies another constraint, if there is one, and then sets the pruned weights to zero.

    The weights are multiplied by the mask, at half the cost of a `where`. That may leave -0.0, which does not
    compress; the callback replaces it by 0.0 at each update and at the end of epochs.

    Args:
        mask: variable of the weights' shape and type; 0 where a weight is pruned, else 1.
        inner: the constraint that the weights had before, or `None`.
    """

    def __init__(self, mask: keras.Variable, inner: Any = None):
        self.mask = mask
        self.inner = inner

    def __call__(self, w: Any) -> Any:
        if self.inner is not None:
            w = self.inner(w)
        return keras.ops.multiply(w, self.mask)


class Pruning(keras.callbacks.Callback):
    """Prunes the smallest weights while a model trains; afterwards the model is an ordinary one with zeros.

    ```python
    model.fit(x, y, epochs=5, callbacks=[Pruning(sparsity=0.8)])
    ```
    Weights that are zero when training starts stay zero (in a kernel that is not all zeros), so with
    `sparsity=0` the callback does nothing but keep an earlier pruning. Any checkpoint is sparse and plain,
    wherever the checkpoint callback stands. Callbacks that replace the weights, such as `SwapEMAWeights` and
    `EarlyStopping(restore_best_weights=True)`, belong before this one in the list. A constraint of the layer,
    such as `MaxNorm`, is applied first. If `fit` raises, call `remove()` before training without this
    callback. In a training loop of your own call the callback's methods as `fit` does, after
    `set_params({"epochs": ..., "steps": ...})`.

    Args:
        sparsity: final fraction of zeros in the selected kernels, at least 0 and less than 1, met exactly.
        schedule: how sparsity grows, in fractions of this training.
        include: shell patterns over layer or kernel paths (`"encoder/conv*"`).
        exclude: shell patterns over layers or kernels to leave alone.
        distribution: `"uniform"`: each kernel has this sparsity; `"global"`: all selected kernels together.

    Attributes:
        kernels: what is pruned, from the start of training on.
        skipped: what is left alone, and why.

    Raises:
        UsageError: sparsity out of range; when training starts: a pattern that matches nothing, no kernel
            selected, a kernel that another callback prunes, or a training of unknown length.
        SetupError: when training starts on a backend other than TensorFlow or PyTorch.
        PassError: during training, when a weight became NaN.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        schedule: ConstantSchedule | PolynomialSchedule | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        distribution: DistributionName = "uniform",
    ):
        super().__init__()
        require_sparsity(sparsity)
        self.sparsity = sparsity
        self.schedule = schedule if schedule is not None else PolynomialSchedule()
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.distribution: DistributionName = distribution
        self.kernels: list[Kernel] = []
        self.skipped: list[Skipped] = []
        start = self.schedule.sparsity_at(self.schedule.begin, sparsity)
        if start > sparsity:
            raise UsageError(f"expected an initial sparsity of at most the final {sparsity}. Received: {start}")
        magnitude_masks([np.zeros(1)], sparsity, distribution)  # complain about the distribution now

    def set_model(self, model: keras.Model) -> None:
        """Take the model; masks that a training which raised left on it are removed."""
        super().set_model(model)
        # Keras calls this for all callbacks before on_train_begin of any, so masks found here are not in use.
        _remove_masks(model, model.variables)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Select the kernels and put a mask into the constraint of each; zeros of an earlier pruning stay."""
        _require_backend()
        params = self.params or {}
        self._epochs: int = params.get("epochs", 1)
        self._steps: int | None = params.get("steps")  # per epoch
        if self._steps is None and self._epochs < 2 and self.schedule.end > 0:
            raise UsageError(
                "expected a training whose length is known. Received: 1 epoch of unknown length",
                "Pass steps_per_epoch to fit, train for two epochs or more, or use ConstantSchedule().",
            )
        self._epoch: int | None = None
        self._batches_seen = 0
        self._current = 0.0  # sparsity that the masks were made for
        self.kernels, self.skipped = find_kernels(self.model, self.include, self.exclude)
        self._kept = [_not_zero(value) for value in kernel_values(self.kernels)]
        _install_masks(self.model, self.kernels, self._kept)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Bring the masks to where the schedule is; after the first epoch its number of steps is known."""
        if self._epoch is not None and self._steps is None:
            self._steps = self._batches_seen
        self._epoch = epoch
        if self._steps:
            self._advance(epoch * self._steps, self._epochs * self._steps)
        else:
            self._advance(epoch, self._epochs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Move the masks if the schedule says so; `batch` is the index of the last batch that was run."""
        self._batches_seen = batch + 1
        if self._steps:
            # With steps_per_execution, batch + 1 overshoots at the end of an epoch.
            self._advance(self._epoch * self._steps + min(batch + 1, self._steps), self._epochs * self._steps)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Apply the masks to weights that something other than the optimizer has replaced."""
        self._apply()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Bring the weights to the final sparsity and give the variables back their own constraints."""
        self._apply()  # an optimizer with a moving average has just overwritten the weights
        if self._current != self.sparsity:
            warnings.warn(
                f"training stopped at sparsity {self._current:.3f}, before the schedule reached "
                f"{self.sparsity}: the rest is pruned now, without training to recover from it",
                stacklevel=2,
            )
            self._prune(self.sparsity)
        self.remove()

    def remove(self) -> None:
        """Give the variables back the constraints that they had; needed only after a `fit` that raised."""
        if self.model is not None:
            _remove_masks(self.model, [kernel.variable for kernel in self.kernels])

    def _advance(self, step: int, total: int) -> None:
        """Prune further if the schedule asks for it after `step` of `total` steps.

        Updates lie on a grid of steps, whatever happened before: resumed training has the same masks.
        """
        schedule, progress = self.schedule, step / total
        if schedule.begin <= progress < schedule.end:
            first = math.ceil(schedule.begin * total)
            progress = (first + (step - first) // self._frequency(total) * self._frequency(total)) / total
        target = schedule.sparsity_at(progress, self.sparsity)
        if target > self._current:
            self._prune(target)

    def _frequency(self, total: int) -> int:
        if self.schedule.frequency is not None:
            return self.schedule.frequency
        span = (self.schedule.end - self.schedule.begin) * total
        return max(_LEAST_STEPS_BETWEEN_UPDATES, round(span / _DEFAULT_UPDATES))

    def _prune(self, sparsity: float) -> None:
        """Choose new masks from the weights as they are and apply them at once."""
        try:
            values = kernel_values(self.kernels)
            masks = magnitude_masks(values, sparsity, self.distribution)
        except Exception:
            self.remove()
            raise
        for kernel, value, mask, kept in zip(self.kernels, values, masks, self._kept, strict=True):
            alive = (mask & kept).astype(value.dtype)
            kernel.variable.constraint.mask.assign(alive)
            kernel.variable.assign(np.where(alive, value, np.zeros_like(alive)))
        self._current = sparsity

    def _apply(self) -> None:
        """Set the pruned weights to 0.0, whoever has changed them."""
        for kernel in self.kernels:
            mask, weights = kernel.variable.constraint.mask, keras.ops.convert_to_tensor(kernel.variable)
            kernel.variable.assign(keras.ops.where(mask > 0, weights, keras.ops.zeros_like(weights)))


def _require_backend() -> None:
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "torch"):
        # A jitted JAX step captures the mask as a constant: it would train with the first mask for ever.
        raise SetupError(
            "expected Keras on TensorFlow or PyTorch: there is no pruning during training on the "
            f"{backend.upper()} backend. Received: backend={backend!r}",
            "Set KERAS_BACKEND=tensorflow, or prune without training with prune_weights().",
        )


def _not_zero(value: np.ndarray) -> np.ndarray:
    """Return a mask of the weights that may be other than zero; an all-zero kernel is new, not pruned."""
    return value != 0 if np.any(value) else np.ones(value.shape, bool)


def _install_masks(model: keras.Model, kernels: Sequence[Kernel], masks: Sequence[np.ndarray]) -> None:
    for kernel in kernels:
        if isinstance(kernel.variable.constraint, MaskConstraint):
            raise UsageError(
                f"expected one Pruning callback per kernel. Received: {kernel.path} is pruned by two of them",
                "Separate them with include and exclude.",
            )
    strategy = getattr(model, "distribute_strategy", None)  # TensorFlow: a mask lives where its weights do
    with nullcontext() if strategy is None else strategy.scope():
        for kernel, mask in zip(kernels, masks, strict=True):
            variable = keras.Variable(
                mask.astype(np.uint8), dtype=kernel.variable.dtype, trainable=False, name="pruning_mask"
            )
            kernel.variable.constraint = MaskConstraint(variable, kernel.variable.constraint)
    _forget_train_step(model)


def _remove_masks(model: keras.Model, variables: Sequence[keras.Variable]) -> None:
    masked = [variable for variable in variables if isinstance(variable.constraint, MaskConstraint)]
    for variable in masked:
        variable.constraint = variable.constraint.inner
    if masked:
        _forget_train_step(model)


def _forget_train_step(model: keras.Model) -> None:
    """Have the training step compiled anew: a compiled one keeps the constraints of that time."""
    model.make_train_function(force=True)
