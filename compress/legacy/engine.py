"""TensorFlow Model Optimization at work on Keras 3 models: rebuilt in tf_keras, trained there, and brought back.

What tfmot does not know stays as it is, and is logged. See `compress.legacy.twins` for what can cross.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from compress.data.split import Data, Split, flatten_arrays, map_arrays
from compress.errors import PassError, UsageError
from compress.legacy.twins import from_tf_keras, import_tfmot, make_twin
from compress.models.clusters import find_clusters
from compress.models.copying import copy_compile_settings, copy_model
from compress.models.graph import Graph, copy_graph
from compress.models.patterns import matches, require_matches
from compress.models.task import Task, check_inputs, check_labels, infer_task
from compress.models.walking import find_layers
from compress.progress import track
from compress.quantization.affine import is_linear
from compress.training.fitting import current_observers, settle_batch_norm, steps_in_epoch
from compress.training.options import Training

logger = logging.getLogger(__name__)

_SAMPLE = 256
_LEAST_FREQUENCY, _UPDATES = 20, 50
_INITIALISATIONS = {"linear": "LINEAR", "density": "DENSITY_BASED", "k-means++": "KMEANS_PLUS_PLUS"}


@dataclass(frozen=True)
class Growth:
    """How sparsity grows, in fractions of the training; `None` as `frequency` means about 50 updates.

    Args:
        final: the sparsity at the end.
        begin: when pruning starts.
        end: when the final sparsity is reached; equal to `begin`, it is there at once.
        initial: sparsity at `begin`.
        power: exponent of the polynomial.
        frequency: steps between updates.
    """

    final: float
    begin: float
    end: float
    initial: float
    power: float
    frequency: int | None

    def to_tfmot(self, tfmot: Any, steps: int) -> Any:
        """Return tfmot's schedule for a training of so many steps.

        tfmot stops short of the final sparsity unless its end is a multiple of its frequency behind its begin.
        """
        schedules = tfmot.sparsity.keras
        begin, end = math.ceil(self.begin * steps), round(self.end * steps)
        if end <= begin:
            return schedules.ConstantSparsity(self.final, begin_step=begin, end_step=-1, frequency=1)
        frequency = self.frequency or max(_LEAST_FREQUENCY, round((end - begin) / _UPDATES))
        frequency = min(frequency, end - begin)
        end = begin + (end - begin) // frequency * frequency
        return schedules.PolynomialDecay(self.initial, self.final, begin, end, self.power, frequency)


def prune_with_tfmot(
    model: keras.Model,
    data: Data,
    training: Training,
    growth: Callable[[int], Growth],
    *,
    pattern: str = "unstructured",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> keras.Model:
    """Return a copy of `model` that tfmot's `prune_low_magnitude` has pruned while it trained.

    Args:
        model: a float model; it is not changed.
        data: needs a train split with labels.
        training: how to train.
        growth: returns how sparsity grows in a training of so many steps.
        pattern: `"unstructured"`, N:M or blocks, as our own pruning has it.
        include: shell patterns over layer paths.
        exclude: shell patterns over layer paths.

    Raises:
        UsageError: layers without a counterpart in Keras 2, or none that tfmot prunes.
        SetupError: tfmot is not installed, or Keras has another backend than TensorFlow.
        DataError: no train split or no labels.
        PassError: training failed or its loss was lost.
    """
    tfmot = import_tfmot()
    job = _Job(model, data, training, include, exclude)
    api = tfmot.sparsity.keras
    options = {"pruning_schedule": growth(job.steps).to_tfmot(tfmot, job.steps), **_pattern_options(pattern)}
    wrapped = job.wrap(lambda layer: api.prune_low_magnitude(layer, **options), "mask", "prune")
    job.fit(wrapped, [api.UpdatePruningStep()])
    return job.bring_back(api.strip_pruning(wrapped))


def cluster_with_tfmot(
    model: keras.Model,
    data: Data,
    training: Training,
    clusters: int,
    *,
    initialisation: str = "k-means++",
    per_channel: bool = False,
    keep_zeros: bool = True,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> keras.Model:
    """Return a copy of `model` that tfmot's `cluster_weights` has clustered while it trained.

    Zeros are kept in kernels that hold some. Arguments and errors are those of `prune_with_tfmot`, and:

    Args:
        clusters: the most distinct values of a kernel.
        initialisation: where the centroids start: `"linear"`, `"density"` or `"k-means++"`.
        per_channel: each output channel of a convolution has values of its own.
        keep_zeros: whether zeros stay zero.
    """
    tfmot = import_tfmot()
    job = _Job(model, data, training, include, exclude)
    # Where tfmot's own guide takes it from: the public one cannot keep zeros.
    from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster

    api = tfmot.clustering.keras
    start = getattr(api.CentroidInitialization, _INITIALISATIONS[initialisation])

    def wrap(layer: Any) -> Any:
        sparse = keep_zeros and any(_is_sparse(weight) for weight in layer.get_weights())
        by_channel = per_channel and type(layer).__name__ == "Conv2D"
        for weight in layer.weights:
            if "bias" not in weight.name:
                _require_enough(weight.numpy(), clusters, by_channel, sparse)
        return cluster.cluster_weights(
            layer,
            number_of_clusters=clusters,
            cluster_centroids_init=start,
            preserve_sparsity=sparse,
            cluster_per_channel=by_channel,
        )

    wrapped = job.wrap(wrap, "cluster_centroids", "cluster")
    job.fit(wrapped, [])
    return job.bring_back(api.strip_clustering(wrapped))


def quantize_with_tfmot(
    model: keras.Model,
    data: Data,
    training: Training,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> keras.Model:
    """Return the fake-quantized twin of `model` with the scales that tfmot's quantization-aware training found.

    Zeros and clusters that earlier passes made are kept by tfmot's own schemes for that (PQAT, CQAT, PCQAT).
    Arguments and errors are those of `prune_with_tfmot`.
    """
    job = _Job(model, data, training, include, exclude)
    quantized, zeros = job.quantize(import_tfmot())
    job.fit(quantized, [])
    for layer, places in zeros:  # tfmot rounds masked weights, and lets those behind the mask drift
        layer.set_weights([np.where(zero, 0, w) for w, zero in zip(layer.get_weights(), places, strict=True)])
    found = from_tf_keras(quantized).model
    copy_compile_settings(model, found)
    return found


class _Job:
    """A model, its twin in tf_keras, and the training that both engines give it."""

    def __init__(
        self, model: keras.Model, data: Data, training: Training, include: Sequence[str], exclude: Sequence[str]
    ):
        self._model, self._training = model, training
        self._split = data.require("train", "training")
        x_sample, y = self._split.all() if self._split.in_memory else self._split.head(_SAMPLE)
        x, _ = check_inputs(model, x_sample, self._split.name)
        self._task: Task = infer_task(model, y, map_arrays(lambda array: array[:8], x))
        check_labels(self._task, y, self._split.name)
        self._arrays = (x, y) if self._split.in_memory else None
        self._epoch_steps = steps_in_epoch(self._split, training.batch_size)
        self.steps = self._epoch_steps * training.epochs
        self._graph: Graph = copy_graph(model)
        paths = [node.path for node in self._graph.nodes]
        require_matches(paths, include, "include")
        require_matches(paths, exclude, "exclude")
        self._chosen = {
            node.operation.name
            for node in self._graph.nodes
            if matches(node.path, include) and not matches(node.path, exclude)
        }
        self._twin = make_twin(self._graph)
        self._names = {layer.name: [weight.name for weight in layer.weights] for layer in self._twin.layers}

    def wrap(self, function: Callable[[Any], Any], sign: str, verb: str) -> Any:
        """Return the twin with `function` applied to the chosen layers with weights.

        Args:
            function: wraps a layer of tf_keras, or raises ValueError for one that tfmot does not know.
            sign: how variables begin that only a layer has with which something is done.
            verb: what is done, for messages.
        """
        import tf_keras

        left: list[str] = []

        def mark(layer: Any) -> Any:
            if layer.name not in self._chosen or not layer.get_weights() or not layer.trainable:
                return layer
            try:
                return function(layer)
            except ValueError as error:  # how tfmot says that it does not know a layer
                left.append(f"{layer.name} ({' '.join(str(error).split())[:80]})")
                return layer

        wrapped = tf_keras.models.clone_model(self._twin, clone_function=mark)
        done = [each for each in wrapped.weights if each.name.rpartition("/")[2].startswith(sign)]
        if left:
            logger.info("tfmot leaves these layers as they are: %s", ", ".join(left[:10]))
        if not done:
            raise UsageError(
                f"expected a layer that tfmot can {verb}. Received: {len(self._chosen)} chosen layers, none of which "
                "it knows",
                "Leave out engine: tfmot, or choose other layers with include and exclude.",
            )
        return wrapped

    def quantize(self, tfmot: Any) -> tuple[Any, list[tuple[Any, list[np.ndarray]]]]:
        """Return the twin with tfmot's quantizers, and where the weights of its layers are zero for good."""
        import tf_keras

        api = tfmot.quantization.keras
        registry = api.default_8bit.Default8BitQuantizeRegistry()
        followers = self._batch_norms_behind_kernels()
        left: list[str] = []

        def mark(layer: Any) -> Any:
            known = registry.supports(layer) or layer.name in followers
            if not known and layer.get_weights():
                left.append(layer.name)
            return api.quantize_annotate_layer(layer) if known and layer.name in self._chosen else layer

        marked = tf_keras.models.clone_model(self._twin, clone_function=mark)
        if left:
            logger.info("tfmot leaves these layers in float: %s", ", ".join(left[:10]))
        try:
            quantized = api.quantize_apply(marked, self._scheme(tfmot))
        except Exception as error:  # it raises many types for graphs that it cannot rewrite
            raise PassError(
                f"tfmot cannot quantize this model: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
                "Leave out engine: tfmot; our own passes take any layer.",
            ) from error
        if not any(each.name.partition(":")[0].endswith("kernel_min") for each in quantized.weights):
            raise UsageError("expected a layer that tfmot can quantize. Received: none among those that were chosen")
        inner = [getattr(layer, "layer", layer) for layer in quantized.layers]
        zeros = [(each, [_zeros(weight) for weight in each.get_weights()]) for each in inner if _has_zeros(each)]
        return quantized, zeros

    def _scheme(self, tfmot: Any) -> Any:
        """Return tfmot's scheme for what earlier passes left in the kernels."""
        kernels = [w for layer in self._twin.layers for w in layer.get_weights() if layer.name in self._chosen]
        sparse, combine = any(map(_is_sparse, kernels)), tfmot.experimental.combine
        if any(map(_is_clustered, kernels)):
            return combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=sparse)
        if sparse:
            return combine.Default8BitPrunePreserveQuantizeScheme()
        return tfmot.quantization.keras.default_8bit.Default8BitQuantizeScheme()

    def _batch_norms_behind_kernels(self) -> set[str]:
        """Return the names of batch norms that tfmot's patterns take in: right behind a linear convolution."""
        found = set()
        for node in self._graph.nodes:
            if isinstance(node.operation, keras.layers.BatchNormalization):
                before = self._graph.producer(node.inputs[0])
                alone = before is not None and self._graph.only_consumer(before.output) is node
                known = before is not None and type(before.operation).__name__ in ("Conv2D", "DepthwiseConv2D")
                if alone and known and is_linear(before.operation):
                    found.add(node.operation.name)
        return found

    def fit(self, model: Any, callbacks: list[Any]) -> None:
        """Train a tf_keras model as our own passes train theirs: same loss, optimizer, schedule and batches."""
        import tf_keras

        losses = [_tf_loss(output.loss) for output in self._task.outputs]
        model.compile(_optimizer(tf_keras, self._training, self.steps), loss=losses if len(losses) > 1 else losses[0])
        with track("train (tfmot)", total=self.steps) as advance:
            watch = _watcher(tf_keras, advance)
            called = [*callbacks, watch, *(_forwarder(tf_keras, each) for each in current_observers())]
            try:
                model.fit(**self._arguments(), epochs=self._training.epochs, verbose=0, callbacks=called)
            except Exception as error:
                raise PassError(f"training by tfmot failed: {' '.join(str(error).split())[:300]}") from error
        if watch.lost is not None:
            raise PassError(f"loss became {watch.lost} in a training by tfmot", "Try a lower learning rate.")

    def _arguments(self) -> dict[str, Any]:
        if self._arrays is not None:
            x, y = self._arrays
            return {"x": _as_list(x), "y": _as_list(y), "batch_size": self._training.batch_size}
        return {"x": _endless(self._split), "steps_per_epoch": self._epoch_steps}

    def bring_back(self, stripped: Any) -> keras.Model:
        """Return a copy of the model with the weights of a tf_keras model, layer by layer."""
        copy = copy_model(self._model)
        paths = {path: name for name, path in self._graph.paths.items()}
        layers = {layer.name: layer for layer in stripped.layers}
        for path, layer in find_layers(copy):
            twin = layers.get(paths.get(path, ""))
            if twin is not None and layer.weights:
                found = {weight.name: weight.numpy() for weight in twin.weights}
                names = self._names[twin.name]  # stripping attention layers changes the order
                known = len(found) == len(names) and set(found) == set(names)
                layer.set_weights([found[name] for name in names] if known else twin.get_weights())
        settle_batch_norm(copy, self._split, self.steps)
        return copy


def _pattern_options(pattern: str) -> dict[str, Any]:
    """Return what `prune_low_magnitude` calls a pattern: it counts the zeros of each M, and we what stays."""
    if ":" in pattern:
        kept, of = (int(part) for part in pattern.split(":"))
        return {"sparsity_m_by_n": (of - kept, of)}
    if "x" in pattern:
        return {"block_size": tuple(int(part) for part in pattern.split("x"))}
    return {}


def _optimizer(k: Any, training: Training, steps: int) -> Any:
    rate: Any = training.base_rate()
    if training.learning_rate_schedule == "cosine":
        rate = k.optimizers.schedules.CosineDecay(rate, decay_steps=max(steps, 1))
    if training.optimizer == "sgd":
        return k.optimizers.SGD(rate, momentum=0.9, nesterov=True)
    return {"adam": k.optimizers.Adam, "adamw": k.optimizers.AdamW}[training.optimizer](rate)


def _tf_loss(loss: Any) -> Callable[[Any, Any], Any]:
    """Return a loss of Keras 3 as a plain function, which tf_keras takes: of a class of its own it knows nothing."""
    found = keras.losses.get(loss)

    def compute(y_true: Any, y_pred: Any) -> Any:
        return found(y_true, y_pred)

    return compute


def _as_list(arrays: Any) -> Any:
    """Return several arrays as a list, in the order in which Keras flattens them; a single one as it is."""
    flat = flatten_arrays(arrays)
    return flat[0] if len(flat) == 1 else flat


def _endless(split: Split) -> Iterator[Any]:
    while True:
        for x, y in split.batches():
            yield _as_list(x), _as_list(y)


def _watcher(k: Any, advance: Callable[..., None]) -> Any:
    """Return a callback that reports progress, and stops when the loss is lost."""

    class Watcher(k.callbacks.Callback):
        lost: float | None = None

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            loss = float((logs or {}).get("loss", 0.0))
            advance(1, f"loss {loss:.4g}")
            if not math.isfinite(loss):
                self.lost, self.model.stop_training = loss, True

    return Watcher()


def _forwarder(k: Any, observer: keras.callbacks.Callback) -> Any:
    """Return a callback of tf_keras that tells one of Keras 3 about each epoch."""

    class Forwarder(k.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            observer.on_epoch_end(epoch, logs)

    return Forwarder()


def _is_sparse(weight: np.ndarray) -> bool:
    return weight.ndim > 1 and 0 < np.count_nonzero(weight) < weight.size


def _zeros(weight: np.ndarray) -> np.ndarray:
    return (weight == 0) if _is_sparse(weight) else np.zeros(weight.shape, bool)


def _has_zeros(layer: Any) -> bool:
    return any(_is_sparse(weight) for weight in layer.get_weights())


def _require_enough(weight: np.ndarray, clusters: int, by_channel: bool, sparse: bool) -> None:
    """Raise ValueError for a kernel with fewer weights than clusters, at which tfmot crashes."""
    if weight.ndim > 1:
        parts = np.moveaxis(weight, -1, 0) if by_channel else weight[None]
        fewest = min(np.count_nonzero(part) + 1 if sparse else part.size for part in parts)
        if fewest < clusters:
            raise ValueError(f"{fewest} weights are fewer than {clusters} clusters")


def _is_clustered(weight: np.ndarray) -> bool:
    return weight.ndim > 1 and find_clusters(weight, (weight.ndim - 1,)) is not None
