"""How far the outputs of a model move when its weights or switches change: the loss that sensitivities are in.

The model is traced once; each measurement is a plain `predict` over samples that are kept in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from compress.data.split import Split, flatten_arrays, map_arrays
from compress.errors import DataError

logger = logging.getLogger(__name__)

_BATCH = 64
_MOST_BYTES = 2**30
_PROBABILITY_ERROR = 1e-3
_LEAST_PROBABILITY = 1e-7  # a softmax in float32 gives exact zeros


class OutputLoss:
    """The distance of a model's outputs from those that it gave when this object was made.

    For an output whose rows are probabilities it is the mean Kullback-Leibler divergence in nats; for any other the
    mean squared error in units of the output's variance, so that outputs of different units can be averaged.

    Args:
        model: the model as it shall be; later calls see what was assigned to its variables meanwhile.
        split: samples; labels are not used. Outputs of up to 1 GiB are kept, fewer samples are used beyond.
        samples: how many are used at most.

    Raises:
        DataError: an output is NaN or infinite.
    """

    def __init__(self, model: keras.Model, split: Split, samples: int):
        self._model = model
        self._inputs: list[Any] = []
        self._wanted: list[list[np.ndarray]] = []
        seen = kept = 0
        for x, _ in split.batches(min(_BATCH, samples)):
            inputs = map_arrays(lambda array: array[: samples - seen], x)  # noqa: B023
            outputs = _predict(model, inputs)
            self._inputs.append(inputs)
            self._wanted.append(outputs)
            seen += len(flatten_arrays(inputs)[0])
            kept += sum(output.nbytes for output in outputs)
            if seen >= samples:
                break
            if kept >= _MOST_BYTES:
                logger.info("sensitivity: %d of %d samples are used, as outputs fill 1 GiB of memory", seen, samples)
                break
        self._measures = [_choose_measure([batch[i] for batch in self._wanted]) for i in range(len(self._wanted[0]))]

    def measure(self) -> float:
        """Return the mean over samples and outputs; NaN where an output is not finite."""
        return self.measure_other(self._model)

    def measure_other(self, model: keras.Model) -> float:
        """Return the same for another model with such outputs."""
        total = count = 0.0
        for x, wanted in zip(self._inputs, self._wanted, strict=True):
            size = len(wanted[0])
            for output, target, measure in zip(_predict(model, x), wanted, self._measures, strict=True):
                total += size * measure(output, target)
                count += size
        return total / count


def _predict(model: keras.Model, x: Any) -> list[np.ndarray]:
    return [np.asarray(output, "float32") for output in keras.tree.flatten(model.predict_on_batch(x))]


@contextmanager
def replaced_weights(variables: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> Iterator[None]:
    """Give variables other values inside the block."""
    kept = [keras.ops.convert_to_numpy(variable) for variable in variables]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    try:
        yield
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)


def _choose_measure(batches: list[np.ndarray]) -> Any:
    if not all(np.isfinite(batch).all() for batch in batches):
        raise DataError(
            "expected a model with finite outputs. Received: NaN or infinity",
            "Look for NaN in the samples, and evaluate the float model on them.",
        )
    if all(_are_probabilities(batch) for batch in batches):
        return _divergence
    # The variance over all values; where all are equal, their power.
    count = sum(batch.size for batch in batches)
    mean = sum(batch.sum(dtype="float64") for batch in batches) / count
    variance = sum(((batch - mean) ** 2).sum(dtype="float64") for batch in batches) / count
    unit = variance or mean**2 or 1.0
    return lambda output, target: float(np.square(output - target).mean(dtype="float64") / unit)


def _are_probabilities(values: np.ndarray) -> bool:
    if values.ndim < 2 or values.shape[-1] < 2 or values.min() < 0:
        return False
    return bool(np.abs(values.sum(axis=-1) - 1).max() < _PROBABILITY_ERROR)


def _divergence(output: np.ndarray, target: np.ndarray) -> float:
    """Return the divergence with the terms that keep it from falling below 0 where rows sum to 1 only nearly."""
    p, q = target.astype("float64") + _LEAST_PROBABILITY, output.astype("float64") + _LEAST_PROBABILITY
    return float((p * np.log(p / q) - p + q).sum(axis=-1).mean())
