"""The same pruning and clustering by bmcompress and by tfmot: one function per tool, which writes a TFLite file.

Both start from the same trained weights and see the same samples, epochs, optimizer, learning rate, share of the
training in which sparsity grows, and steps between mask updates. tfmot works on the net rebuilt in tf_keras, and its
file is TFLiteConverter's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantization_nets import Arrays, Net, tuning_samples
from quantization_peers import BATCH_SIZE, copy_weights

GROWING = 0.7  # share of the training after which the final sparsity stays
# Steps between two mask updates: with tfmot's default of 100 a training as short as this one has a handful of them,
# and either tool loses many points.
FREQUENCY = 20
tfmot_frequency = FREQUENCY
PRUNING_RATE, CLUSTERING_RATE = 1e-3, 3e-4


@dataclass(frozen=True)
class Setting:
    """What is done to a net: `sparsity`, a pattern n:m, or `clusters`."""

    name: str
    sparsity: float = 0.0
    n_of_m: tuple[int, int] | None = None
    clusters: int = 0

    @property
    def rate(self) -> float:
        """Learning rate at the start of the training, for every tool."""
        return CLUSTERING_RATE if self.clusters else PRUNING_RATE


SETTINGS = {
    setting.name: setting
    for setting in (
        *(Setting(f"{percent}%", sparsity=percent / 100) for percent in (50, 80, 90, 95)),
        Setting("2:4", sparsity=0.5, n_of_m=(2, 4)),
        *(Setting(f"{count} clusters", clusters=count) for count in (16, 32)),
    )
}


def fit(k: Any, model: Any, net: Net, arrays: Arrays, epochs: int, rate: float, callbacks: list[Any]) -> None:
    """Train a model of Keras or tf_keras: Adam along half a cosine to 0."""
    x, y, epochs = tuning_samples(net, arrays, epochs)
    schedule = k.optimizers.schedules.CosineDecay(rate, -(-len(y) // BATCH_SIZE) * epochs)
    model.compile(k.optimizers.Adam(schedule), "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs, callbacks=callbacks, verbose=0)


def steps_of(net: Net, arrays: Arrays, epochs: int) -> int:
    """Return how many steps a training of so many passes over the samples takes."""
    _, y, epochs = tuning_samples(net, arrays, epochs)
    return -(-len(y) // BATCH_SIZE) * epochs


def growth_of(steps: int, frequency: int) -> tuple[int, int]:
    """Return the step at which a tool reaches the final sparsity, and the steps between two mask updates.

    tfmot stops short of the final sparsity unless the first is a multiple of the second.
    """
    end = round(GROWING * steps)
    frequency = min(frequency, end)
    return round(end / frequency) * frequency, frequency


def ours(net: Net, arrays: Arrays, keras_file: Path, setting: Setting, epochs: int, file: Path) -> None:
    """Train with a callback of bmcompress, and export."""
    import keras

    import compress

    keras.utils.set_random_seed(0)
    model = keras.saving.load_model(keras_file, compile=False)
    steps = steps_of(net, arrays, epochs)
    if setting.clusters:
        callback = compress.Clustering(setting.clusters)
    else:
        end, frequency = growth_of(steps, FREQUENCY)
        callback = compress.Pruning(
            setting.sparsity,
            schedule=compress.ConstantSchedule()
            if setting.n_of_m
            else compress.PolynomialSchedule(end=end / steps, frequency=frequency),
            pattern="{}:{}".format(*setting.n_of_m) if setting.n_of_m else "unstructured",
            exclude=[_first_convolution(model).name] if setting.n_of_m else [],  # it has 1 or 3 inputs
        )
    fit(keras, model, net, arrays, epochs, setting.rate, [callback])
    compress.export_model(model, file, samples=arrays.x_train[:64])


def tfmot(net: Net, arrays: Arrays, keras_file: Path, setting: Setting, epochs: int, file: Path) -> None:
    """Train with tfmot's wrappers in tf_keras, strip them, and convert as its guides do."""
    import keras
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot
    import tf_keras

    tf_keras.utils.set_random_seed(0)
    model = net.build(tf_keras, arrays.x_train.shape[1:])
    copy_weights(keras.saving.load_model(keras_file, compile=False), model)
    api, callbacks = tfmot.sparsity.keras, []
    if setting.clusters:
        api = tfmot.clustering.keras
        wrapped = api.cluster_weights(model, setting.clusters, api.CentroidInitialization.KMEANS_PLUS_PLUS)
        strip = api.strip_clustering
    else:
        end, frequency = growth_of(steps_of(net, arrays, epochs), tfmot_frequency)
        options = {"pruning_schedule": api.PolynomialDecay(0.0, setting.sparsity, 0, end, frequency=frequency)}
        if setting.n_of_m:
            options = {"pruning_schedule": api.ConstantSparsity(0.5, 0), "sparsity_m_by_n": setting.n_of_m}
        first = _first_convolution(model) if setting.n_of_m else None

        def wrap(layer: Any) -> Any:
            return layer if layer is first else api.prune_low_magnitude(layer, **options)

        wrapped = tf_keras.models.clone_model(model, clone_function=wrap)
        callbacks, strip = [api.UpdatePruningStep()], api.strip_pruning
    fit(tf_keras, wrapped, net, arrays, epochs, setting.rate, callbacks)
    file.write_bytes(tf.lite.TFLiteConverter.from_keras_model(strip(wrapped)).convert())


def _first_convolution(model: Any) -> Any:
    return next(layer for layer in model.layers if type(layer).__name__ == "Conv2D")


TOOLS = {"ours": ours, "tfmot": tfmot}
"""Name -> function `(net, arrays, keras_file, setting, epochs, file)`."""
