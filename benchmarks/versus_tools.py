"""The same work by bmcompress and by tfmot, from the same trained weights, for `versus_tfmot.py`.

bmcompress is used by its passes, at their defaults but for epochs and learning rates. tfmot is used as its guides say,
on the net rebuilt in tf_keras; its files are TFLiteConverter's. Both see the same samples in batches of the same size,
Adam along half a cosine, and update masks equally often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from quantization_nets import Arrays, Net, build_resnet8
from quantization_peers import BATCH_SIZE, annotate_known, copy_weights
from sparsity_step import make_clock
from sparsity_tools import CLUSTERING_RATE, FREQUENCY, PRUNING_RATE, growth_of

_BUILD = partial(build_resnet8, stem_strides=2)  # a quarter of the MACs: all of it takes some two hours
NETS = {
    net.name: net
    for net in (
        Net("fashion_resnet8_stride2", "fashion_mnist", _BUILD, epochs=5),
        Net("cifar_resnet8_stride2", "cifar10", _BUILD, epochs=20, augment=True),
    )
}
Steps = tuple[tuple[str, float], ...]
SETTINGS: dict[str, Steps] = {
    "prune 50%": (("prune", 0.5),),
    "prune 80%": (("prune", 0.8),),
    "cluster 16": (("cluster", 16),),
    "cluster 32": (("cluster", 32),),
    "QAT int8": (("qat", 0),),
    "PQAT 50%": (("prune", 0.5), ("qat", 0)),
    "PCQAT 50% 16": (("prune", 0.5), ("cluster", 16), ("qat", 0)),
}
"""Name -> the steps one after the other, each with its sparsity or number of clusters."""


@dataclass
class Job:
    """What a tool works with: a net, its samples, epochs of each training, the seed of its order, and what it made."""

    net: Net
    arrays: Arrays
    keras_file: Path
    epochs: int
    seed: int
    kept: dict[Steps, Any] = field(default_factory=dict)

    @property
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """The training samples."""
        return self.arrays.x_train, self.arrays.y_train

    @property
    def steps(self) -> int:
        """Steps of one training."""
        return -(-len(self.arrays.y_train) // BATCH_SIZE) * self.epochs


def ours_step(job: Job, model: Any, kind: str, value: float) -> Any:
    """Return what a pass of bmcompress makes of a Keras 3 model."""
    import compress

    end, frequency = growth_of(job.steps, FREQUENCY)
    training = {"epochs": job.epochs, "batch_size": BATCH_SIZE}
    if kind == "prune":
        schedule = compress.PolynomialSchedule(end=end / job.steps, frequency=frequency)
        done = compress.MagnitudePruning(sparsity=value, schedule=schedule, learning_rate=PRUNING_RATE, **training)
    elif kind == "cluster":
        done = compress.WeightClustering(clusters=int(value), learning_rate=CLUSTERING_RATE, **training)
    else:
        done = compress.QuantizationAwareTraining(learning_rate=job.net.tuning_rate, **training)
    return done(model, job.data)


def ours_model(job: Job, steps: Steps) -> Any:
    """Return the net after these steps; the model before the last one is kept, as settings begin alike."""
    import keras

    if not steps:
        return keras.saving.load_model(job.keras_file, compile=False)
    if steps not in job.kept:
        before = ours_model(job, steps[:-1])
        keras.utils.set_random_seed(job.seed)
        job.kept[steps] = ours_step(job, before, *steps[-1])
    return job.kept[steps]


def ours(job: Job, steps: Steps, file: Path) -> np.ndarray:
    """Write the file, and return what the trained model answers on the test samples."""
    import compress

    model = ours_model(job, steps)
    compress.export_model(model, file, samples=job.arrays.x_train[:64])
    return np.asarray(model.predict(job.arrays.x_test, batch_size=256, verbose=0))


def tfmot_wrap(job: Job, model: Any, kind: str, value: float) -> tuple[Any, list[Any], Callable[[Any], Any], float]:
    """Return the wrapped tf_keras model, its callbacks, what strips it, and the learning rate."""
    import tensorflow_model_optimization as tfmot
    import tf_keras
    from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster

    sparse = any(0 < np.count_nonzero(w) < w.size for w in model.get_weights() if w.ndim > 1)
    if kind == "prune":
        api = tfmot.sparsity.keras
        end, frequency = growth_of(job.steps, FREQUENCY)
        schedule = api.PolynomialDecay(0.0, value, 0, end, frequency=frequency)
        wrapped = api.prune_low_magnitude(model, pruning_schedule=schedule)
        return wrapped, [api.UpdatePruningStep()], api.strip_pruning, PRUNING_RATE
    if kind == "cluster":
        api = tfmot.clustering.keras
        start = api.CentroidInitialization.KMEANS_PLUS_PLUS
        wrapped = cluster.cluster_weights(model, int(value), start, preserve_sparsity=sparse)
        return wrapped, [], api.strip_clustering, CLUSTERING_RATE
    combine, api = tfmot.experimental.combine, tfmot.quantization.keras
    clustered = min(len(np.unique(w)) / w.size for w in model.get_weights() if w.ndim > 3) < 0.1 and sparse
    scheme = combine.Default8BitPrunePreserveQuantizeScheme() if sparse else None
    scheme = combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=True) if clustered else scheme
    if scheme is not None:
        wrapped = api.quantize_apply(api.quantize_annotate_model(model), scheme)
        strip = combine.strip_clustering_cqat if clustered else (lambda each: each)
        return wrapped, [], strip, job.net.tuning_rate
    try:
        wrapped = api.quantize_model(model)
    except Exception:  # it refuses whole models for one layer, with several error types
        wrapped = annotate_known(tfmot, tf_keras, model)
    return wrapped, [], lambda each: each, job.net.tuning_rate


def tfmot_model(job: Job) -> Any:
    """Return the net in tf_keras, with the trained weights."""
    import keras
    import tf_keras

    model = job.net.build(tf_keras, job.arrays.x_train.shape[1:])
    copy_weights(keras.saving.load_model(job.keras_file, compile=False), model)
    return model


def tfmot_trained(job: Job, steps: Steps) -> Any:
    """Return the tf_keras net after these steps; only weights are kept, as tfmot changes the models that it wraps."""
    import tf_keras

    model = tfmot_model(job)
    if not steps:
        return model
    if steps[-1][0] != "qat" and steps in job.kept:
        model.set_weights(job.kept[steps])
        return model
    model = tfmot_trained(job, steps[:-1])
    tf_keras.utils.set_random_seed(job.seed)
    wrapped, callbacks, strip, rate = tfmot_wrap(job, model, *steps[-1])
    decay = tf_keras.optimizers.schedules.CosineDecay(rate, job.steps)
    wrapped.compile(tf_keras.optimizers.Adam(decay), "sparse_categorical_crossentropy")
    wrapped.fit(*job.data, batch_size=BATCH_SIZE, epochs=job.epochs, callbacks=callbacks, verbose=0)
    model = strip(wrapped)
    job.kept[steps] = model.get_weights()
    return model


def tfmot(job: Job, steps: Steps, file: Path) -> np.ndarray:
    """Write the file, and return what the trained model answers on the test samples."""
    import tensorflow as tf

    model = tfmot_trained(job, steps)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if steps[-1][0] == "qat":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    file.write_bytes(converter.convert())
    return np.asarray(model.predict(job.arrays.x_test, batch_size=256, verbose=0))


TOOLS: dict[str, Callable[[Job, Steps, Path], np.ndarray]] = {"ours": ours, "tfmot": tfmot}


def timed_trainings(job: Job) -> dict[tuple[str, str], Callable[[], tuple[float, float]]]:
    """Return short trainings by tool and kind, `plain` among them; each call returns wall and CPU seconds."""
    import keras
    import tf_keras

    found: dict[tuple[str, str], Callable[[], tuple[float, float]]] = {}

    def add(tool: str, kind: str, k: Any, model: Any, make_callbacks: Callable[[], list[Any]]) -> None:
        model.compile(k.optimizers.Adam(1e-5), "sparse_categorical_crossentropy")

        def run() -> tuple[float, float]:
            clock = make_clock(k)
            model.fit(*job.data, batch_size=BATCH_SIZE, verbose=0, callbacks=[*make_callbacks(), clock])
            return clock.seconds

        found[tool, kind] = run

    for kind, (model, make_callbacks) in _our_models(job).items():
        add("ours", kind, keras, model, make_callbacks)
    add("tfmot", "plain", tf_keras, tfmot_model(job), list)
    for setting, steps in SETTINGS.items():
        model = tfmot_model(job)
        for kind, value in steps[:-1]:
            _set_structure(model, kind, value)
        wrapped, callbacks, _, _ = tfmot_wrap(job, model, *steps[-1])
        add("tfmot", setting, tf_keras, wrapped, lambda callbacks=callbacks: callbacks)
    return found


def _our_models(job: Job) -> dict[str, tuple[Any, Callable[[], list[Any]]]]:
    import keras

    import compress
    from compress.passes.holding import hold_structure

    def load() -> Any:
        return keras.saving.load_model(job.keras_file, compile=False)

    end, frequency = growth_of(job.steps, FREQUENCY)
    schedule = compress.PolynomialSchedule(end=end / job.steps, frequency=frequency)
    found: dict[str, tuple[Any, Callable[[], list[Any]]]] = {"plain": (load(), list)}
    for setting, steps in SETTINGS.items():
        model = load()
        for kind, value in steps[:-1]:
            _set_structure(model, kind, value)
        kind, value = steps[-1]
        if kind == "qat":
            model = compress.calibrate(compress.fake_quantize(model, "int8", ranges="moving"), job.arrays.x_train[:256])
            found[setting] = model, lambda model=model: hold_structure(model)
        elif kind == "prune":
            found[setting] = model, lambda value=value: [compress.Pruning(value, schedule=schedule)]
        else:
            found[setting] = model, lambda value=value: [compress.Clustering(int(value))]
    return found


def _set_structure(model: Any, kind: str, value: float) -> None:
    """Prune or cluster the kernels of a model of either Keras at once, for what is timed afterwards."""
    for layer in model.layers:
        weights = layer.get_weights()
        for index, weight in enumerate(weights):
            if weight.ndim > 1:
                weights[index] = _pruned(weight, value) if kind == "prune" else _clustered(weight, int(value))
        layer.set_weights(weights)


def _pruned(weight: np.ndarray, sparsity: float) -> np.ndarray:
    return np.where(np.abs(weight) <= np.quantile(np.abs(weight), sparsity), 0, weight).astype(weight.dtype)


def _clustered(weight: np.ndarray, clusters: int) -> np.ndarray:
    values = np.append(np.linspace(weight.min(), weight.max(), clusters - 1), 0).astype(weight.dtype)
    nearest = values[np.abs(weight[..., None] - values).argmin(-1)]
    return np.where(weight == 0, 0, nearest).astype(weight.dtype)
