"""What a source holds before anything is chosen of it, and the choice: which rows, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.data.references import SourceOptions
from compress.data.split import Arrays, flatten_arrays
from compress.errors import DataError

# The split of a set that has none must be the same in every run and command, whatever the seed: a test sample
# of one run would else be a training sample of another.
_HOLD_OUT_SEED = 0

Rows = np.ndarray | None
"""Positions of the samples that are used, in order, or `None` for all of them."""


@dataclass(frozen=True)
class Samples:
    """Everything that a source holds for one split, or for all when it has no splits.

    Args:
        where: what messages call the source.
        x: inputs, each `(samples, ...)`, or `None` for a stream.
        y: labels, each `(samples, ...)`, or `None`.
        stream: batches, as in `Split`.
        names: what messages call each array: those of `x`, then those of `y`.
        whole: whether the source has no splits of its own, so that train and test are held apart by row.
        digest: sha256 of what a stream is; arrays are digested when they are complete.
        decode: turns the chosen `(x, y)`, such as names of image files, into `(x, y, stream, digest)`.
        notes: sentences for the user.
    """

    where: str
    x: Arrays = None
    y: Arrays = None
    stream: Any = None
    names: tuple[str, ...] = ()
    whole: bool = False
    digest: str = ""
    decode: Callable[[Arrays, Arrays], tuple[Arrays, Arrays, Any, str]] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of samples in memory."""
        return len(flatten_arrays(self.x)[0])

    def arrays(self) -> list[tuple[str, np.ndarray]]:
        """Return each array with its name."""
        leaves = flatten_arrays(self.x) + flatten_arrays(self.y)
        names = self.names or tuple(f"array {i}" for i in range(len(leaves)))
        return list(zip(names, leaves, strict=True))


def check_lengths(samples: Samples) -> None:
    """Raise DataError unless all arrays have samples, and equally many."""
    for name, array in samples.arrays():
        if array.ndim == 0:
            raise DataError(f"{samples.where}: {name!r} must have one entry per sample. Received: a single value")
    counts = {name: len(array) for name, array in samples.arrays()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{samples.where}: arrays must have one entry per sample, equally many. Received: {listed}")
    if 0 in counts.values():
        raise DataError(f"{samples.where}: has no samples. Received: 0 samples in {', '.join(counts)}")


def hold_out(count: int, part: str) -> np.ndarray:
    """Return the rows of the train part, 80 %, or the test part, 20 %, of `count` samples."""
    order = np.random.default_rng(_HOLD_OUT_SEED).permutation(count)
    cut = count * 4 // 5
    return order[cut:] if part == "test" else order[:cut]


def fixed_order(count: int) -> np.ndarray:
    """Return a random order of `count` samples that is always the same."""
    return np.random.default_rng(_HOLD_OUT_SEED).permutation(count)


def choose_rows(rows: np.ndarray, source: SourceOptions, seed: int, where: str) -> np.ndarray:
    """Return `rows` shuffled, skipped and taken as `source` says; raises DataError when none is left."""
    if source.shuffle:
        rows = np.random.default_rng(seed).permutation(rows)
    stop = None if source.take is None else source.skip + source.take
    chosen = rows[source.skip : stop]
    if len(chosen) == 0:
        raise DataError(f"{where}: no samples are left. Received: 0 of {len(rows)} samples after skip {source.skip}")
    return chosen


def check_finite(samples: Samples, rows: Rows) -> None:
    """Raise DataError that names the first NaN or infinity among the chosen samples."""
    for name, array in samples.arrays():
        if array.dtype.kind not in "fc":
            continue
        values = array if rows is None else array[rows]
        if np.isfinite(values).all():
            continue
        place = np.argwhere(~np.isfinite(values))[0]
        row = int(place[0] if rows is None else rows[place[0]])
        index = ", ".join(str(i) for i in (row, *map(int, place[1:])))
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise DataError(
            f"{samples.where}: {name!r} must be finite. "
            f"Received: {values[tuple(place)]} at index [{index}], {bad} such values in all"
        )
