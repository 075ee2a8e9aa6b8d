"""The steps of `preprocess:` on arrays in memory; `compress.data.streams` does the same on streams."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from compress.data.references import Step
from compress.data.split import Arrays, map_arrays
from compress.errors import DataError


def preprocess_arrays(steps: Iterable[Step], x: Arrays, y: Arrays, where: str) -> tuple[Arrays, Arrays]:
    """Return `(x, y)` after each step; labels that are missing stay missing.

    Raises:
        DataError: a step does not fit the arrays, such as labels outside 0..n-1 for `one_hot: n`.
    """
    for step in steps:
        try:
            if step.one_hot is not None:
                y = map_arrays(lambda a: _one_hot(a, step.one_hot), y)  # noqa: B023
            else:
                x = map_arrays(lambda a: _change(a, step), x)  # noqa: B023
        except (ValueError, TypeError) as error:  # DataError among them
            reason = error.message if isinstance(error, DataError) else error
            raise DataError(f"{where}: preprocessing step `{step}`: {reason}") from None
    return x, y


def _change(array: np.ndarray, step: Step) -> np.ndarray:
    if step.rescale is not None or step.offset is not None:
        dtype = array.dtype if array.dtype.kind == "f" else np.dtype(np.float32)
        scaled = array.astype(dtype) * dtype.type(1 if step.rescale is None else step.rescale)
        return scaled if step.offset is None else scaled + dtype.type(step.offset)
    if step.expand_dims is not None:
        # Counted from the end, -1 is last; a position before the first axis would move the samples' own.
        if not -array.ndim <= step.expand_dims <= array.ndim:
            raise DataError(f"expected an axis from {-array.ndim} to {array.ndim}. Received: {step.expand_dims}")
        return np.expand_dims(array, step.expand_dims)
    if step.flatten:
        return array.reshape(len(array), -1)
    return array.astype(step.cast)


def _one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return float32 vectors `(samples, classes)`."""
    if labels.ndim > 1 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if labels.dtype.kind not in "iub":
        raise DataError(f"expected integer labels. Received: {labels.dtype}")
    wrong = np.argwhere((labels < 0) | (labels >= classes))
    if len(wrong):
        place = tuple(wrong[0])
        raise DataError(f"expected labels from 0 to {classes - 1}. Received: {labels[place]} at sample {place[0]}")
    return np.eye(classes, dtype=np.float32)[labels.astype(np.int64)]
