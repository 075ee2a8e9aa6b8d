"""Whether data fit a model, said in one line before any training: structure, shapes, dtypes, labels, NaN.

A missing channel axis is added and said; nothing else is changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.split import Arrays, flatten_arrays, map_arrays
from compress.errors import DataError

if TYPE_CHECKING:
    from compress.models.task import OutputTask, Task

_CHUNK = 4096


def check_inputs(model: Any, x: Arrays, name: str = "data") -> tuple[Arrays, list[str]]:
    """Return `x` as the model takes it, and sentences about what was changed.

    Args:
        model: a Keras model; one without symbolic inputs (subclassed) is only checked for finite numbers.
        x: inputs `(samples, ...)`, in the structure that the model takes.
        name: what messages call the data, such as `"train"`.

    Raises:
        DataError: another number of inputs, shape, rank or dtype, no samples, or values that are not finite.
    """
    leaves = flatten_arrays(x)
    if any(len(leaf) == 0 for leaf in leaves) or not leaves:
        raise DataError(f"{name} has no samples. Received: 0 samples")
    for leaf in leaves:
        _check_finite(leaf, f"inputs of {name}")
    inputs = list(getattr(model, "inputs", None) or [])
    if not inputs:
        return x, []
    names = [tensor.name for tensor in inputs]
    if isinstance(x, dict) and len(inputs) > 1 and set(x) != set(names):
        raise DataError(f"the model's inputs are {', '.join(names)}. Received in {name}: {', '.join(sorted(x))}")
    if len(leaves) != len(inputs):
        raise DataError(f"the model has {len(inputs)} inputs ({', '.join(names)}). Received in {name}: {len(leaves)}")
    by_name = {tensor.name: tensor for tensor in inputs}
    tensors = [by_name[key] for key in sorted(x)] if isinstance(x, dict) and len(inputs) > 1 else inputs
    fitted = {id(leaf): _fit_input(tensor, leaf, name) for tensor, leaf in zip(tensors, leaves, strict=True)}
    notes = list(dict.fromkeys(note for _, note in fitted.values() if note))
    return map_arrays(lambda leaf: fitted[id(leaf)][0], x), notes


def check_labels(task: Task, y: Arrays, name: str = "data", unlabelled: bool = False) -> None:
    """Raise DataError if `y` does not fit `task`, naming the first sample that does not.

    Args:
        task: what the model is for.
        y: labels `(samples, ...)`, in the structure that `fit` takes.
        name: what messages call the data.
        unlabelled: whether rows of -1 (class numbers) or NaN (anything else) may mark missing labels.
    """
    if y is None:
        raise DataError(f"{name} has no labels. Received: y=None")
    labels = pair_labels([output.name for output in task.outputs], y)
    for output in task.outputs:
        if labels[output.name] is not None:
            _check_output(output, labels[output.name], name, unlabelled)


def pair_labels(names: list[str], y: Arrays) -> dict[str, np.ndarray | None]:
    """Return labels by output name; `None` for an output without labels."""
    if y is None:
        return dict.fromkeys(names)
    if isinstance(y, dict):
        if strangers := sorted(set(y) - set(names)):
            raise DataError(f"labels are named like outputs: {', '.join(names)}. Received: {', '.join(strangers)}")
        return {name: None if y.get(name) is None else np.asarray(y[name]) for name in names}
    leaves = list(y) if isinstance(y, (list, tuple)) else [y]
    if len(leaves) != len(names):
        raise DataError(
            f"the model has {len(names)} outputs ({', '.join(names)}). Received: {len(leaves)} label arrays"
        )
    return {name: None if leaf is None else np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}


def name_of(item: Any) -> str:
    """Return the plain name of a loss or metric: a string, an object, a function, or its serialised form."""
    if isinstance(item, str) or item is None:
        return str(item or "none")
    if isinstance(item, dict) and "class_name" in item:
        inner = item.get("config")
        return str(inner if isinstance(inner, str) else (inner or {}).get("name", item["class_name"]))
    return str(getattr(item, "name", None) or getattr(item, "__name__", None) or type(item).__name__)


def _fit_input(tensor: Any, array: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Return `array` as the input `tensor` takes it, and a note if an axis was added."""
    expected, shape = tuple(tensor.shape)[1:], array.shape[1:]
    text = f"input {tensor.name!r} takes {_shape_text(expected)} per sample"
    if array.dtype.kind not in "biuf" and "string" not in str(tensor.dtype):
        raise DataError(f"{text} of {tensor.dtype}. Received in {name}: dtype {array.dtype}")
    whole = "int" in str(tensor.dtype)
    if whole and array.dtype.kind == "f" and not _all_chunks(array, lambda part: part == np.round(part)):
        raise DataError(f"{text} of whole numbers ({tensor.dtype}). Received in {name}: fractions in {array.dtype}")
    if _fits(expected, shape):
        return array, ""
    if expected[-1:] == (1,) and _fits(expected[:-1], shape):
        note = f"{name}: the missing channel axis was added, {_shape_text(shape)} -> {_shape_text((*shape, 1))}"
        return array[..., np.newaxis], note
    received = f"{text}. Received in {name}: {_shape_text(shape)}"
    if len(shape) == len(expected) > 1 and _fits(expected, (*shape[1:], shape[0])):
        raise DataError(received, "Channels come first in the data; move them: numpy.moveaxis(x, 1, -1).")
    if len(shape) == len(expected) > 1 and _fits(expected[:-1], shape[:-1]):
        raise DataError(f"{received}: {shape[-1]} channels instead of {expected[-1]}")
    raise DataError(received)


def _fits(expected: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(expected) == len(shape) and all(e in (None, s) for e, s in zip(expected, shape, strict=True))


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return (
        "(" + ", ".join("any" if size is None else str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"
    )


def _check_finite(array: np.ndarray, what: str) -> None:
    if array.dtype.kind != "f":
        return
    for start in range(0, len(array), _CHUNK):
        bad = ~np.isfinite(array[start : start + _CHUNK])
        if bad.any():
            row = start + int(np.argmax(bad.reshape(len(bad), -1).any(1)))
            raise DataError(f"{what} must be finite. Received: NaN or infinity, first at sample {row}")


def _all_chunks(array: np.ndarray, test: Any) -> bool:
    return all(test(array[start : start + _CHUNK]).all() for start in range(0, len(array), _CHUNK))


def _check_output(output: OutputTask, y: np.ndarray, name: str, unlabelled: bool) -> None:
    """Check the labels of one output."""
    what = f"labels of {name}" if output.name == "output" else f"labels of {name} for output {output.name!r}"
    if y.dtype.kind not in "biuf":
        raise DataError(f"{what} must be numbers. Received: dtype {y.dtype}", "Map class names to 0, 1, 2, ... first.")
    shape = output.shape[1:]
    squeezed = y.shape[1:-1] if y.ndim > 1 and y.shape[-1] == 1 else None
    if output.kind == "classification" and output.sparse:
        if output.classes != 1 and _fits(shape, y.shape[1:]):
            raise DataError(
                f"{what} look one-hot, and {name_of(output.loss)} takes class numbers. Received: shape {y.shape}",
                "Pass y.argmax(-1), or compile the model with categorical_crossentropy.",
            )
        if not _fits(shape[:-1], y.shape[1:]) and not (squeezed is not None and _fits(shape[:-1], squeezed)):
            raise DataError(f"{what} must be one class number per {_place(shape)}. Received: shape {y.shape}")
        _check_class_numbers(output, y, what, unlabelled)
        return
    single = shape[-1:] == (1,) and _fits(shape[:-1], y.shape[1:])
    if not _fits(shape, y.shape[1:]) and not single:
        sparse = output.kind == "classification" and (_fits(shape[:-1], y.shape[1:]) or squeezed is not None)
        raise DataError(
            f"{what} must have shape {_shape_text(shape)} per sample for {name_of(output.loss)}. "
            f"Received: shape {y.shape}",
            "Pass one-hot rows, or compile the model with sparse_categorical_crossentropy." if sparse else None,
        )
    _check_values(output, y, what, unlabelled)


def _place(shape: tuple[int | None, ...]) -> str:
    return "sample" if len(shape) == 1 else f"position {_shape_text(shape[:-1])} of a sample"


def _check_class_numbers(output: OutputTask, y: np.ndarray, what: str, unlabelled: bool) -> None:
    flat = y.reshape(len(y), -1)
    lowest = -1 if unlabelled else 0
    whole = flat == np.floor(flat) if y.dtype.kind == "f" else np.ones(flat.shape, bool)
    bad = ~whole | (flat < lowest) | (flat >= output.classes)
    if bad.any():
        row, column = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise DataError(
            f"{what} must be class numbers from 0 to {output.classes - 1}. "
            f"Received: label {flat[row, column]:g} of a {output.classes}-class head, first at sample {row}",
            "Class numbers start at 0." if flat.max() == output.classes and flat.min() >= 1 else None,
        )


def _check_values(output: OutputTask, y: np.ndarray, what: str, unlabelled: bool) -> None:
    flat = y.reshape(len(y), -1)
    if y.dtype.kind == "f":
        bad = ~np.isfinite(flat)
        if unlabelled:
            bad &= ~np.isnan(flat).all(1, keepdims=True)
        if bad.any():
            row = int(np.argmax(bad.any(1)))
            raise DataError(f"{what} must be finite. Received: NaN or infinity, first at sample {row}")
    if output.kind != "regression" and output.loss is not None and not _is_margin_loss(output):
        bad = ((flat < 0) | (flat > 1)).any(1)
        if bad.any():
            row = int(np.argmax(bad))
            value = flat[row][(flat[row] < 0) | (flat[row] > 1)][0]
            raise DataError(f"{what} must lie between 0 and 1. Received: {value:g}, first at sample {row}")


def _is_margin_loss(output: OutputTask) -> bool:
    return "hinge" in name_of(output.loss).lower()  # takes labels of -1 and 1
