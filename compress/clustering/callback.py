"""Clustering during `fit`, without wrapper layers: the training step itself brings each weight back to its centroid.

So any checkpoint is plain and clustered. Sources: Han 2016, arXiv:1510.00149 (trained centroids); Bengio 2013,
arXiv:1308.3432 (straight-through gradients, by which weights change their cluster).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from compress.clustering.centroids import InitialisationName
from compress.clustering.clustered_weights import (
    Granularity,
    cluster_array,
    finite_values,
    holds_zeros,
    require_options,
    row_axes,
)
from compress.clustering.constraint import ClusterConstraint
from compress.errors import UsageError
from compress.models.clusters import Clusters, find_clusters, merge_values, with_zero
from compress.models.patterns import matches
from compress.models.selection import select_trainable
from compress.models.walking import Kernel, Skipped, list_kernels
from compress.training.distiller import student_of
from compress.training.weight_constraints import HeldWeights, WeightConstraint, find_constraint, remove_constraints

UnitOf = Callable[[keras.Variable], np.ndarray | None]


class Clustering(keras.callbacks.Callback):
    """Shares a few values among the weights of each kernel while a model trains; the values are trained along.

    ```python
    model.fit(x, y, epochs=2, callbacks=[Clustering(16)])
    ```
    Afterwards the model is an ordinary one with few distinct weights, and so is any checkpoint. Callbacks that
    replace the weights, such as `SwapEMAWeights` and `EarlyStopping(restore_best_weights=True)`, belong before this one
    in the list; `Pruning` does, too. A constraint of the layer, such as `MaxNorm`, is applied first. If `fit` raises,
    call `remove()` before training without this callback.

    Args:
        clusters: the most distinct values of a kernel, zero among them; at least 2. `None` keeps the clusters that an
            earlier clustering has left in the model, and trains their values; kernels without are left alone.
        initialisation: where the centroids start: `"linear"`, `"density"` or `"k-means++"`.
        granularity: `"per_tensor"`: the values of a kernel; `"per_channel"`: of each of its output channels.
        keep_zeros: in kernels that hold zeros, 0.0 is one of the values, and zeros stay zero.
        include: shell patterns over layer or kernel paths (`"encoder/conv*"`).
        exclude: shell patterns over layers or kernels to leave alone.
        reassign_every: steps from one reassignment of the weights to the nearest values to the next; 0 leaves each
            weight in its cluster.
        unit_of: `unit_of(variable)` returns what a kernel is divided by before its weights share values, or `None`;
            with `clusters=None`.

    Attributes:
        kernels: what is clustered, from the start of training on.
        skipped: what is left alone, and why.

    Raises:
        UsageError: an option that makes no sense; when training starts: a pattern that matches nothing, no kernel
            selected, a kernel that is frozen, quantized or clustered by another callback, or one with too few clusters
            for its signs and zeros.
        PassError: a weight is NaN or infinite when training starts or ends.
    """

    async_safe = True  # nothing happens between steps

    def __init__(
        self,
        clusters: int | None,
        *,
        initialisation: InitialisationName = "k-means++",
        granularity: Granularity = "per_tensor",
        keep_zeros: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        reassign_every: int = 10,
        unit_of: UnitOf | None = None,
    ):
        super().__init__()
        require_options(2 if clusters is None else clusters, initialisation, granularity)
        if isinstance(reassign_every, bool) or not isinstance(reassign_every, int) or reassign_every < 0:
            raise UsageError(f"expected a number of steps, 0 or more. Received: reassign_every={reassign_every!r}")
        self.clusters = clusters
        self.initialisation: InitialisationName = initialisation
        self.granularity: Granularity = granularity
        self.keep_zeros = keep_zeros
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.reassign_every = reassign_every
        self._unit_of = unit_of or _no_unit
        self.kernels: list[Kernel] = []
        self.skipped: list[Skipped] = []
        self._held: HeldWeights | None = None
        self._constraints: list[ClusterConstraint] = []

    def set_model(self, model: keras.Model) -> None:
        """Take the model; constraints that a training which raised left on it are removed."""
        super().set_model(model)
        # Keras calls this for all callbacks before on_train_begin of any, so constraints found here are not in use.
        remove_constraints(model, ClusterConstraint)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Select the kernels, cluster them, and have the training step keep them clustered."""
        model = student_of(self.model)
        kernels, self.skipped = select_trainable(
            model, self.include, self.exclude, allow_quantized=self.clusters is None, verb="cluster"
        )
        _require_free(kernels)
        values, axes = finite_values(kernels), row_axes(model, kernels, self.granularity)
        found = [self._find(*each) for each in zip(kernels, values, axes, strict=True)]
        self.kernels = [kernel for kernel, clusters in zip(kernels, found, strict=True) if clusters is not None]
        self.skipped += [
            Skipped(k.path, "not clustered") for k, each in zip(kernels, found, strict=True) if each is None
        ]
        self._held = HeldWeights(self.model)
        self._constraints = []
        for kernel, value, clusters in zip(kernels, values, found, strict=True):
            if clusters is not None:
                self._install(kernel, value, clusters)

    def _find(self, kernel: Kernel, value: np.ndarray, axes: tuple[int, ...]) -> Clusters | None:
        if self.clusters is None:
            found = _clusters_of(value, axes, self._unit_of(kernel.variable))
            # What another technique prunes meanwhile needs a value to go to.
            return found if found is None or not self._keeps_zeros(kernel, value) else with_zero(found)
        zero = self._keeps_zeros(kernel, value)
        return cluster_array(value, self.clusters, self.initialisation, axes=axes, zero=zero, name=kernel.path)

    def _keeps_zeros(self, kernel: Kernel, value: np.ndarray) -> bool:
        """Return whether a kernel holds zeros to keep, or is going to: another technique may be pruning it."""
        return self.keep_zeros and (holds_zeros(value) or isinstance(kernel.variable.constraint, WeightConstraint))

    def _install(self, kernel: Kernel, value: np.ndarray, clusters: Clusters) -> None:
        unit = self._unit_of(kernel.variable) if self.clusters is None else None
        factor = 1.0 if unit is None else unit
        value = value / factor
        kernel.variable.assign(clusters.values() * factor)

        def make(inner: Any) -> ClusterConstraint:
            zeros = self._keeps_zeros(kernel, value)
            return ClusterConstraint(
                self._held, kernel.variable, clusters, value, keep_zeros=zeros,
                reassign_every=self.reassign_every, unit=unit, inner=inner,
            )  # fmt: skip

        self._held.install(kernel.variable, make)
        self._constraints.append(find_constraint(kernel.variable, ClusterConstraint))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Cluster weights that something other than the optimizer has replaced."""
        self._held.sync()
        self._restore()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Leave every kernel clustered and give the variables back their own constraints."""
        self._restore()  # an optimizer with a moving average has just overwritten the weights
        self.remove()
        finite_values(self.kernels)

    def remove(self) -> None:
        """Give the variables back the constraints that they had; needed only after a `fit` that raised."""
        if self._held is not None:
            self._held.remove()

    def _restore(self) -> None:
        for kernel, constraint in zip(self.kernels, self._constraints, strict=True):
            constraint.restore(kernel.variable)


def has_clusters(model: keras.Model, unit_of: UnitOf | None = None, exclude: Sequence[str] = ()) -> bool:
    """Return whether a trainable kernel of `model` is clustered, per tensor or per output channel.

    Args:
        model: a built model.
        unit_of: `unit_of(variable)` returns what a kernel is divided by first, or `None`.
        exclude: shell patterns over layers or kernels that do not count.
    """
    kernels = [each for each in list_kernels(model, trainable=True) if not matches(each.path, exclude)]
    axes = row_axes(model, kernels, "per_channel")
    return any(
        _clusters_of(keras.ops.convert_to_numpy(kernel.variable), own, (unit_of or _no_unit)(kernel.variable))
        is not None
        for kernel, own in zip(kernels, axes, strict=True)
    )


def _no_unit(variable: keras.Variable) -> None:
    return None


def _clusters_of(value: np.ndarray, axes: tuple[int, ...], unit: np.ndarray | None) -> Clusters | None:
    return find_clusters(value if unit is None else merge_values(value / unit), axes)


def _require_free(kernels: Sequence[Kernel]) -> None:
    for kernel in kernels:
        if find_constraint(kernel.variable, ClusterConstraint) is not None:
            raise UsageError(
                f"expected one Clustering callback per kernel. Received: {kernel.path} is clustered by two of them",
                "Separate them with include and exclude.",
            )
