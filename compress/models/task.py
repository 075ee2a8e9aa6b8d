"""What a model is for: the kind of each output, its loss, its metrics and the form of its labels.

Taken from the compiled model where it says so, inferred from the head and from sample labels otherwise;
`Task.describe()` says which. Data are checked against it before any training (`compress.models.fit_check`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from compress.data.split import Arrays, flatten_arrays
from compress.errors import DataError
from compress.models.fit_check import check_inputs, check_labels, name_of, pair_labels
from compress.models.heads import find_activations, model_outputs, probe_activation

__all__ = ["OutputTask", "Task", "check_inputs", "check_labels", "infer_task", "name_of", "pair_labels"]

Kind = Literal["classification", "binary", "multilabel", "regression"]
Head = Literal["softmax", "sigmoid", "logits", "linear"]

_CLASS_NUMBERS = {"sparsecategoricalcrossentropy"}
_ONE_HOT = {"categoricalcrossentropy", "categoricalfocalcrossentropy", "kldivergence", "kld"}
_ONE_HOT |= {"categoricalhinge", "categoricalgeneralizedcrossentropy"}
_YES_NO = {"binarycrossentropy", "binaryfocalcrossentropy", "bce"}
_NUMBERS = {
    "mse",
    "meansquarederror",
    "mae",
    "meanabsoluteerror",
    "mape",
    "meanabsolutepercentageerror",
    "huber",
}
_NUMBERS |= {"msle", "meansquaredlogarithmicerror", "logcosh", "poisson"}


@dataclass(frozen=True)
class OutputTask:
    """What one output is for.

    Args:
        name: the output's name in Keras.
        kind: what it predicts.
        head: what its values are: probabilities (`softmax`, `sigmoid`), `logits`, or numbers (`linear`).
        shape: its shape with the batch axis, `None` for free axes.
        from_logits: whether its loss takes logits.
        sparse: whether labels are class numbers instead of one-hot rows; `None` where there are no classes.
        classes: the number of classes, or `None`.
        loss: what `compile` takes: a name, a `keras.losses.Loss` or a function.
        metrics: what `compile` takes.
        compiled: whether loss and metrics come from the compiled model.
        doubt: why loss and head do not fit together, or nothing.
    """

    name: str
    kind: Kind
    head: Head
    shape: tuple[int | None, ...]
    from_logits: bool = False
    sparse: bool | None = None
    classes: int | None = None
    loss: Any = None
    metrics: tuple[Any, ...] = ()
    compiled: bool = False
    doubt: str = ""


@dataclass(frozen=True)
class Task:
    """What a model is for, one entry per output in Keras' order.

    Args:
        outputs: the outputs.
        keyed: whether the model returns its outputs as a dict.
    """

    outputs: tuple[OutputTask, ...]
    keyed: bool = False

    def describe(self) -> list[str]:
        """Return sentences that say what was taken from where."""
        sentences = []
        for output in self.outputs:
            which = f"output {output.name!r}: " if len(self.outputs) > 1 else ""
            source = "from the compiled model" if output.compiled else "inferred from the head and the labels"
            labels = {True: ", labels are class numbers", False: ", labels are one-hot", None: ""}[output.sparse]
            logits = " on logits" if output.from_logits else ""
            sentences.append(f"{which}task: {output.kind}, head: {output.head}{labels}")
            sentences.append(f"{which}loss: {name_of(output.loss)}{logits} ({source})")
            if output.metrics:
                sentences.append(f"{which}metrics: {', '.join(name_of(m) for m in output.metrics)} ({source})")
            if output.doubt:
                sentences.append(f"{which}warning: {output.doubt}")
        return sentences

    def compile_arguments(self) -> dict[str, Any]:
        """Return `loss` and `metrics` for `compile`, in the structure of the model's outputs."""
        losses = [output.loss for output in self.outputs]
        metrics = [list(output.metrics) for output in self.outputs]
        if self.keyed:
            names = [output.name for output in self.outputs]
            return {
                "loss": dict(zip(names, losses, strict=True)),
                "metrics": dict(zip(names, metrics, strict=True)),
            }
        return {"loss": losses, "metrics": metrics} if len(losses) > 1 else {"loss": losses[0], "metrics": metrics[0]}


def infer_task(model: Any, y_sample: Arrays = None, x_sample: Arrays = None) -> Task:
    """Return what `model` is for.

    Args:
        model: a Keras model, compiled or not.
        y_sample: some labels, in the structure that `fit` takes, or `None`.
        x_sample: some inputs; needed for models whose outputs are not known before they are called.

    Raises:
        DataError: labels for another number of outputs, or a subclassed model without `x_sample`.
    """
    (tensors, keyed), activations = model_outputs(model), find_activations(model)
    values = None
    if x_sample is not None and (tensors is None or None in activations):
        values = _call(model, x_sample)
    if tensors is None:
        if values is None:
            raise DataError(
                "the outputs of a subclassed model are known only when it is called, and there are no inputs "
                f"to call it on. Received: {type(model).__name__} {model.name!r}",
                "Give data, or build the model with the functional API.",
            )
        tensors, keyed = _name_values(values), isinstance(values, dict)
    probes = flatten_arrays(values) if values is not None else [None] * len(tensors)
    activations = activations if len(activations) == len(tensors) else [None] * len(tensors)
    labels = pair_labels(list(tensors), y_sample)
    losses, metrics = _compiled_parts(model, list(tensors))
    outputs = []
    for (name, tensor), activation, probe in zip(tensors.items(), activations, probes, strict=True):
        found = activation or (probe_activation(probe) if probe is not None else "linear")
        outputs.append(
            _output_task(
                name,
                tuple(tensor.shape),
                activation=found,
                y=labels[name],
                loss=losses[name],
                metrics=metrics[name],
            )
        )
    return Task(tuple(outputs), keyed)


def infer_output_tasks(names: list[str], outputs: list[np.ndarray], y: Arrays) -> list[OutputTask]:
    """Return what each output of a model file is for, from what it gives and the labels alone; no Keras is
    needed.

    Args:
        names: of the outputs.
        outputs: one array `(samples, ...)` each.
        y: labels, in the structure that `fit` takes, or `None`.
    """
    labels = pair_labels(names, y)
    tasks = []
    for name, output in zip(names, outputs, strict=True):
        activation, shape = probe_activation(output), (None, *output.shape[1:])
        kind, sparse = _infer_kind(activation, shape, labels[name])
        head = _head(activation, kind)
        tasks.append(OutputTask(name, kind, head, shape, head == "logits", sparse, _classes(kind, shape)))
    return tasks


def _call(model: Any, x: Arrays) -> Any:
    """Return the outputs of `model` as arrays; it is called on tensors, which it casts as `fit` would."""
    import keras

    outputs = model(keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=False)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def _name_values(values: Any) -> dict[str, Any]:
    if isinstance(values, dict):
        return {key: values[key] for key in sorted(values)}
    leaves = list(values) if isinstance(values, (list, tuple)) else [values]
    return {f"output_{index}" if len(leaves) > 1 else "output": leaf for index, leaf in enumerate(leaves)}


def _compiled_parts(model: Any, names: list[str]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """Return the compiled loss and the (serialised) metrics of each output; `None` and `()` for none."""
    if not getattr(model, "compiled", False):
        return dict.fromkeys(names), dict.fromkeys(names, ())
    config = model.get_compile_config() or {}
    losses = _per_output(getattr(model, "loss", None), names)
    metrics: dict[str, tuple[Any, ...]] = dict.fromkeys(names, ())
    for key in ("metrics", "weighted_metrics"):
        for name, items in _per_output(config.get(key), names, flat=len(names) == 1).items():
            found = items if isinstance(items, (list, tuple)) else [items]
            metrics[name] += tuple(item for item in found if item is not None)
    return losses, metrics


def _per_output(value: Any, names: list[str], flat: bool = False) -> dict[str, Any]:
    """Return each output's part of a compile argument: one thing for all, a list, or a dict by name."""
    if isinstance(value, dict) and "class_name" not in value:
        return {name: value.get(name) for name in names}
    if isinstance(value, (list, tuple)) and not flat and len(value) == len(names):
        return dict(zip(names, value, strict=True))
    return dict.fromkeys(names, value)


def _output_task(
    name: str,
    shape: tuple,
    *,
    activation: str,
    y: np.ndarray | None,
    loss: Any,
    metrics: tuple[Any, ...],
) -> OutputTask:
    """Return the task of one output; a compiled `loss` decides, head and labels fill what it leaves open."""
    kind, sparse = _infer_kind(activation, shape, y)
    if loss is None:
        head = _head(activation, kind)
        chosen = _default_loss(kind, sparse, head == "logits")
        return OutputTask(
            name, kind, head, shape, head == "logits", sparse, _classes(kind, shape), *chosen, compiled=False
        )
    # a loss object may carry a name of the user's choice, its class does not
    known = (type(loss).__name__ if hasattr(loss, "reduction") else name_of(loss)).lower().replace("_", "")
    if known in _CLASS_NUMBERS:
        kind, sparse = "classification", True
    elif known in _ONE_HOT:
        kind, sparse = "classification", False
    elif known in _YES_NO:
        kind, sparse = ("binary" if shape[-1] == 1 else "multilabel"), None
    elif known in _NUMBERS:
        kind, sparse = "regression", None
    from_logits = bool(getattr(loss, "from_logits", False) or getattr(loss, "keywords", {}).get("from_logits", False))
    head = _head(activation, kind)
    doubt = ""
    if known in _CLASS_NUMBERS | _ONE_HOT | _YES_NO and (head == "logits") != from_logits:
        doubt = f"the head gives {head}, but {name_of(loss)} has from_logits={from_logits}"
    return OutputTask(
        name,
        kind,
        head,
        shape,
        from_logits,
        sparse,
        _classes(kind, shape),
        loss,
        metrics,
        compiled=True,
        doubt=doubt,
    )


def _infer_kind(activation: str, shape: tuple, y: np.ndarray | None) -> tuple[Kind, bool | None]:
    """Return the kind of an output, and whether its labels are class numbers, from head and labels."""
    units = shape[-1]
    one_hot = y is not None and y.ndim == len(shape) and y.shape[-1] == units and units != 1
    if activation == "softmax":
        return "classification", not one_hot
    if activation == "sigmoid":
        return ("binary" if units == 1 else "multilabel"), None
    if y is None or y.size == 0:
        return "regression", None
    whole = y.dtype.kind in "iub"
    if one_hot and np.isin(y, (0, 1)).all() and (y.sum(-1) == 1).all():
        return "classification", False
    if units == 1 and whole and np.isin(y, (0, 1)).all():
        return "binary", None
    if not one_hot and units is not None and units > 1 and whole and y.ndim in (len(shape) - 1, len(shape)):
        return "classification", True
    return "regression", None


def _head(activation: str, kind: Kind) -> Head:
    if activation == "linear":
        return "linear" if kind == "regression" else "logits"
    return activation  # type: ignore[return-value]


def _classes(kind: Kind, shape: tuple) -> int | None:
    return {"classification": shape[-1], "multilabel": shape[-1], "binary": 2, "regression": None}[kind]


def _default_loss(kind: Kind, sparse: bool | None, from_logits: bool) -> tuple[Any, tuple[Any, ...]]:
    """Return the loss and metrics that the field uses for this kind of output."""
    import keras

    if kind == "regression":
        return "mean_squared_error", ("mean_absolute_error",)
    if kind == "classification" and sparse:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
        return loss, ("sparse_categorical_accuracy",)
    if kind == "classification":
        return keras.losses.CategoricalCrossentropy(from_logits=from_logits), ("categorical_accuracy",)
    accuracy = keras.metrics.BinaryAccuracy(name="binary_accuracy", threshold=0.0 if from_logits else 0.5)
    return keras.losses.BinaryCrossentropy(from_logits=from_logits), (accuracy,)
