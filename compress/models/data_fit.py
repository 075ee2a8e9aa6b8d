"""All of a run's data against the model, before any work is done."""

from __future__ import annotations

from dataclasses import replace

import keras

from compress.data.split import Data, Split
from compress.models.fit_check import check_inputs, check_labels
from compress.models.task import infer_task

_SPLITS = ("train", "validation", "test", "unlabelled")


def fit_data(model: keras.Model, data: Data) -> Data:
    """Return `data` as `model` takes it: a missing channel axis is added, and noted.

    Raises:
        DataError: inputs or labels that do not fit, named in one line.
    """
    notes = list(data.notes)
    fitted: dict[str, Split | None] = {}
    for name in _SPLITS:
        split = getattr(data, name)
        if split is not None:
            x, said = check_inputs(model, split.x if split.in_memory else split.head(1)[0], name)
            notes += said
            if split.in_memory:
                split = replace(split, x=x)
            _check_split_labels(model, split)
        fitted[name] = split
    return replace(data, **fitted, notes=tuple(dict.fromkeys(notes)))


def _check_split_labels(model: keras.Model, split: Split) -> None:
    _, y = split.all() if split.in_memory else split.head(1)
    if y is not None:
        head, _ = split.head(1)
        check_labels(infer_task(model, y, head), y, split.name)
