"""The layers of a saved model, with their shapes and stored weights, read from its configuration.

Functional and Sequential models are opened, also inside each other; whatever else is one layer. Keras
states input shapes in `inbound_nodes` (functional) and `build_config` (Sequential).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from compress.models.layer_table import LAYERS, LayerRule
from compress.models.shapes import Shape, infer_output
from compress.models.weight_store import StoredWeight, WeightGroup

_UNKNOWN = LayerRule()
_OPTIONAL = {"gamma": "scale", "beta": "center", "bias": "use_bias"}
"""Variables that an option of their layer can switch off."""


@dataclass(frozen=True)
class SavedLayer:
    """One layer of a saved model.

    Args:
        path: names joined by `"/"`, such as `"encoder/conv1"`.
        kind: class name.
        options: its saved configuration.
        module: where its class lives, or `None`.
        group: its stored weights; empty where it has none.
        inputs: the shapes of each call.
        output: the shape that it gives, or `None` if unknown.
        repeats: how often the models around it are called.
        trainable: false if it or a model around it is frozen.
    """

    path: str
    kind: str
    options: dict[str, Any]
    module: str | None
    group: WeightGroup
    inputs: tuple[list[Shape], ...] = ()
    output: Shape | None = None
    repeats: int = 1
    trainable: bool = True


@dataclass(frozen=True)
class NamedWeight:
    """A stored weight under the name that Keras gives the variable.

    Args:
        path: such as `"encoder/conv1/kernel"`.
        is_kernel: whether compression may change it.
        is_frozen: whether it is never trained.
        kind: class name of the layer that owns it.
    """

    path: str
    stored: StoredWeight
    is_kernel: bool
    is_frozen: bool
    kind: str


@dataclass
class SavedModel:
    """All layers of a model and the shape that it gives.

    Args:
        layers: in saved order, nested models opened, input layers left out.
        inputs: name, shape and dtype of each input.
        outputs: name, shape and dtype of each output.
    """

    layers: list[SavedLayer] = field(default_factory=list)
    inputs: list[tuple[str, Shape | None, str | None]] = field(default_factory=list)
    outputs: list[tuple[str, Shape | None, str | None]] = field(default_factory=list)


def is_container(node: dict[str, Any]) -> bool:
    """Return whether a serialised object is a Functional or Sequential model, whose layers are listed."""
    options = node.get("config")
    if not isinstance(options, dict) or not isinstance(options.get("layers"), list):
        return False
    known = node["class_name"] in ("Functional", "Sequential", "Model")
    return (known or "output_layers" in options) and all(
        isinstance(item, dict) and isinstance(item.get("class_name"), str) and isinstance(item.get("config"), dict)
        for item in options["layers"]
    )


def open_model(
    node: dict[str, Any],
    group: WeightGroup,
    *,
    path: str = "",
    inputs: list[Shape] | None = None,
    repeats: int = 1,
    trainable: bool = True,
) -> SavedModel:
    """Return the layers of the serialised model `node`, whose weights are stored in `group`."""
    options = node["config"]
    entries = options["layers"]
    trainable = trainable and options.get("trainable") is not False
    found = SavedModel()
    groups = match_groups(entries, group.children.get("layers"))
    flows = _Flow(options) if "output_layers" in options else None
    current = (inputs or [None])[0] or as_shape((node.get("build_config") or {}).get("input_shape"))
    for index, entry in enumerate(entries):
        if entry["class_name"] == "InputLayer":
            shape = as_shape(entry["config"].get("batch_shape"))
            found.inputs.append((_name(entry), shape, entry["config"].get("dtype")))
            current = current if current and None not in current[1:] else shape or current
            continue
        own = groups.get(index, WeightGroup(""))
        shape = _built_shape(entry) or current
        calls = flows.inputs(entry) if flows else [[shape] if shape else []]
        child_path = f"{path}/{_name(entry)}".lstrip("/")
        if is_container(entry):
            times = repeats * max(1, len(calls))
            shapes = calls[0] if calls else None
            inner = open_model(entry, own, path=child_path, inputs=shapes, repeats=times, trainable=trainable)
            found.layers += inner.layers
            output = inner.outputs[0][1] if inner.outputs else None
        else:
            kind, saved = entry["class_name"], entry["config"]
            output = flows.output(entry) if flows else None
            output = output or (infer_output(kind, saved, calls[0]) if calls else None)
            layer = SavedLayer(child_path, kind, saved, entry.get("module"), own)
            trained = trainable and saved.get("trainable") is not False
            found.layers.append(replace(layer, inputs=tuple(calls), output=output, repeats=repeats, trainable=trained))
        if flows:
            flows.remember(entry, output)
        current = output
    if flows:
        found.outputs = flows.outputs({_name(entry): output_dtype(entry) for entry in entries})
    elif entries:
        found.outputs = [(_name(entries[-1]), current, output_dtype(entries[-1]))]
    if not found.inputs and not flows:
        first = as_shape(options.get("build_input_shape") or (node.get("build_config") or {}).get("input_shape"))
        found.inputs.append(("input", first, None))
    return found


def match_groups(entries: list[dict[str, Any]], parent: WeightGroup | None) -> dict[int, WeightGroup]:
    """Return which stored group belongs to which serialised layer, by index.

    Keras stores a layer's name beside its weights; files without names are matched by Keras' rule: the
    class name in snake case, numbered in order.
    """
    if parent is None:
        return {}
    by_name = {group.name: group for group in parent.children.values() if group.name is not None}
    found, used = {}, dict[str, int]()
    for index, entry in enumerate(entries):
        if str(entry.get("module")).startswith("keras.src.ops."):
            continue  # an operation, not a layer
        kind = _snake_case(entry["class_name"])
        if entry["class_name"] == "InputLayer" and "inbound_nodes" not in entry:
            continue  # Sequential does not list it
        key = f"{kind}_{used[kind]}" if kind in used else kind
        used[kind] = used.get(kind, 0) + 1
        group = by_name.get(_name(entry)) or (None if by_name else parent.children.get(key))
        if group is not None:
            found[index] = group
    return found


def name_weights(kind: str, options: dict[str, Any], group: WeightGroup, path: str) -> Iterator[NamedWeight]:
    """Yield the weights of a layer and of layers inside it, without the states of random generators."""
    rule = LAYERS.get(kind, _UNKNOWN)
    absent = {name for name, option in _OPTIONAL.items() if options.get(option) is False}
    names = [name for name in rule.variables if name not in absent]
    for weight in group.weights:
        index = int(weight.key) if weight.key.isdigit() else len(names)
        extra = index >= len(names)  # of a known layer: scales of quantized kernels, statistics
        name = weight.key if extra else names[index]
        if name not in rule.aliases:
            frozen = name in rule.frozen or "float" not in weight.dtype or (extra and kind in LAYERS)
            yield NamedWeight(f"{path}/{name}", weight, name in rule.kernels, frozen, kind)
    for child, child_kind, child_options in _children(rule, options, group):
        yield from name_weights(
            child_kind, child_options, child, f"{path}/{child.name or child.path.rpartition('/')[2]}"
        )


def _children(
    rule: LayerRule, options: dict[str, Any], group: WeightGroup
) -> Iterator[tuple[WeightGroup, str, dict[str, Any]]]:
    """Yield the groups inside a layer's group, each with its class and options."""
    kinds = dict(rule.children)
    for key, child in group.children.items():
        if "seed_generator" in key:
            continue
        attribute = key.lstrip("_")
        if attribute in kinds:
            yield child, kinds[attribute], options
        elif attribute in ("layers", "cells") and isinstance(options.get(attribute), list):
            entries = [entry for entry in options[attribute] if isinstance(entry, dict) and "class_name" in entry]
            for index, inner in match_groups(entries, child).items():
                yield inner, entries[index]["class_name"], entries[index].get("config") or {}
        else:
            entry = options.get(attribute) or (options.get("layer") if attribute.endswith("layer") else None)
            known = isinstance(entry, dict) and isinstance(entry.get("config"), dict) and "class_name" in entry
            yield (child, entry["class_name"], entry["config"]) if known else (child, "", {})


class _Flow:
    """The tensors of a functional model: which shapes each layer receives and gives."""

    def __init__(self, options: dict[str, Any]):
        self._outputs = options["output_layers"]
        self._shapes: dict[tuple[str, int, int], Shape | None] = {}
        self._calls: dict[str, list[list[Shape]]] = {}
        for entry in options["layers"]:
            calls = []
            for inbound in entry.get("inbound_nodes") or ():
                tensors = list(_tensors(inbound))
                for history, shape in tensors:
                    self._shapes.setdefault(history, shape)
                calls.append([shape for _, shape in tensors if shape is not None])
            self._calls[_name(entry)] = calls

    def inputs(self, entry: dict[str, Any]) -> list[list[Shape]]:
        """Return the shapes of each call of a layer."""
        return self._calls.get(_name(entry), [])

    def output(self, entry: dict[str, Any]) -> Shape | None:
        """Return the shape of a layer's first tensor, as the layers after it state it."""
        return self._shapes.get((_name(entry), 0, 0))

    def remember(self, entry: dict[str, Any], output: Shape | None) -> None:
        """Keep the shape of a layer that no other layer uses."""
        self._shapes.setdefault((_name(entry), 0, 0), output)

    def outputs(self, dtypes: dict[str, str | None]) -> list[tuple[str, Shape | None, str | None]]:
        """Return name, shape and dtype of each output of the model; a dict's keys name its tensors."""
        histories = list(_histories(self._outputs))
        keys = list(self._outputs) if isinstance(self._outputs, dict) else []
        names = keys if len(keys) == len(histories) else [layer for layer, _, _ in histories]
        return [
            (name, self._shapes.get(history), dtypes.get(history[0]))
            for name, history in zip(names, histories, strict=True)
        ]


def as_shape(value: Any) -> Shape | None:
    """Return a saved shape as a tuple, or `None` if it is none."""
    if isinstance(value, list) and value and all(dim is None or isinstance(dim, int) for dim in value):
        return tuple(value)
    return None


def dtype_policy(value: Any) -> str | None:
    """Return the name of a dtype policy, which is saved as a name or as an object."""
    if isinstance(value, dict) and isinstance(value.get("config"), dict):
        options = value["config"]
        if "mode" in options:
            return f"{options['mode']}_from_{options.get('source_name')}"
        value = options.get("name")
    return value if isinstance(value, str) else None


def output_dtype(entry: dict[str, Any]) -> str | None:
    """Return the dtype that a serialised layer computes in, or `None` for an operation without one."""
    policy = dtype_policy(entry["config"].get("dtype"))
    return policy.removeprefix("mixed_").rpartition("_from_")[2] if policy else None


def _built_shape(entry: dict[str, Any]) -> Shape | None:
    built = entry.get("build_config")
    return as_shape(built.get("input_shape")) if isinstance(built, dict) else None


def _tensors(node: Any) -> Iterator[tuple[tuple[str, int, int], Shape | None]]:
    """Yield source and shape of every tensor inside a serialised call."""
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            options = node["config"]
            for history in _histories(options.get("keras_history")):
                yield history, as_shape(options.get("shape"))
        else:
            for item in node.values():
                yield from _tensors(item)
    elif isinstance(node, list):
        for item in node:
            yield from _tensors(item)


def _histories(node: Any) -> Iterator[tuple[str, int, int]]:
    """Yield every `(layer, call, tensor)` inside a structure of references."""
    if isinstance(node, dict):
        for item in node.values():
            yield from _histories(item)
    elif isinstance(node, list):
        if len(node) == 3 and isinstance(node[0], str) and isinstance(node[1], int) and isinstance(node[2], int):
            yield node[0], node[1], node[2]
        else:
            for item in node:
                yield from _histories(item)


def _name(entry: dict[str, Any]) -> str:
    options = entry.get("config")
    name = options.get("name") if isinstance(options, dict) else None
    return str(entry.get("name") or name or entry["class_name"])


def _snake_case(name: str) -> str:
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
