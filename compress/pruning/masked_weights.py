"""The kernels of a model that are pruned while it trains, each with a mask that every training step applies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from compress.data.split import Split
from compress.errors import DataError, UsageError
from compress.models.gradients import LossGradients, mean_gradients
from compress.models.walking import Kernel
from compress.pruning.masks import make_masks, require_plan
from compress.pruning.options import PruningOptions
from compress.pruning.regrowth import regrow_mask
from compress.pruning.scores import Movement
from compress.pruning.selection import kernel_values, select_kernels
from compress.training.distiller import student_of
from compress.training.weight_constraints import HeldWeights, WeightConstraint, find_constraint


class MaskConstraint(WeightConstraint):
    """Applies another constraint, if there is one, and then sets the pruned weights to zero.

    The weights are multiplied by the mask, at half the cost of a `where`. That may leave -0.0, which does not
    compress; it is replaced by 0.0 whenever the masks move and at the end.

    Args:
        mask: variable of the weights' shape and type; 0 where a weight is pruned, else 1.
        inner: the constraint that the weights had before, or `None`.
    """

    def __init__(self, mask: keras.Variable, inner: Any = None):
        super().__init__(inner)
        self.mask = mask

    def project(self, w: Any) -> Any:
        """Return `w` with zeros where the mask is 0."""
        return keras.ops.multiply(w, self.mask.value)


class MaskedWeights:
    """The selected kernels of `model`, with masks that keep zeros of an earlier pruning where they are.

    Args:
        model: the model that is trained.
        options: what to prune and how.

    Attributes:
        kernels: what is pruned.
        skipped: what is left alone, and why.
        held: the constraints that hold the masks.

    Raises:
        UsageError: the options do not fit the model, or a kernel is pruned by someone else.
    """

    def __init__(self, model: keras.Model, options: PruningOptions):
        self.model = model
        self._options = options
        self.kernels, self._layouts, self.skipped = select_kernels(
            student_of(model), options.include, options.exclude, allow_quantized=options.sparsity == 0
        )
        require_plan(
            self.kernels, self._layouts, options.sparsity, options.distribution, options.pattern, options.score
        )
        _require_free(self.kernels)
        values = kernel_values(self.kernels)
        self._kept = [_not_zero(value) for value in values]
        self._movement = Movement(values) if options.score.needs_movement else None
        self._gradients: LossGradients | None = None
        self._multiply: Callable[..., list[Any]] | None = None
        self.held = HeldWeights(model)
        self._masks = [
            self.held.new_state(kernel.variable, kept.astype(np.uint8), "pruning_mask")
            for kernel, kept in zip(self.kernels, self._kept, strict=True)
        ]
        for kernel, mask in zip(self.kernels, self._masks, strict=True):
            self.held.install(kernel.variable, lambda inner, mask=mask: MaskConstraint(mask, inner))

    def require_gradients(self, split: Split) -> None:
        """Prepare for gradients of the model's loss, or raise if there are none to be had."""
        if not (self._options.regrow or self._options.score.needs_gradients):
            return
        self._gradients = LossGradients(self.model, [kernel.variable for kernel in self.kernels])
        if not split.has_labels:
            raise DataError(f"gradients need labels. Received: split {split.name!r} without labels", "Pass (x, y).")

    def prune(self, sparsity: float, split: Split | None) -> None:
        """Choose new masks from the weights as they are, and apply them at once."""
        options = self._options
        values = kernel_values(self.kernels)
        self._observe(values)
        masks = make_masks(
            values,
            sparsity,
            final=options.sparsity,
            paths=[kernel.path for kernel in self.kernels],
            layouts=self._layouts,
            score=options.score,
            distribution=options.distribution,
            pattern=options.pattern,
            gradients=mean_gradients(self._gradients, split) if options.score.needs_gradients else None,
            movement=self._movement.read() if self._movement else None,
            seed=options.seed,
        )
        self._set(values, [mask & kept for mask, kept in zip(masks, self._kept, strict=True)])

    def regrow(self, share: float, split: Split) -> None:
        """Let a share of the kept weights change places with pruned ones that have the greatest gradients."""
        values = kernel_values(self.kernels)
        gradients = mean_gradients(self._gradients, split)
        moved = [
            regrow_mask(value, gradient, _to_bool(mask), share, self._options.pattern, layout)
            for value, gradient, mask, layout in zip(values, gradients, self._masks, self._layouts, strict=True)
        ]
        self._kept = [kept | mask for kept, mask in zip(self._kept, moved, strict=True)]
        self._set(values, moved)

    def observe(self) -> None:
        """See how far the weights have moved, for the score that asks."""
        self._observe(kernel_values(self.kernels))
        self.restart()

    def restart(self) -> None:
        """Take the weights as they are for where movement goes on from."""
        if self._movement is not None:
            self._movement.restart(kernel_values(self.kernels))

    def apply(self) -> None:
        """Set the pruned weights to zero, whoever has changed them."""
        for kernel, mask in zip(self.kernels, self._masks, strict=True):
            kernel.variable.assign(keras.ops.multiply(keras.ops.convert_to_tensor(kernel.variable), mask.value))

    def masked_values(self, trainable: Sequence[Any]) -> list[Any]:
        """Return the values of the trainable variables with zeros where the masks are 0; JAX compiles it once."""
        if self._multiply is None:
            self._multiply = _compiled(self._multiplied)
        places = {id(variable): i for i, variable in enumerate(self.model.trainable_variables)}
        chosen = [places[id(kernel.variable)] for kernel in self.kernels]
        result = list(trainable)
        masked = self._multiply([result[i] for i in chosen], [mask.value for mask in self._masks])
        for i, value in zip(chosen, masked, strict=True):
            result[i] = value
        return result

    def clean_zeros(self) -> None:
        """Make every pruned weight 0.0 rather than -0.0, which does not compress."""
        for kernel, mask in zip(self.kernels, self._masks, strict=True):
            weights = keras.ops.convert_to_tensor(kernel.variable)
            kernel.variable.assign(keras.ops.where(mask.value > 0, weights, keras.ops.zeros_like(weights)))

    def remove(self) -> None:
        """Give the variables back the constraints that they had."""
        self.held.remove()

    def _observe(self, values: Sequence[np.ndarray]) -> None:
        if self._movement is not None:
            self._movement.update(values)

    def _set(self, values: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> None:
        pruned = []
        for kernel, variable, value, mask in zip(self.kernels, self._masks, values, masks, strict=True):
            pruned.append(np.where(mask, value, np.zeros((), value.dtype)))
            variable.assign(mask.astype(value.dtype))
            kernel.variable.assign(pruned[-1])
        if self._movement is not None:
            self._movement.restart(pruned)

    @staticmethod
    def _multiplied(values: list[Any], masks: list[Any]) -> list[Any]:
        return [keras.ops.multiply(value, mask) for value, mask in zip(values, masks, strict=True)]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)


def _require_free(kernels: Sequence[Kernel]) -> None:
    for kernel in kernels:
        if find_constraint(kernel.variable, MaskConstraint) is not None:
            raise UsageError(
                f"expected one Pruning callback per kernel. Received: {kernel.path} is pruned by two of them",
                "Separate them with include and exclude.",
            )


def _not_zero(value: np.ndarray) -> np.ndarray:
    """Return a mask of the weights that may be other than zero; an all-zero kernel is new, not pruned."""
    return value != 0 if np.any(value) else np.ones(value.shape, bool)


def _to_bool(mask: keras.Variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(mask) != 0
