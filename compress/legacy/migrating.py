"""From a file of Keras 2 to a model of Keras 3 that computes the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import keras

from compress.errors import ModelError
from compress.legacy.building import Builder, BuiltLayer
from compress.legacy.files import LegacyModel, open_legacy
from compress.legacy.filling import Filled, fill
from compress.legacy.gates import scale_gates
from compress.legacy.quantizers import name_in_keras3, quantize_weights, set_ranges, slots_of
from compress.models.gatekeeper import SizeLimit
from compress.models.graph import rename_outputs


@dataclass(frozen=True)
class Migration:
    """A model that came from Keras 2, and what was carried over.

    Args:
        model: the model, not compiled.
        keras_version: of the Keras that saved the file.
        layers: how many layers it has, those of nested models counted.
        unwrapped: how many wrappers of tfmot were taken off, by kind.
        masks: how many weights had a mask of tfmot, which is in their zeros now.
        clusters: how many weights were clustered.
        ranges: how many ranges of activations were carried over.
        quantized: how many weights are rounded to tfmot's scales.
    """

    model: keras.Model
    keras_version: str
    layers: int
    unwrapped: dict[str, int]
    masks: int
    clusters: int
    ranges: int
    quantized: int

    def sentences(self) -> list[str]:
        """Return what was carried over, in words."""
        told = [f"{count} wrappers of tfmot's {kind} taken off" for kind, count in self.unwrapped.items()]
        told += [f"{self.masks} masks applied: the zeros are in the weights"] if self.masks else []
        told += [f"{self.clusters} weights hold their centroids"] if self.clusters else []
        if self.quantized or self.ranges:
            told.append(
                f"{self.quantized} weights and {self.ranges} activations are rounded to the scales that tfmot trained; "
                "open the file with compress.load_model"
            )
        return told

    def to_dict(self) -> dict[str, object]:
        """Return what was carried over as plain values, without the model."""
        return {key: value for key, value in vars(self).items() if key != "model"}


def migrate_model(path: str | Path, *, allow_imports: tuple[str, ...] = ()) -> Migration:
    """Return the Keras 3 model that computes what the one of Keras 2 in `path` does.

    Wrappers of TensorFlow Model Optimization are taken off: masks are applied, clustered weights are their centroids,
    and a model of its quantization-aware training becomes a fake-quantized one with the same scales, in which batch
    norm is folded. Neither TensorFlow's Keras 2 nor tfmot is imported, and nothing in the file is executed.

    Args:
        path: an `.h5` file, or a `.keras` file of Keras 2.
        allow_imports: top-level packages whose Keras 3 layers the file may name; they are imported.

    Raises:
        ModelError: the file is missing, damaged or unsafe, or holds a layer, option or function without a counterpart,
            which is named.
    """
    with open_legacy(path) as legacy:
        return migrate(legacy, allow_imports)


def migrate(legacy: LegacyModel, allow_imports: tuple[str, ...] = ()) -> Migration:
    """Return the Keras 3 model for a serialised one of Keras 2; see `migrate_model`."""
    builder = Builder(allow_imports, SizeLimit(legacy.elements))
    model, built = builder.build(legacy.node)
    filled = fill(built, legacy)
    layers = [each for outer in built for each in outer.walk()]
    for each in layers:
        scale_gates(each.layer)
    ranges = _set_activation_ranges(layers, filled)
    weights = _weight_ranges(layers, filled)
    if weights or ranges:
        names = _output_names(legacy, built)
        model = quantize_weights(model, weights)
        model = rename_outputs(model, names) if names else model
    return Migration(
        model=model,
        keras_version=legacy.keras_version,
        layers=len(layers),
        unwrapped=dict(Counter(wrapper.kind for each in layers for wrapper in each.wrappers)),
        masks=filled.masks,
        clusters=filled.clusters,
        ranges=ranges,
        quantized=sum(len(each) for each in weights.values()),
    )


def _output_names(legacy: LegacyModel, built: list[BuiltLayer]) -> list[str]:
    """Return what the outputs were called before tfmot wrapped the layers that make them."""
    inner = {each.name: str(each.config.get("name", each.name)) for each in built}
    saved = legacy.node["config"].get("output_layers") if isinstance(legacy.node["config"], dict) else None
    if not isinstance(saved, list):
        return [inner[built[-1].name]] if saved is None else []
    flat = [saved] if saved and isinstance(saved[0], str) else saved
    return [inner.get(item[0], item[0]) for item in flat]


def _set_activation_ranges(layers: list[BuiltLayer], filled: Filled) -> int:
    count = 0
    for each in layers:
        if each.quantizers:
            inner = next((wrapper.inner for wrapper in each.wrappers if wrapper.kind == "quantization"), each.name)
            set_ranges(each.quantizers, filled.state.get(inner, {}), each.name)
            count += len(each.quantizers)
    return count


def _weight_ranges(layers: list[BuiltLayer], filled: Filled) -> dict:
    found = {}
    for each in layers:
        for wrapper in each.wrappers:
            if wrapper.kind == "quantization" and each.layer is not None:
                state = filled.state.get(wrapper.inner, {})
                names = slots_of(wrapper, each.kind, each.config).weights
                if missing := [name for name in names if f"{name}_min" not in state or f"{name}_max" not in state]:
                    raise ModelError(f"{each.name!r}: the range of its weight {missing[0][:60]!r} is missing.")
                if names:
                    found[each.layer.name] = {
                        name_in_keras3(each.layer, name): (state[f"{name}_min"], state[f"{name}_max"]) for name in names
                    }
    return found
