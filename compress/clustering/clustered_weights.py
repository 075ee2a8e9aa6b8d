"""Clustering at once: each weight of a copy of the model takes the value of the nearest centroid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np

from compress.clustering.centroids import (
    InitialisationName,
    initial_centroids,
    require_clusters,
    require_initialisation,
)
from compress.errors import PassError, UsageError
from compress.models.clusters import Clusters, from_rows, pad_rows, to_rows
from compress.models.copying import copy_model
from compress.models.kernel_layout import find_layouts
from compress.models.selection import select_trainable
from compress.models.walking import Kernel

_REFINEMENTS = 10

Granularity = Literal["per_tensor", "per_channel"]
"""Whether a kernel has one set of centroids, or one for each output channel."""


def cluster_weights(
    model: keras.Model,
    clusters: int,
    *,
    initialisation: InitialisationName = "k-means++",
    granularity: Granularity = "per_tensor",
    keep_zeros: bool = True,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> keras.Model:
    """Return a copy of `model` in which each selected kernel has at most `clusters` distinct values.

    Args:
        model: a built model; it is not changed.
        clusters: the most distinct values of a kernel, zero among them; at least 2.
        initialisation: where the centroids are: `"linear"`, `"density"` or `"k-means++"`.
        granularity: `"per_tensor"`: the values of a kernel; `"per_channel"`: of each of its output channels.
        keep_zeros: in kernels that hold zeros, 0.0 is one of the values, and zeros stay zero.
        include: shell patterns over layer or kernel paths (`"encoder/conv*"`).
        exclude: shell patterns over layers or kernels to leave alone.

    Raises:
        UsageError: an option that makes no sense, a pattern that matches nothing, no kernel selected, a kernel that
            is frozen or quantized, or one with too few clusters for its signs and zeros.
        ModelError: the model cannot be copied.
        PassError: a weight is NaN or infinite.
    """
    require_options(clusters, initialisation, granularity)
    select_trainable(model, include, exclude, verb="cluster")  # complain before the copy is made
    copy = copy_model(model)
    kernels, _ = select_trainable(copy, include, exclude, verb="cluster")
    for kernel, value, axes in zip(kernels, finite_values(kernels), row_axes(copy, kernels, granularity), strict=True):
        found = cluster_array(
            value, clusters, initialisation, axes=axes, zero=keep_zeros and holds_zeros(value), name=kernel.path
        )
        kernel.variable.assign(found.values())
    return copy


def require_options(clusters: int, initialisation: str, granularity: str) -> None:
    """Raise UsageError for an option that makes no sense."""
    require_clusters(clusters)
    require_initialisation(initialisation)
    if granularity not in ("per_tensor", "per_channel"):
        raise UsageError(f"expected granularity per_tensor or per_channel. Received: {granularity!r}")


def cluster_array(
    array: np.ndarray,
    clusters: int,
    initialisation: InitialisationName = "k-means++",
    *,
    axes: Sequence[int] = (),
    zero: bool = False,
    name: str = "weights",
) -> Clusters:
    """Return the clusters of finite weights; a tie between two centroids goes to the lower one.

    Args:
        array: weights of any shape.
        clusters: the most centroids of a row.
        initialisation: where the centroids are.
        axes: the axes whose places have centroids of their own.
        zero: whether 0.0 is one of the centroids.
        name: what messages call the array.

    Raises:
        UsageError: too few clusters for weights of both signs and a zero.
    """
    rows = to_rows(array, axes)
    try:
        centroids = pad_rows([initial_centroids(row, clusters, initialisation, zero=zero) for row in rows], clusters)
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}", error.help) from error
    return Clusters(centroids, from_rows(nearest(rows, centroids), axes, array.shape), tuple(axes))


def nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the index of the nearest of sorted `centroids` `(rows, clusters)` for weights `(rows, n)`."""
    middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
    return np.stack([np.searchsorted(own, row) for own, row in zip(middles, rows, strict=True)])


def refine_clusters(
    array: np.ndarray, centroids: np.ndarray, axes: tuple[int, ...], *, keep_zero: bool = False
) -> Clusters:
    """Return the clusters of finite weights, with centroids that start at sorted `centroids` `(rows, clusters)`.

    A row with no more distinct values than centroids keeps its values.
    """
    rows, found = to_rows(array, axes), []
    for row, own in zip(rows, centroids, strict=True):
        distinct = np.unique(row)
        moved = distinct if len(distinct) <= len(own) else _refine(np.sort(row.astype(np.float64)), own, keep_zero)
        found.append(moved.astype(array.dtype))
    centroids = pad_rows(found, centroids.shape[1])
    return Clusters(centroids, from_rows(nearest(rows, centroids), axes, array.shape), axes)


def _refine(weights: np.ndarray, centroids: np.ndarray, keep_zero: bool) -> np.ndarray:
    for _ in range(_REFINEMENTS):
        edges = np.searchsorted(weights, (centroids[1:] + centroids[:-1]) / 2, side="right")
        groups = np.split(weights, edges)
        moved = [group.mean() if len(group) else old for group, old in zip(groups, centroids, strict=True)]
        centroids = np.sort(np.where(keep_zero & (centroids == 0), 0.0, moved))
    return centroids


def holds_zeros(array: np.ndarray) -> bool:
    """Return whether pruning left zeros to keep; a kernel that is all zeros is new, not pruned."""
    return bool(0 < np.count_nonzero(array) < array.size)


def row_axes(model: keras.Model, kernels: Sequence[Kernel], granularity: str) -> list[tuple[int, ...]]:
    """Return, for each kernel, the axes whose places have centroids of their own."""
    if granularity == "per_tensor":
        return [()] * len(kernels)
    return [layout.outputs for layout in find_layouts(model, [kernel.variable for kernel in kernels])]


def finite_values(kernels: Sequence[Kernel]) -> list[np.ndarray]:
    """Return the weights of `kernels` as float arrays of at least 32 bits.

    Raises:
        PassError: a weight is NaN or infinite.
    """
    values = [keras.ops.convert_to_numpy(keras.ops.cast(kernel.variable, "float32")) for kernel in kernels]
    for kernel, value in zip(kernels, values, strict=True):
        if not np.isfinite(value).all():
            raise PassError(
                f"expected weights that are finite. Received: {'NaN' if np.isnan(value).any() else 'infinity'} "
                f"in {kernel.path}",
                "Training has diverged: lower the learning rate, or start from an earlier checkpoint.",
            )
    return values
