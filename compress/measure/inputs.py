"""Inputs on disk for the child processes that measure: one `.npy` file per model input in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from compress.data.split import Arrays, flatten_arrays, map_arrays
from compress.errors import DataError

_NAMES = "names.json"


def write_inputs(folder: str | Path, x: Arrays) -> None:
    """Write `x`: one array `(samples, ...)`, a list in the order of the model's inputs, or a dict by name.

    Raises:
        DataError: an array holds objects other than text.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_name = isinstance(x, dict) and all(isinstance(value, np.ndarray) for value in x.values())
    for index, array in enumerate(x.values() if by_name else flatten_arrays(x)):
        np.save(folder / f"input_{index}.npy", _as_plain(array), allow_pickle=False)
    (folder / _NAMES).write_text(json.dumps(list(x) if by_name else None))


def _as_plain(array: np.ndarray) -> np.ndarray:
    if array.dtype != object:
        return array
    if not all(isinstance(value, (str, bytes)) for value in array.flat):
        raise DataError(f"inputs must be numbers or text. Received: {array.flat[0]!r}")
    return array.astype(str)


def read_inputs(folder: str | Path) -> Arrays:
    """Return what `write_inputs` wrote: a list of arrays, or a dict by name; mapped from disk."""
    folder = Path(folder)
    count = len(list(folder.glob("input_*.npy")))
    arrays = [np.load(folder / f"input_{index}.npy", mmap_mode="r", allow_pickle=False) for index in range(count)]
    names = json.loads((folder / _NAMES).read_text())
    return arrays if names is None else dict(zip(names, arrays, strict=True))


def take_batches(x: Arrays, batch: int, count: int) -> list[Arrays]:
    """Return up to `count` different batches of exactly `batch` samples; few samples are repeated."""
    samples = len(flatten_arrays(x)[0])
    different = max(1, min(count, samples // batch))
    places = np.arange(different * batch).reshape(different, batch) % samples
    return [map_arrays(lambda array: np.ascontiguousarray(array[rows]), x) for rows in places]  # noqa: B023
