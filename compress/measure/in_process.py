"""Quality of a Keras model between passes, in this process; exported files are measured in their runtimes."""

from __future__ import annotations

import keras
import numpy as np

from compress.data.split import Split
from compress.measure.quality import evaluate_outputs
from compress.models.task import Task, pair_labels


def predict_outputs(model: keras.Model, split: Split, batch_size: int = 256) -> list[np.ndarray]:
    """Return every output of `model` over `split`, each `(samples, ...)`, in Keras' order.

    Args:
        model: a built model.
        split: inputs as the model takes them.
        batch_size: samples per step of an in-memory split.
    """
    batches = (model.predict_on_batch(x) for x, _ in split.batches(batch_size))
    outputs = [[np.asarray(leaf) for leaf in keras.tree.flatten(batch)] for batch in batches]
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def measure_model(model: keras.Model, split: Split, task: Task) -> dict[str, float]:
    """Return the quality of `model` on `split` by metric, such as `{"accuracy": 0.97}`; empty without labels."""
    if not split.has_labels:
        return {}
    outputs = predict_outputs(model, split)
    _, y = split.all()
    labels = pair_labels([output.name for output in task.outputs], y)
    if any(label is None for label in labels.values()):
        return {}
    quality = evaluate_outputs(outputs, list(labels.values()), task.outputs)
    return {name: metric.value for name, metric in quality.metrics.items() if metric.value is not None}
