"""What is in a `.keras` file: layers, shapes, weights, sparsity, MACs, and what each pass would touch.

Read from the file alone: no framework is imported and nothing in the file is built, so unknown and unsafe
models can be looked at too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import ModelError
from compress.files import sha256_of
from compress.models.archive import Archive, read_archive
from compress.models.gatekeeper import custom_classes, is_keras_object
from compress.models.kernel_counts import count_kernel, output_axes
from compress.models.layer_table import LAYERS
from compress.models.macs import LayerCall, count_macs, has_formula
from compress.models.patterns import matches, require_matches
from compress.models.shapes import Shape
from compress.models.structure import (
    NamedWeight,
    SavedLayer,
    SavedModel,
    as_shape,
    dtype_policy,
    is_container,
    name_weights,
    open_model,
)
from compress.models.weight_store import WeightGroup

_ALL = ("*",)
UNKNOWN = "unknown"


@dataclass(frozen=True)
class KernelSummary:
    """One kernel: `zeros` of its `size` elements are zero, `distinct` values differ, of which one output channel has at
    most `distinct_in_channel`; each takes `bits`."""

    path: str
    shape: tuple[int, ...]
    size: int
    zeros: int
    distinct: int
    distinct_in_channel: int
    bits: int


@dataclass(frozen=True)
class LayerSummary:
    """One layer; layers inside a wrapper, a recurrent layer or an attention layer are counted in its row.

    Args:
        path: names joined by `"/"`, such as `"encoder/conv1"`.
        class_name: class of the layer; `"unknown"` inside a subclassed model.
        input_shapes: shapes of the first call, batch axis included.
        output_shape: shape that it gives, or `None` if unknown.
        calls: how often it is used.
        dtype: dtype policy, or `None`.
        trainable: false if frozen.
        parameters: stored weights.
        nonzero: those that are not zero.
        kernel_sparsity: fraction of zeros in its kernels, or `None` without kernels.
        macs: multiply-accumulates for batch 1 over all calls, or `None` if unknown.
        kernels: what pruning may change.
        passes: what each pass would do with it, or why not.
    """

    path: str
    class_name: str
    input_shapes: tuple[Shape, ...]
    output_shape: Shape | None
    calls: int
    dtype: str | None
    trainable: bool
    parameters: int
    trainable_parameters: int
    nonzero: int
    kernel_sparsity: float | None
    macs: int | None
    kernels: tuple[KernelSummary, ...]
    passes: dict[str, str]


@dataclass(frozen=True)
class TensorSummary:
    """An input or output of the model."""

    name: str
    shape: Shape | None
    dtype: str | None


@dataclass(frozen=True)
class ModelSummary:
    """What is in a `.keras` file.

    Args:
        macs: multiply-accumulates for batch 1 of all layers that have a formula.
        macs_partial: true if `macs_missing` names layer types that are left out.
        distinct: distinct values of each kernel, summed over kernels.
        weight_bytes: bytes of the model's weights, optimizer left out.
        custom_classes: classes that are not part of Keras, to be allowed before the model can be loaded.
        loss, metrics, optimizer: names, as compiled, or `None`.
    """

    path: str
    name: str
    class_name: str
    keras_version: str | None
    date_saved: str | None
    size_bytes: int
    sha256: str
    inputs: tuple[TensorSummary, ...]
    outputs: tuple[TensorSummary, ...]
    parameters: int
    trainable_parameters: int
    nonzero: int
    kernel_parameters: int
    kernel_sparsity: float | None
    distinct: int
    weight_bytes: int
    macs: int
    macs_partial: bool
    macs_missing: tuple[str, ...]
    optimizer: Any
    loss: Any
    metrics: Any
    custom_classes: tuple[str, ...]
    layers: tuple[LayerSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ready for JSON."""
        return asdict(self)


def inspect_model(path: str | Path, include: Sequence[str] = _ALL, exclude: Sequence[str] = ()) -> ModelSummary:
    """Return what is in the `.keras` file at `path`, without importing a framework.

    Args:
        path: a `.keras` file; it may hold custom or unsafe layers, which are named.
        include: shell patterns over layer or kernel paths that pruning would be limited to.
        exclude: shell patterns that pruning would leave alone.

    Raises:
        ModelError: the file is missing, damaged or no `.keras` file.
        UsageError: a pattern matches nothing.
    """
    with read_archive(path) as archive:
        try:
            model = _open(archive)
            custom = tuple(custom_classes(archive.config))
            layers, weight_bytes = _summarise_layers(model, include, exclude)
        except ModelError as error:
            raise ModelError(f"{path}: {error.message}", error.help) from None
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise ModelError(f"{path}: config.json is damaged: {type(error).__name__}: {error}"[:200]) from error
        paths = [layer.path for layer in layers] + [kernel.path for layer in layers for kernel in layer.kernels]
        if tuple(include) != _ALL:
            require_matches(paths, include, "include")
        require_matches(paths, exclude, "exclude")
        return _summarise(archive, model, layers, weight_bytes, custom)


def _open(archive: Archive) -> SavedModel:
    """Return the layers from the configuration or, for a subclassed model, from the weights."""
    if is_container(archive.config):
        return open_model(archive.config, archive.weights)
    options = archive.config["config"]
    shape = as_shape((archive.config.get("build_config") or {}).get("input_shape"))
    model = SavedModel(inputs=[("input", shape, None)])
    top = [group for key, group in archive.weights.children.items() if key != "optimizer"]
    own = WeightGroup("", archive.weights.name, archive.weights.weights)
    for group in [own, *_outermost(top)]:
        if any(True for _ in group.all_weights()):
            name = group.name or group.path.rpartition("/")[2] or "model"
            model.layers.append(
                SavedLayer(name, UNKNOWN, {}, None, group, trainable=options.get("trainable") is not False)
            )
    return model


def _outermost(groups: Iterable[WeightGroup]) -> Iterable[WeightGroup]:
    """Yield the named groups that are in no other named group: lists of layers have no name."""
    for group in groups:
        if group.name is not None or group.weights:
            yield group
        else:
            yield from _outermost(group.children.values())


def _summarise_layers(
    model: SavedModel, include: Sequence[str], exclude: Sequence[str]
) -> tuple[tuple[LayerSummary, ...], int]:
    """Return a row per layer, and the bytes of all weights."""
    rows, weight_bytes = [], 0
    for layer in model.layers:
        weights = list(name_weights(layer.kind, layer.options, layer.group, layer.path))
        macs = _layer_macs(layer, weights)
        nonzero, kernels = 0, []
        for weight in weights:
            values = weight.stored.read()
            nonzero += int(np.count_nonzero(values))
            weight_bytes += weight.stored.size_bytes
            if weight.is_kernel:
                kernels.append(_summarise_kernel(weight, values))
        trained = sum(weight.stored.size for weight in weights if layer.trainable and not weight.is_frozen)
        rows.append(
            LayerSummary(
                path=layer.path,
                class_name=layer.kind,
                input_shapes=tuple(layer.inputs[0]) if layer.inputs else (),
                output_shape=layer.output,
                calls=layer.repeats * max(1, len(layer.inputs)),
                dtype=dtype_policy(layer.options.get("dtype")),
                trainable=layer.trainable,
                parameters=sum(weight.stored.size for weight in weights),
                trainable_parameters=trained,
                nonzero=nonzero,
                kernel_sparsity=_sparsity(kernels),
                macs=macs,
                kernels=tuple(kernels),
                passes={
                    "prune": _explain_prune(layer, weights, include, exclude),
                    "distill": _explain_distill(layer, weights, trained),
                },
            )
        )
    return tuple(rows), weight_bytes


def _summarise_kernel(weight: NamedWeight, values: np.ndarray) -> KernelSummary:
    axes = output_axes(weight.kind, weight.path.rpartition("/")[2]) if values.ndim >= 2 else (-1,)
    count = count_kernel(weight.path, values, channel_axes=axes)
    return KernelSummary(
        count.name, count.shape, count.size, count.zeros, count.distinct, count.distinct_in_channel, count.bits
    )


def _layer_macs(layer: SavedLayer, weights: list[NamedWeight]) -> int | None:
    """Return the multiply-accumulates of a layer over all of its calls."""
    kernels = tuple((w.path[len(layer.path) + 1 :], w.stored.shape) for w in weights if w.is_kernel)
    keras = layer.kind != UNKNOWN and is_keras_object(layer.kind, layer.module)
    if not layer.inputs:
        known = keras and not weights
        return count_macs(LayerCall(layer.kind, layer.options, [], kernels, bool(weights))) if known else None
    total = 0
    for shapes in layer.inputs:
        wrapped = layer.options.get("layer")
        if layer.kind == "TimeDistributed" and isinstance(wrapped, dict) and is_container(wrapped) and shapes:
            count = _repeated_model_macs(wrapped, layer, shapes[0])
        else:
            count = count_macs(LayerCall(layer.kind, layer.options, shapes, kernels, bool(weights), keras))
        if count is None:
            return None
        total += count
    return total * layer.repeats


def _repeated_model_macs(node: dict[str, Any], layer: SavedLayer, shape: Shape) -> int | None:
    """Return the multiply-accumulates of a whole model that runs once per time step."""
    if len(shape) < 2 or shape[1] is None:
        return None
    group = layer.group.children.get("layer", WeightGroup(""))
    inner = open_model(node, group, inputs=[(shape[0], *shape[2:])])
    counts = [
        _layer_macs(each, list(name_weights(each.kind, each.options, each.group, each.path))) for each in inner.layers
    ]
    return None if None in counts else shape[1] * sum(count for count in counts if count is not None)


def _explain_prune(
    layer: SavedLayer, weights: list[NamedWeight], include: Sequence[str], exclude: Sequence[str]
) -> str:
    """Say what magnitude pruning would change in this layer, or why nothing."""
    if not weights:
        return "no: no weights"
    if layer.kind == UNKNOWN:
        return "unknown: the layers of a subclassed model are not in the file"
    kernels = [weight for weight in weights if weight.is_kernel and len(weight.stored.shape) >= 2]
    if not kernels:
        if layer.kind not in LAYERS:
            return f"unknown layer type {layer.kind}: kernels are told by their names once it is loaded"
        return "no: normalization" if "Normalization" in layer.kind else "no: no kernel"
    if not layer.trainable:
        return "no: frozen"
    if quantized := next((weight.stored.dtype for weight in kernels if "float" not in weight.stored.dtype), None):
        return f"no: the kernel is {quantized}"
    included = [weight for weight in kernels if matches(weight.path, include)]
    chosen = [weight for weight in included if not matches(weight.path, exclude)]
    if not chosen:
        return "no: excluded by pattern" if included else "no: not included by pattern"
    size = sum(weight.stored.size for weight in chosen)
    return f"{len(chosen)} kernel{'s' if len(chosen) > 1 else ''}, {size:,} weights"


def _explain_distill(layer: SavedLayer, weights: list[NamedWeight], trained: int) -> str:
    """Say what distillation would train in this layer, or why nothing."""
    if not weights:
        return "no: no weights"
    if trained:
        return f"all {trained:,} trainable weights"
    return "no: no trainable weights" if layer.trainable else "no: frozen"


def _summarise(
    archive: Archive,
    model: SavedModel,
    layers: tuple[LayerSummary, ...],
    weight_bytes: int,
    custom: tuple[str, ...],
) -> ModelSummary:
    kernels = [kernel for layer in layers for kernel in layer.kernels]
    options, compiled = archive.config["config"], archive.config.get("compile_config") or {}
    missing = sorted({_name_missing(layer) for layer in layers if layer.macs is None})
    version, date = archive.metadata.get("keras_version"), archive.metadata.get("date_saved")
    return ModelSummary(
        path=str(archive.path),
        name=str(options.get("name") or archive.weights.name or archive.config["class_name"]),
        class_name=str(archive.config["class_name"]),
        keras_version=version if isinstance(version, str) else None,
        date_saved=date if isinstance(date, str) else None,
        size_bytes=archive.size_bytes,
        sha256=sha256_of(archive.path),
        inputs=tuple(TensorSummary(*each) for each in model.inputs),
        outputs=tuple(TensorSummary(*each) for each in model.outputs),
        parameters=sum(layer.parameters for layer in layers),
        trainable_parameters=sum(layer.trainable_parameters for layer in layers),
        nonzero=sum(layer.nonzero for layer in layers),
        kernel_parameters=sum(kernel.size for kernel in kernels),
        kernel_sparsity=_sparsity(kernels),
        distinct=sum(kernel.distinct for kernel in kernels),
        weight_bytes=weight_bytes,
        macs=sum(layer.macs or 0 for layer in layers),
        macs_partial=bool(missing),
        macs_missing=tuple(missing),
        optimizer=_describe(compiled.get("optimizer")) if isinstance(compiled, dict) else None,
        loss=_describe(compiled.get("loss")) if isinstance(compiled, dict) else None,
        metrics=_describe(compiled.get("metrics")) if isinstance(compiled, dict) else None,
        custom_classes=custom,
        layers=layers,
    )


def _name_missing(layer: LayerSummary) -> str:
    """Return a layer type that was not counted, saying when only its shape or weights were missing."""
    return f"{layer.class_name} (shape or weights unknown)" if has_formula(layer.class_name) else layer.class_name


def _sparsity(kernels: Sequence[KernelSummary]) -> float | None:
    size = sum(kernel.size for kernel in kernels)
    return sum(kernel.zeros for kernel in kernels) / size if size else None


def _describe(value: Any) -> Any:
    """Return a saved loss, metric or optimizer as names, keeping lists and dicts of them."""
    if isinstance(value, list):
        return [_describe(item) for item in value]
    if isinstance(value, dict):
        if "class_name" in value:
            return str(value.get("config") if value["class_name"] == "function" else value["class_name"])
        return {str(key): _describe(item) for key, item in value.items()}
    return value
