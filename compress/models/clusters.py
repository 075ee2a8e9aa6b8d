"""Clusters of weights: how many distinct values a kernel holds, and which weights share one.

A clustered kernel is a plain array with few distinct values; nothing but its values says so. Imports NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDING = 5e-5  # what a scale of 16 significant bits may be off, and more

MOST_CLUSTERS = 256
"""A kernel with more distinct values than this is not taken for a clustered one."""


@dataclass(frozen=True)
class Clusters:
    """Which weights of a kernel share a value.

    Args:
        centroids: the shared values `(rows, clusters)`, sorted; a row with fewer values repeats its last one.
        assignment: the index of each weight's centroid, of the kernel's shape.
        axes: the axes of the kernel that have centroids of their own, one row for each place along them; empty
            where the whole kernel shares one row.
    """

    centroids: np.ndarray
    assignment: np.ndarray
    axes: tuple[int, ...] = ()

    def values(self) -> np.ndarray:
        """Return the kernel that these clusters describe."""
        rows = np.take_along_axis(self.centroids, to_rows(self.assignment, self.axes), axis=1)
        return from_rows(rows, self.axes, self.assignment.shape)


def count_values(array: np.ndarray, axes: Sequence[int] = ()) -> int:
    """Return the number of distinct values of `array`; 0.0 and -0.0 are one value.

    Args:
        array: numbers of any shape.
        axes: axes whose places are counted apart, such as the output channels; the largest count is returned.
    """
    return max((len(np.unique(row)) for row in to_rows(array, axes)), default=0)


def find_clusters(array: np.ndarray, axes: Sequence[int] = (), most: int = MOST_CLUSTERS) -> Clusters | None:
    """Return the clusters of a kernel, or `None` where it is not clustered.

    A kernel counts as clustered when it has at most `most` distinct values, and two non-zero weights or more share
    each of them on average: floats that training or an initialiser made do not coincide. Zeros do not speak for
    clusters, as pruning makes them too, and a kernel of one value is new. Rows along `axes` are taken to have values of
    their own where the whole kernel has more than twice as many as any row.

    Args:
        array: the kernel.
        axes: the axes that may have centroids of their own, such as the output channels.
        most: the most distinct values in a row.
    """
    whole, rows = (_shared_values(array, each, most) for each in ((), axes))
    if whole is None or (rows is not None and whole.centroids.shape[1] > 2 * rows.centroids.shape[1]):
        return rows
    return whole


def _shared_values(array: np.ndarray, axes: Sequence[int], most: int) -> Clusters | None:
    rows = to_rows(array, axes)
    if not rows.size or np.isnan(rows).any():
        return None
    if len(np.unique(rows[0, : 4 * most])) > most:  # most kernels are not clustered, and sorting all of one is slow
        return None
    distinct = [np.unique(row) for row in rows]
    widest, nonzero = max(map(len, distinct)), sum(np.count_nonzero(values) for values in distinct)
    if not 2 <= widest <= most or nonzero == 0 or 2 * nonzero > np.count_nonzero(rows):
        return None
    assignment = np.stack([np.searchsorted(own, row) for own, row in zip(distinct, rows, strict=True)])
    return Clusters(pad_rows(distinct), from_rows(assignment, axes, array.shape), tuple(axes))


def merge_values(values: np.ndarray) -> np.ndarray:
    """Return `values` as float32 with those made equal that only rounding tells apart, where they are few.

    That is what is left of clusters once channels are multiplied by a factor and divided by its rounded inverse.
    """
    distinct, places = np.unique(values, return_inverse=True)
    if not distinct.size:
        return values
    groups = np.concatenate([[0], np.cumsum(np.diff(distinct) > _ROUNDING * np.abs(distinct[1:]))])
    first, last = (np.searchsorted(groups, groups, side) - (side == "right") for side in ("left", "right"))
    if (distinct[last] - distinct[first] > 3 * _ROUNDING * np.abs(distinct)).any():
        return values  # neighbours all along: many values, which do not go together
    means = np.bincount(groups, distinct.astype("float64")) / np.bincount(groups)
    return means.astype("float32")[groups][places.reshape(values.shape)]


def with_zero(clusters: Clusters) -> Clusters:
    """Return the same clusters with 0.0 among the centroids of every row."""
    rows = [np.unique(np.append(row, np.float32(0))) for row in clusters.centroids]
    values = to_rows(clusters.values(), clusters.axes)
    assignment = np.stack([np.searchsorted(own, row) for own, row in zip(rows, values, strict=True)])
    shape = clusters.assignment.shape
    return Clusters(pad_rows(rows), from_rows(assignment, clusters.axes, shape), clusters.axes)


def pad_rows(rows: Sequence[np.ndarray], width: int = 0) -> np.ndarray:
    """Return sorted rows of unlike lengths as one array, at least `width` wide; the last value is repeated."""
    width = max([width, *map(len, rows)])
    return np.stack([np.concatenate([row, np.repeat(row[-1:], width - len(row))]) for row in rows])


def to_rows(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Return `array` as `(rows, weights)`: a row for each place along `axes`, in their order; one for no axes."""
    axes = tuple(axis % array.ndim for axis in axes)
    first = np.moveaxis(array, axes, range(len(axes)))
    return first.reshape((int(np.prod(first.shape[: len(axes)], dtype=int)), -1))


def from_rows(rows: np.ndarray, axes: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Return the array of `shape` that `to_rows` made `rows` from."""
    axes = tuple(axis % len(shape) for axis in axes)
    first = [shape[axis] for axis in axes] + [size for axis, size in enumerate(shape) if axis not in axes]
    return np.moveaxis(rows.reshape(first), range(len(axes)), axes)
