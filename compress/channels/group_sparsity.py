"""Group-sparse training: channels that the loss does not need shrink to zero, so that cutting them costs nothing.

Group lasso (Yuan and Lin 2006) over all weights that a channel takes with it, as in DepGraph (Fang et al. 2023,
arXiv:2301.12900), applied as a proximal step (Combettes and Wajs 2005) beside the optimizer, so that adaptive rates do
not scale it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from compress.channels.atoms import Norm
from compress.channels.groups import find_channel_groups
from compress.channels.selection import select_groups
from compress.errors import UsageError


@dataclass(frozen=True, eq=False)
class _Member:
    """An axis of a weight, and by place the index of the unit, or -1."""

    variable: keras.Variable
    axis: int
    units: np.ndarray


class GroupSparsity(keras.callbacks.Callback):
    """Shrinks whole channels while a model trains, each by the same amount, so that the needless ones die.

    ```python
    model.fit(x, y, epochs=10, callbacks=[GroupSparsity(strength=1.0)])
    narrow = compress.prune_channels(model, 0.5).model
    ```
    A channel is everything that `prune_channels` would remove with it. In every step the length of its weights shrinks
    by `learning_rate * strength` times the mean length in its block when training began, never below zero; a channel
    that the loss needs grows back. Works in anyone's `fit`, on every backend.

    Args:
        strength: how fast channels shrink; with 1 a channel that the loss ignores loses a thousandth of the mean length
            in a step at a learning rate of 0.001.
        include: shell patterns over layer paths; a group shrinks if all layers that make it fit.
        exclude: shell patterns; a group with such a layer is left alone.
        norm: as in `prune_channels`.
        frequency: steps between two applications, each of which makes up for those between.

    Attributes:
        lengths: after training, the lengths of each block's channels by the paths of the layers that make them.

    Raises:
        UsageError: an option that makes no sense, or, when training starts, no group left.
        ModelError: when training starts, the calls of the model are known to Python alone.
    """

    async_safe = True  # nothing waits for the end of a step

    def __init__(
        self,
        strength: float = 1.0,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        norm: Norm = "freeze",
        frequency: int = 10,
    ):
        super().__init__()
        if not 0 <= strength < float("inf") or frequency < 1:
            raise UsageError(
                f"expected a strength of at least 0 and a frequency of at least 1. "
                f"Received: strength={strength}, frequency={frequency}"
            )
        self.strength, self.include, self.exclude = strength, include, exclude
        self.norm, self.frequency = norm, frequency
        self.lengths: dict[tuple[str, ...], list[float]] = {}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find the channels of the model and how long their weights are."""
        groups = find_channel_groups(self.model, norm=self.norm)
        blocks = [block for group in select_groups(groups, self.include, self.exclude) for block in group.blocks]
        index = {int(unit): place for place, unit in enumerate(unit for block in blocks for unit in block.units)}
        self._members = []
        for weight in groups.atoms.weights:
            units = np.array([index.get(unit, -1) for unit in groups.atoms.units(weight.atoms).tolist()])
            if weight.variable.trainable and (units >= 0).any():
                self._members.append(_Member(weight.variable, weight.axis, units))
        self._blocks = [(block.producers, np.array([index[int(unit)] for unit in block.units])) for block in blocks]
        self._count, self._step, self._done = len(index), 0, 0
        lengths = self._measure()
        self._mean = np.zeros(self._count)
        for _, places in self._blocks:
            self._mean[places] = lengths[places].mean()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Shrink what the steps since the last time ask for."""
        if self._step - self._done >= self.frequency:
            self._shrink()
        self._step += max(1, getattr(self.model, "steps_per_execution", 1) or 1)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Shrink for the last steps, and note the lengths."""
        self._shrink()
        lengths = self._measure()
        self.lengths = {producers: lengths[places].tolist() for producers, places in self._blocks}

    def _shrink(self) -> None:
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        amount = rate * self.strength * (self._step - self._done) * self._mean
        self._done = self._step
        lengths = self._measure()
        factors = np.maximum(0.0, 1 - np.divide(amount, lengths, out=np.ones_like(lengths), where=lengths > 0))
        by_variable: dict[int, list[_Member]] = {}
        for member in self._members:
            by_variable.setdefault(id(member.variable), []).append(member)
        for members in by_variable.values():
            values = keras.ops.convert_to_numpy(members[0].variable)
            for member in members:
                factor = np.where(member.units >= 0, factors[member.units], 1.0).astype(values.dtype)
                values = values * factor.reshape([-1 if axis == member.axis else 1 for axis in range(values.ndim)])
            members[0].variable.assign(values)

    def _measure(self) -> np.ndarray:
        """Return the length of the weights of each unit."""
        squares = np.zeros(self._count)
        for member in self._members:
            values = keras.ops.convert_to_numpy(member.variable).astype("float64")
            rows = np.square(np.moveaxis(values, member.axis, 0).reshape(values.shape[member.axis], -1)).sum(axis=1)
            known = member.units >= 0
            np.add.at(squares, member.units[known], rows[known])
        return np.sqrt(squares)
