"""Where clustering starts: the initial centroids of a kernel, one function for each way to find them.

Sources: Han 2016, arXiv:1510.00149 (linear and density-based); Arthur and Vassilvitskii 2007, "k-means++: the
advantages of careful seeding"; Lloyd 1982, "Least squares quantization in PCM".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from compress.errors import UsageError

InitialisationName = Literal["linear", "density", "k-means++"]
"""`linear`: evenly spaced from the least weight to the largest; `density`: equally many weights to each centroid;
`k-means++`: the centroids that lie nearest to the weights, by Lloyd's algorithm from seeds drawn by their distance."""

_SEEDING_POINTS = 1 << 14
_TRIALS = 3
_LLOYD_ROUNDS = 300


def require_clusters(clusters: int) -> None:
    """Raise UsageError unless `clusters` is an integer of at least 2."""
    if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 2:
        raise UsageError(
            f"expected a number of clusters that is an integer of at least 2. Received: clusters={clusters!r}"
        )


def initial_centroids(
    weights: np.ndarray, clusters: int, initialisation: InitialisationName = "k-means++", *, zero: bool = False
) -> np.ndarray:
    """Return sorted centroids `(at most clusters,)` in the type of `weights`.

    Weights with no more distinct values than `clusters` have these values as their centroids. With `zero`, one
    centroid is 0.0, and the others are shared out between the negative and the positive weights by their numbers.

    Args:
        weights: finite numbers `(n,)`, at least one.
        clusters: the most centroids, at least 2; 3 for weights of both signs and `zero`.
        initialisation: `"linear"`, `"density"` or `"k-means++"`.
        zero: whether 0.0 is one of the centroids.

    Raises:
        UsageError: unknown initialisation, or too few clusters.
    """
    require_clusters(clusters)
    require_initialisation(initialisation)
    distinct = np.unique(np.append(weights, np.zeros(int(zero), weights.dtype)))
    if len(distinct) <= clusters:
        return distinct + np.zeros((), weights.dtype)  # -0.0 becomes 0.0
    place = INITIALISATIONS[initialisation]
    weights = np.sort(weights.astype(np.float64))
    if not zero:
        return place(weights, clusters).astype(distinct.dtype)
    negative, positive = weights[weights < 0], weights[weights > 0]
    below = _share(clusters - 1, len(negative), len(positive))
    parts = [place(negative, below), np.zeros(1), place(positive, clusters - 1 - below)]
    return np.concatenate(parts).astype(distinct.dtype)


def require_initialisation(initialisation: str) -> None:
    """Raise UsageError for an initialisation that there is not."""
    if initialisation not in INITIALISATIONS:
        raise UsageError(
            f"expected an initialisation out of {', '.join(INITIALISATIONS)}. Received: {initialisation!r}"
        )


def _share(clusters: int, negative: int, positive: int) -> int:
    """Return how many of `clusters` centroids the negative weights get; each sign that occurs gets one."""
    if negative and positive and clusters < 2:
        raise UsageError(
            "expected at least 3 clusters for weights of both signs and a zero to keep. Received: clusters=2",
            "Ask for more clusters, or for keep_zeros=False.",
        )
    share = round(clusters * (negative / (negative + positive)))
    return min(max(share, min(negative, 1)), clusters - min(positive, 1))


def place_linear(weights: np.ndarray, clusters: int) -> np.ndarray:
    """Return `clusters` values evenly spaced over sorted `weights`; their middle for a single one."""
    if clusters < 2:
        return _mean(weights, clusters)
    return np.linspace(weights[0], weights[-1], clusters)


def place_by_density(weights: np.ndarray, clusters: int) -> np.ndarray:
    """Return the middles of `clusters` equally large groups of sorted `weights`; many ties count once."""
    if clusters < 1 or not len(weights):
        return weights[:0]
    places = (np.arange(clusters) + 0.5) / clusters
    found = np.quantile(weights, places)
    if len(np.unique(found)) < clusters:
        found = np.quantile(np.unique(weights), places)
    return found


def place_k_means(weights: np.ndarray, clusters: int) -> np.ndarray:
    """Return centroids of `clusters` groups of sorted `weights`: the best of three seeds, drawn with a fixed seed."""
    if clusters < 2:
        return _mean(weights, clusters)
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    squares = np.concatenate([[0.0], np.cumsum(weights**2)])
    points = weights[:: -(-len(weights) // _SEEDING_POINTS)]
    found = [_lloyd(weights, sums, _seed(points, clusters, np.random.default_rng(trial))) for trial in range(_TRIALS)]
    return min(found, key=lambda centroids: _error(weights, sums, squares, centroids))


def _mean(weights: np.ndarray, clusters: int) -> np.ndarray:
    return np.array([weights.mean()]) if clusters and len(weights) else weights[:0]


def _seed(points: np.ndarray, clusters: int, random: np.random.Generator) -> np.ndarray:
    """Return sorted points drawn one after the other, by their squared distance to those drawn before."""
    chosen = [random.choice(points)]
    distances = (points - chosen[0]) ** 2
    while len(chosen) < clusters and (total := distances.sum()) > 0:
        chosen.append(
            points[
                np.searchsorted(np.cumsum(distances), random.random() * total, side="right").clip(max=len(points) - 1)
            ]
        )
        distances = np.minimum(distances, (points - chosen[-1]) ** 2)
    return np.unique(chosen)


def _lloyd(weights: np.ndarray, sums: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Move each centroid to the mean of the sorted weights nearest to it, until none moves."""
    for _ in range(_LLOYD_ROUNDS):
        edges = _edges(weights, centroids)
        counts = np.diff(edges)
        moved = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = np.sort(moved)
    return centroids


def _edges(weights: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return where the groups of sorted `weights` begin and end; a tie goes to the lower centroid."""
    inner = np.searchsorted(weights, (centroids[1:] + centroids[:-1]) / 2, side="right")
    return np.concatenate([[0], inner, [len(weights)]])


def _error(weights: np.ndarray, sums: np.ndarray, squares: np.ndarray, centroids: np.ndarray) -> float:
    """Return the sum of the squared distances of sorted `weights` to their centroids."""
    edges = _edges(weights, centroids)
    counts, first, second = np.diff(edges), np.diff(sums[edges]), np.diff(squares[edges])
    return float(np.sum(second - 2 * centroids * first + counts * centroids**2))


INITIALISATIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "linear": place_linear,
    "density": place_by_density,
    "k-means++": place_k_means,
}
"""Name -> function of sorted weights `(n,)` and a number of centroids, which returns sorted centroids."""
