"""Weights of a Keras 2 model, put into the layers that were built for them; what wrappers of tfmot did is applied.

`.h5` files list weights by layer, the trained ones first; `.keras` archives have a tree that follows the attributes of
layers. Every weight must find its place, and every place its weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from compress.errors import ModelError
from compress.legacy.building import BuiltLayer
from compress.legacy.files import LegacyModel, NamedArray
from compress.legacy.quantizers import name_in_keras3, slots_of
from compress.legacy.wrappers import INPUT_QUANTIZER, Wrapper, clustered, leaf, masked
from compress.models.structure import match_groups
from compress.models.walking import path_inside
from compress.models.weight_store import WeightGroup


@dataclass
class Filled:
    """What was found beside the weights.

    Args:
        masks: how many weights had a mask.
        clusters: how many weights were clustered.
        state: what wrappers and quantizers of tfmot kept, by the name of the layer inside; of quantizers of inputs, by
            their own.
    """

    masks: int = 0
    clusters: int = 0
    state: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def fill(built: list[BuiltLayer], legacy: LegacyModel) -> Filled:
    """Set the weights of `built` to those of `legacy`.

    Raises:
        ModelError: a weight without a place, a place without a weight, or one of another shape.
    """
    filled = Filled()
    if isinstance(legacy.weights, WeightGroup):
        _Tree(filled).fill_layers(built, legacy.node, legacy.weights)
    else:
        for each in built:
            _fill_from_list(each, legacy.weights.get(each.name, []), filled)
    return filled


def _fill_from_list(built: BuiltLayer, arrays: list[NamedArray], filled: Filled) -> None:
    """Set the weights of a layer, or of all layers of a nested model, which are in one list.

    Layers that tfmot had wrapped take theirs by name, the rest by order.
    """
    taken: set[int] = set()
    placed: set[int] = set()
    for leaf_layer in built.walk():
        if leaf_layer.kind == INPUT_QUANTIZER:
            state = [array for array in arrays if array.name.partition("/")[0] == leaf_layer.name]
            filled.state[leaf_layer.name] = {leaf(array.name): array.value for array in state}
            taken |= {id(array) for array in state}
        for wrapper in leaf_layer.wrappers:
            state = [array for array in arrays if id(array) not in taken and wrapper.is_state(array)]
            own = [array for array in arrays if id(array) not in taken and wrapper.owns(array)]
            own = [array for array in own if not wrapper.is_state(array)]
            taken |= {id(array) for array in [*state, *own]}
            if leaf_layer.layer is None:
                continue
            weights = _by_name(leaf_layer, wrapper, own)
            _apply(wrapper, weights, state, filled)
            for variable in leaf_layer.layer.weights:
                key = path_inside(variable, leaf_layer.layer)
                if key in weights:
                    _assign(variable, weights.pop(key), built.name)
                    placed.add(id(variable))
            if weights:
                raise ModelError(f"{built.name!r}: the weight {next(iter(weights))!r} has no place.")
    rest = [array for array in arrays if id(array) not in taken]
    places = [variable for variable in _in_saved_order(built.layer) if id(variable) not in placed]
    if len(rest) != len(places):
        raise ModelError(
            f"{built.name!r} ({built.kind}) has {len(places)} weights, and the file {len(rest)} for it: "
            f"{', '.join(array.name for array in rest[:4])}"
        )
    for array, variable in zip(rest, places, strict=True):
        _assign(variable, array.value, built.name)


def _in_saved_order(layer: Any) -> list[keras.Variable]:
    """Return the weights in the order of `.h5` files: the trained ones first."""
    return [] if layer is None else [*layer.trainable_weights, *layer.non_trainable_weights]


def _by_name(built: BuiltLayer, wrapper: Wrapper, arrays: list[NamedArray]) -> dict[str, np.ndarray]:
    """Return weights by the names that the variables of the layer have in Keras 3; where they differ, in order."""
    names = [path_inside(variable, built.layer) for variable in built.layer.weights]
    found = {wrapper.name_inside(array): array.value for array in arrays}
    if set(found) == set(names):
        return found
    if len(arrays) != len(names):
        raise ModelError(f"{built.name!r} ({built.kind}) has {len(names)} weights, and the file {len(arrays)} for it.")
    return {name: array.value for name, array in zip(names, arrays, strict=True)}


def _apply(wrapper: Wrapper, weights: dict[str, np.ndarray], state: list[NamedArray], filled: Filled) -> None:
    """Put into the weights what the wrapper computed with them."""
    if wrapper.kind == "pruning":
        filled.masks += masked(weights, state)
    elif wrapper.kind == "clustering":
        filled.clusters += clustered(weights, state, wrapper)
    kept = filled.state.setdefault(wrapper.inner, {})
    kept.update({leaf(array.name): array.value for array in state})


def _assign(variable: keras.Variable, value: np.ndarray, name: str) -> None:
    if tuple(value.shape) != tuple(variable.shape):
        raise ModelError(
            f"{name!r}: a weight has the shape {tuple(value.shape)} in the file, expected {tuple(variable.shape)} "
            f"for {variable.path!r}."
        )
    variable.assign(value)


class _Tree:
    """Fills from the tree of a `.keras` archive, in which a layer's own weights have numbers for names."""

    def __init__(self, filled: Filled):
        self._filled = filled

    def fill_layers(self, built: list[BuiltLayer], node: Any, group: WeightGroup) -> None:
        """Fill the layers of a model, whose groups are called by their class and number."""
        entries = node["config"]["layers"]
        groups = match_groups(entries, group.children.get("layers"))
        by_name = {each.name: each for each in built}
        for index, entry in enumerate(entries):
            each = by_name.get(str(entry.get("name") or entry["config"].get("name")))
            if each is not None:
                self._fill(each, entry, groups.get(index, WeightGroup("")))

    def _fill(self, built: BuiltLayer, entry: Any, group: WeightGroup) -> None:
        own = [weight.read() for weight in group.weights]
        if built.kind == INPUT_QUANTIZER:
            names = (f"{built.name}_min", f"{built.name}_max", "optimizer_step")
            self._filled.state[built.name] = dict(zip(names, own, strict=False))
            return
        if built.inner:
            while entry["class_name"] not in ("Functional", "Model", "Sequential"):
                entry = entry["config"]["layer"]
            self.fill_layers(built.inner, entry, group)
            return
        for wrapper in built.wrappers:
            inside = group.children.get("layer", WeightGroup(""))
            if built.layer is not None:
                self._fill_wrapped(built, wrapper, own, inside)
            group, own = inside, [weight.read() for weight in inside.weights]
        if not built.wrappers and built.layer is not None:
            self._fill_layer(built.layer, group, built.name)

    def _fill_wrapped(self, built: BuiltLayer, wrapper: Wrapper, own: list[np.ndarray], inside: WeightGroup) -> None:
        """Fill a layer whose weights its wrapper stores in part together with what it keeps for itself."""
        variables = {path_inside(variable, built.layer): variable for variable in built.layer.weights}
        taken, state = _SPLITS[wrapper.kind](wrapper, built, own)
        if not taken:
            self._fill_layer(built.layer, inside, built.name)
            weights = {name: keras.ops.convert_to_numpy(variable) for name, variable in variables.items()}
        elif inside.children:
            raise ModelError(f"{built.name!r} ({built.kind}) cannot be read from a .keras file.", "Save it as .h5.")
        else:
            rest = [weight.read() for weight in inside.weights]
            free = [name for name in variables if name not in taken]
            if len(rest) != len(free):
                raise ModelError(
                    f"{built.name!r} ({built.kind}) has {len(free)} more weights, and the file {len(rest)} for it."
                )
            weights = {**taken, **dict(zip(free, rest, strict=True))}
        _apply(wrapper, weights, state, self._filled)
        for name, variable in variables.items():
            _assign(variable, weights[name], built.name)

    def _fill_layer(self, layer: Any, group: WeightGroup, name: str) -> None:
        """Fill a layer and the layers inside it, which are called by the attributes that hold them."""
        if group.weights:
            try:
                layer.load_own_variables({weight.key: weight.read() for weight in group.weights})
            except (ValueError, KeyError, TypeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ModelError(f"{name!r}: its weights do not fit: {reason}") from None
        for key, child in group.children.items():
            if "generator" in key or not any(True for _ in child.all_weights()):
                continue
            inner = getattr(layer, key.lstrip("_"), None)  # Keras 2 kept the layers of attention under private names
            if isinstance(inner, (list, tuple)):
                kinds = [{"class_name": type(each).__name__, "config": {"name": each.name}} for each in inner]
                for index, found in match_groups(kinds, child).items():
                    self._fill_layer(inner[index], found, name)
            elif isinstance(inner, keras.layers.Layer):
                self._fill_layer(inner, child, name)
            else:
                raise ModelError(f"{name!r}: the weights under {key[:60]!r} have no place.")


def _split_pruning(wrapper: Wrapper, built: BuiltLayer, own: list[np.ndarray]) -> _Split:
    """The layer keeps its weights; the wrapper has a copy of those that it prunes, then a mask and threshold each."""
    count = (len(own) - 1) // 3
    masks = [own[count + 2 * index] for index in range(count)]
    return {}, [NamedArray(f"{wrapper.name}/mask_{index}", mask) for index, mask in enumerate(masks)]


def _split_clustering(wrapper: Wrapper, built: BuiltLayer, own: list[np.ndarray]) -> _Split:
    """The wrapper has each clustered weight and its centroids, then the indices of all of them."""
    count = len(own) // 3
    shapes = {path_inside(v, built.layer): tuple(v.shape) for v in built.layer.weights if not v.name.endswith("bias")}
    taken, state = {}, []
    for index in range(count):
        weight, centroids, indices = own[2 * index], own[2 * index + 1], own[2 * count + index]
        name = next((each for each, shape in shapes.items() if shape == weight.shape and each not in taken), None)
        if name is None:
            raise ModelError(f"{built.name!r}: a clustered weight of shape {weight.shape} has no place.")
        taken[name] = weight
        state.append(NamedArray(f"{wrapper.name}/cluster_centroids_{name}", centroids))
        state.append(NamedArray(f"{wrapper.name}/pulling_indices_{name}", indices))
    return taken, state


def _split_quantization(wrapper: Wrapper, built: BuiltLayer, own: list[np.ndarray]) -> _Split:
    """The wrapper has the trained weights, those that it rounds once more, a step count, and the ranges."""
    slots = slots_of(wrapper, built.kind, built.config)
    step = next((i for i, value in enumerate(own) if value.shape == () and value.dtype.kind == "i"), len(own))
    ranges = own[step + 1 :]
    if len(ranges) != len(slots.ranges) or step < len(slots.weights):
        raise ModelError(
            f"{built.name!r}: {len(slots.ranges)} ends of ranges are expected, the file has {len(ranges)}."
        )
    weights = own[step - len(slots.weights) : step]
    state = [NamedArray(f"{wrapper.name}/{name}", value) for name, value in zip(slots.ranges, ranges, strict=True)]
    names = [name_in_keras3(built.layer, name) for name in slots.weights]
    return dict(zip(names, weights, strict=True)), state


def _split_nothing(wrapper: Wrapper, built: BuiltLayer, own: list[np.ndarray]) -> _Split:
    return {}, []


_Split = tuple[dict[str, np.ndarray], list[NamedArray]]
"""Weights of the layer inside that the wrapper stores, by name, and what it keeps for itself."""
_SPLITS = {
    "pruning": _split_pruning,
    "clustering": _split_clustering,
    "quantization": _split_quantization,
    "annotation": _split_nothing,
}
