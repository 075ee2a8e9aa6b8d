"""Gradients of a model's loss with respect to some of its weights, on TensorFlow, JAX and PyTorch; public API only.

Nothing is trained: the model runs in inference mode, and statistics, random generators and metrics stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from compress.data.split import Data, Split, as_data, first_line, flatten_arrays, map_arrays
from compress.errors import DataError, PassError, SetupError, UsageError
from compress.models.walking import find_all_layers

_HALF_PRECISION_SCALE = 1024.0  # small gradients vanish in float16 unless the loss is scaled up


class LossGradients:
    """Computes gradients of the compiled loss again and again; what can be compiled is compiled once.

    Calling it with a batch `(x, y)` returns float32 gradients of the batch's loss, one array per variable; the loss
    includes the model's regularisation. A weight that the loss does not depend on has gradient 0.

    Args:
        model: a built model, compiled with a loss.
        variables: trainable variables of it.

    Raises:
        UsageError: the model is not compiled.
        SetupError: the backend of Keras has no gradients.
    """

    def __init__(self, model: keras.Model, variables: Sequence[keras.Variable]):
        if not model.compiled:
            raise UsageError(
                f"expected a model compiled with a loss. Received: model {model.name!r}, not compiled",
                "Call model.compile(optimizer=..., loss=...).",
            )
        backend = keras.backend.backend()
        if backend not in _BACKENDS:
            raise SetupError(
                f"expected Keras on one of {sorted(_BACKENDS)}. Received: backend={backend!r}",
                "Set KERAS_BACKEND=tensorflow.",
            )
        self.model = model
        self.variables = list(variables)
        half = any(getattr(layer, "compute_dtype", None) == "float16" for layer in find_all_layers(model))
        self._scale = _HALF_PRECISION_SCALE if half else 1.0
        self._function = _BACKENDS[backend](model, self.variables, self._loss)

    def __call__(self, x: Any, y: Any) -> list[np.ndarray]:
        """Return the gradients of one batch; the model stays as it is."""
        found = self._function(map_arrays(keras.ops.convert_to_tensor, x), map_arrays(_as_labels, y))
        return [
            np.zeros(variable.shape, np.float32)
            if gradient is None
            else keras.ops.convert_to_numpy(gradient).astype(np.float32) / self._scale
            for variable, gradient in zip(self.variables, found, strict=True)
        ]

    def _loss(self, x: Any, y: Any) -> Any:
        outputs = self.model(x, training=False)
        return keras.ops.multiply(self.model.compute_loss(x=x, y=y, y_pred=outputs), self._scale)


def weight_gradients(
    model: keras.Model,
    variables: Sequence[keras.Variable],
    data: Data | Split | Any,
    *,
    samples: int = 1024,
    batch_size: int = 32,
) -> list[np.ndarray]:
    """Return the mean gradient of the compiled loss over the samples, one float32 array per variable.

    Args:
        model: a built model, compiled with a loss; it is not changed.
        variables: trainable variables of `model`.
        data: `Data` with a train split, a `Split`, `(x, y)` or a stream of batches, with labels.
        samples: how many of the first samples are used at most.
        batch_size: samples per gradient; a stream keeps its own.

    Raises:
        UsageError: the model is not compiled with a loss.
        DataError: no data, or no labels.
        PassError: the loss cannot be computed, or a gradient is not finite.
    """
    split = data if isinstance(data, Split) else as_data(data).require("train", "computing gradients")
    return mean_gradients(LossGradients(model, variables), split, samples=samples, batch_size=batch_size)


def mean_gradients(
    gradients: LossGradients, split: Split, *, samples: int = 1024, batch_size: int = 32
) -> list[np.ndarray]:
    """Return what `weight_gradients` does, with the compiled function of an earlier call."""
    model, variables = gradients.model, gradients.variables
    totals = [np.zeros(variable.shape, np.float64) for variable in variables]
    seen = 0
    for x, y in split.batches(batch_size):
        if y is None and model.loss is not None:
            raise DataError(f"gradients need labels. Received: split {split.name!r} without labels", "Pass (x, y).")
        count = min(len(flatten_arrays(x)[0]), samples - seen)
        batch = [map_arrays(lambda array: array[:count], part) for part in (x, y)]  # noqa: B023
        for index, gradient in enumerate(_checked(gradients, model, *batch)):
            totals[index] += gradient.astype(np.float64) * count
        seen += count
        if seen >= samples:
            break
    means = [(total / seen).astype(np.float32) for total in totals]
    for variable, mean in zip(variables, means, strict=True):
        if not np.isfinite(mean).all():
            raise PassError(
                f"expected gradients that are finite numbers. Received: NaN or infinity for {variable.path}",
                "Look for NaN in the data and weights, and for labels that do not fit the loss.",
            )
    return means


def _checked(gradients: LossGradients, model: keras.Model, x: Any, y: Any) -> list[np.ndarray]:
    try:
        return gradients(x, y)
    except Exception as error:  # user code runs here: layers, losses and compute_loss
        raise PassError(
            f"expected a loss that can be computed from the data. "
            f"Received: model {model.name!r}: {type(error).__name__}: {first_line(error)}",
            "Check with model.evaluate that data and loss fit each other.",
        ) from error


def _as_labels(array: np.ndarray) -> Any:
    return keras.ops.convert_to_tensor(array.astype(np.float32) if array.dtype == np.float64 else array)


Gradients = Callable[[Any, Any], Sequence[Any]]


def _with_tensorflow(model: keras.Model, variables: list[keras.Variable], loss: Gradients) -> Gradients:
    import tensorflow as tf

    values = [variable.value for variable in variables]

    def gradients(x: Any, y: Any) -> Sequence[Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            value = loss(x, y)
        found = tape.gradient(value, values)
        return [None if each is None else tf.convert_to_tensor(each) for each in found]  # embeddings give slices

    return _restoring(model, gradients if model.run_eagerly else tf.function(gradients, reduce_retracing=True))


def _with_jax(model: keras.Model, variables: list[keras.Variable], loss: Gradients) -> Gradients:
    import jax

    chosen = {id(variable) for variable in variables}
    compiled: dict[str, Any] = {}

    def stateless(function: Callable[..., Any], others: list[keras.Variable]) -> Callable[..., Any]:
        def call(values: list[Any], rest: list[Any], *batch: Any) -> Any:
            mapping = [*zip(variables, values, strict=True), *zip(others, rest, strict=True)]
            with keras.StatelessScope(state_mapping=mapping, collect_losses=True):  # what is assigned is dropped
                return function(*batch)

        return call

    def find_others() -> list[keras.Variable]:
        found = (*model.variables, *model.metrics_variables)
        return list({id(variable): variable for variable in found if id(variable) not in chosen}.values())

    def prepare(x: Any, y: Any) -> None:
        """Have the loss make its metrics outside of the compiled function, where they would be traced for ever."""
        others = find_others()
        forward = stateless(lambda batch: model(batch, training=False), others)
        shapes = jax.eval_shape(forward, [v.value for v in variables], [v.value for v in others], x)
        model.compute_loss(x=x, y=y, y_pred=jax.tree.map(lambda each: jax.numpy.zeros(each.shape, each.dtype), shapes))
        compiled["others"] = find_others()
        function = jax.grad(stateless(loss, compiled["others"]))
        compiled["function"] = function if model.run_eagerly else jax.jit(function)

    prepare_once = _restoring(model, prepare)

    def gradients(x: Any, y: Any) -> Sequence[Any]:
        if not compiled:
            prepare_once(x, y)
        return compiled["function"]([v.value for v in variables], [v.value for v in compiled["others"]], x, y)

    return gradients


def _with_torch(model: keras.Model, variables: list[keras.Variable], loss: Gradients) -> Gradients:
    import torch

    def gradients(x: Any, y: Any) -> Sequence[Any]:
        with torch.enable_grad():
            return torch.autograd.grad(loss(x, y), [variable.value for variable in variables], allow_unused=True)

    return _restoring(model, gradients)


def _restoring(model: keras.Model, gradients: Gradients) -> Gradients:
    """Return `gradients` with all that a call assigns set back: random generators, metrics, state of custom layers."""

    def restoring(x: Any, y: Any) -> Sequence[Any]:
        trained = {id(variable) for variable in model.trainable_variables}
        state = {id(v): v for v in (*model.variables, *model.metrics_variables) if id(v) not in trained}
        before = [keras.ops.copy(variable) for variable in state.values()]
        try:
            return gradients(x, y)
        finally:
            for variable, value in zip(state.values(), before, strict=True):
                variable.assign(value)
            for variable in model.metrics_variables:  # those that the first call has made
                if id(variable) not in state:
                    variable.assign(keras.ops.zeros(variable.shape, variable.dtype))

    return restoring


_BACKENDS = {"tensorflow": _with_tensorflow, "jax": _with_jax, "torch": _with_torch}
