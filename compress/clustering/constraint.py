"""The constraint that keeps a kernel clustered while it trains, with its centroids trained along.

After each update of the optimizer the weights move on in full precision behind the scenes, each centroid moves by the
updates of its members, and every so often the members are assigned to the nearest centroid anew. So the gradients of a
cluster are aggregated as the optimizer has scaled them (Han 2016, arXiv:1510.00149, sums them under plain SGD), the
weights get straight-through gradients (Bengio 2013, arXiv:1308.3432), and the kernel itself always is clustered.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from compress.clustering.clustered_weights import refine_clusters
from compress.models.clusters import Clusters, from_rows
from compress.training.weight_constraints import HeldWeights, WeightConstraint

_GATHERING = 0.75
"""A cluster of n members moves by the sum of their updates over n to this power.

1 would be their mean, in which the updates of a large cluster cancel out and its centroid hardly learns; 0, the sum,
diverges with optimizers that scale each weight's update. In between centroids learn about as fast as weights do.
"""


class ClusterConstraint(WeightConstraint):
    """Brings weights back to one value per cluster after each update.

    Args:
        held: keeps the tensors.
        variable: the kernel, which holds the values of `clusters` when training starts.
        clusters: its clusters.
        latent: the kernel before it was clustered, of its shape; what the assignments are made from.
        keep_zeros: whether 0.0 stays one of the centroids and weights that are zero now stay zero, or become so by
            the constraint `inner`.
        reassign_every: steps from one reassignment to the next; 0 leaves each weight in its cluster.
        unit: what the kernel is divided by before its weights share values, such as the factors of its channels where
            batch norm is folded into them; broadcasts against it. Clusters and `latent` are of the quotient.
        inner: the constraint that the weights had before, or `None`.
    """

    def __init__(
        self,
        held: HeldWeights,
        variable: keras.Variable,
        clusters: Clusters,
        latent: np.ndarray,
        *,
        keep_zeros: bool,
        reassign_every: int,
        unit: np.ndarray | None = None,
        inner: Any = None,
    ):
        super().__init__(inner)
        rows, width = clusters.centroids.shape
        self._rows, self._width, self._axes, self._every = rows, width, clusters.axes, reassign_every
        shape = clusters.assignment.shape
        self._unit = None if unit is None else np.asarray(unit, "float32")
        # A weight counts by the square of its unit, so that centroids have the least error in the kernel itself.
        self._weight = None if unit is None else _mean_one(np.square(unit, dtype="float64"), shape)
        own = {axis % len(shape) for axis in clusters.axes}
        places = [size if axis in own else 1 for axis, size in enumerate(shape)]
        row = from_rows(np.arange(rows)[:, None], clusters.axes, places)
        self._first = (row * width).astype("int32")  # where the centroids of each weight begin
        assignment = self._first + clusters.assignment
        values = clusters.values().astype("float32")
        zero = (values == 0) if keep_zeros else np.zeros(shape, bool)
        self._keep_zeros = keep_zeros
        latent = np.where(zero, 0, latent)

        def new_state(value: Any, name: str, dtype: str = "float32") -> keras.Variable:
            return held.new_state(variable, value, f"cluster_{name}", dtype)

        counts = self._counts_of(assignment)
        self.centroids = new_state(clusters.centroids.reshape(-1), "centroids")
        self.assignment = new_state(assignment, "assignment", "int32")
        self._latent = new_state(latent, "latent")
        self._values = new_state(values, "values")
        self._counts = new_state(counts, "counts")
        self._alive = new_state(~zero, "alive") if zero.any() else None
        self._steps = new_state(0, "steps", "int32") if reassign_every > 1 else None

    def project(self, w: Any) -> Any:
        """Return clustered weights; `w` is the tensor that the optimizer and the inner constraint left."""
        dtype = keras.backend.standardize_dtype(w.dtype)
        w = self._divided(ops.cast(w, "float32"))
        update = w - self._values.value
        latent = self._latent.value + update
        if self._alive is not None:
            latent = latent * self._alive.value
        if self._keep_zeros and self.inner is not None:
            latent = ops.where(w == 0, ops.zeros_like(w), latent)  # the inner constraint has pruned it
        centroids = self._moved(update)
        assignment, counts = self.assignment.value, self._counts.value
        if self._every == 1:
            centroids, assignment, counts = self._reassigned(centroids, latent)
        elif self._every:
            step = self._steps.value + 1
            self._steps.assign(step)
            centroids, assignment, counts = ops.cond(
                step % self._every == 0,
                lambda: self._reassigned(centroids, latent),
                lambda: (centroids, assignment, counts),
            )
        values = ops.cast(self._multiplied(ops.take(centroids, assignment)), dtype)
        self.centroids.assign(centroids)
        self._latent.assign(latent)
        self._values.assign(self._divided(ops.cast(values, "float32")))
        if self._every:
            self.assignment.assign(assignment)
            self._counts.assign(counts)
        return values

    def restore(self, variable: keras.Variable) -> None:
        """Cluster `variable` anew if something other than the training step has replaced its weights."""
        current = ops.convert_to_numpy(ops.cast(variable, "float32"))
        expected = ops.cast(self._multiplied(ops.take(self.centroids.value, self.assignment.value)), variable.dtype)
        if np.array_equal(current, ops.convert_to_numpy(ops.cast(expected, "float32"))):
            return
        if not np.isfinite(current).all():
            return  # training has diverged; whoever stops it says so
        if self._alive is not None:
            current = current * ops.convert_to_numpy(self._alive)
        current = self._divided(current)
        rows = ops.convert_to_numpy(self.centroids).reshape(self._rows, self._width)
        found = refine_clusters(current, rows, self._axes, keep_zero=self._keep_zeros)
        values = found.values()
        variable.assign(self._multiplied(values))
        assignment = self._first + found.assignment
        self.centroids.assign(found.centroids.reshape(-1))
        self.assignment.assign(assignment)
        self._counts.assign(self._counts_of(assignment))
        self._latent.assign(current)
        self._values.assign(self._divided(ops.convert_to_numpy(ops.cast(variable, "float32"))))

    def _moved(self, update: Any) -> Any:
        """Return the centroids, moved by the updates of their members; zero and those without members stay."""
        old, counts = self.centroids.value, self._counts.value
        sums = self._sum_by_cluster(update, self.assignment.value)
        moved = old + sums / ops.power(ops.where(counts > 0, counts, 1.0), _GATHERING)
        return ops.where(old == 0, ops.zeros_like(old), moved) if self._keep_zeros else moved

    def _reassigned(self, centroids: Any, latent: Any) -> tuple[Any, Any, Any]:
        """Return sorted centroids, and to which of them each weight is nearest; a tie goes to the lower one."""
        centroids = ops.sort(ops.reshape(centroids, (self._rows, self._width)), axis=1)
        depth = max(1, (self._width - 1).bit_length())
        middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
        middles = ops.pad(middles, ((0, 0), (0, 2**depth - self._width)), constant_values=np.float32(np.inf))
        middles = ops.reshape(middles, (-1,))
        first = ops.convert_to_tensor(self._first // self._width * (2**depth - 1))
        found = ops.zeros(latent.shape, "int32")
        for bit in reversed(range(depth)):  # binary search: how many middles of its row lie below a weight
            probe = found + 2**bit
            found = ops.where(latent > ops.take(middles, first + probe - 1), probe, found)
        assignment = ops.convert_to_tensor(self._first) + found
        counts = self._sum_by_cluster(ops.ones_like(latent), assignment)
        return ops.reshape(centroids, (-1,)), assignment, counts

    def _divided(self, w: Any) -> Any:
        return w if self._unit is None else w / self._unit

    def _multiplied(self, values: Any) -> Any:
        return values if self._unit is None else values * self._unit

    def _counts_of(self, assignment: np.ndarray) -> np.ndarray:
        """Return how much the members of each cluster weigh; without a unit, how many there are."""
        weight = None if self._weight is None else np.broadcast_to(self._weight, assignment.shape).reshape(-1)
        return np.bincount(assignment.reshape(-1), weight, minlength=self._rows * self._width)

    def _sum_by_cluster(self, values: Any, assignment: Any) -> Any:
        values = values if self._weight is None else values * self._weight
        flat, clusters = ops.reshape(values, (-1,)), ops.reshape(assignment, (-1,))
        return ops.segment_sum(flat, clusters, num_segments=self._rows * self._width)


def _mean_one(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return `weight`, which broadcasts against `shape`, scaled to a mean of 1 there."""
    return (weight / np.broadcast_to(weight, shape).mean()).astype("float32")
