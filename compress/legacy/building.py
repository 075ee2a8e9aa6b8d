"""From a serialised model of Keras 2 to one of Keras 3, layer by layer and call by call; weights are filled in later.

Each layer is made from a table, so nothing that a file names is imported or run, and before each call its stated size
is compared with the weights that the file holds: Keras allocates first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import keras

from compress.errors import ModelError
from compress.legacy.dialects import (
    LAYERS,
    RECURRENT,
    Dialect,
    activation_name,
    keras3,
    translate_activation,
    translate_layer,
)
from compress.legacy.gates import HARD_SIGMOID
from compress.legacy.quantizers import Slots, make_quantizer, slots_of
from compress.legacy.tf_operations import CLASSES, OPERATIONS, hard_sigmoid
from compress.legacy.wrappers import INPUT_QUANTIZER, Wrapper, unwrap
from compress.models.gatekeeper import SizeLimit, refuse_custom
from compress.quantization.layers import FakeQuant

_MODELS = frozenset(("Functional", "Model", "Sequential"))
_CONSTANT = "_CONSTANT_VALUE"


@dataclass
class BuiltLayer:
    """A layer of the old model, and what stands for it in the new one.

    Args:
        name: what the old model calls it, wrappers included.
        kind: class of the layer inside the wrappers.
        layer: the new layer or nested model; `None` for functions and quantizers of inputs, which have none.
        wrappers: what was around it, outermost first.
        inner: the layers of a nested model.
        config: the old layer's configuration.
        quantizers: where tfmot rounded activations, the layers that do so now.
        is_plain: whether a call of the old layer is one of the new layer and nothing else.
    """

    name: str
    kind: str
    layer: keras.layers.Layer | None
    wrappers: list[Wrapper] = field(default_factory=list)
    inner: list[BuiltLayer] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    quantizers: dict[str, FakeQuant] = field(default_factory=dict)
    is_plain: bool = True

    def walk(self) -> Iterator[BuiltLayer]:
        """Yield this layer, or the layers of this model instead."""
        if self.kind in _MODELS:
            for each in self.inner:
                yield from each.walk()
        else:
            yield self


@dataclass(frozen=True)
class Builder:
    """Builds models of Keras 3 from serialised ones of Keras 2.

    Args:
        allow_imports: top-level packages whose layers the model may name; they are imported.
        limit: the most weights that may be allocated.
    """

    allow_imports: tuple[str, ...]
    limit: SizeLimit
    target: Dialect = field(default_factory=keras3)

    def build(self, node: Mapping[str, Any]) -> tuple[keras.Model, list[BuiltLayer]]:
        """Return the model, and its layers in the order in which they were saved.

        Raises:
            ModelError: a layer, option or function that has no counterpart, a class that is not trusted, or a
                configuration that is damaged.
        """
        kind, config = node.get("class_name"), node.get("config")
        if kind not in _MODELS:
            raise ModelError(
                f"the model is a {str(kind)[:60]}, a class of its own, whose code the file does not hold.",
                "Build a functional model around it in Keras 2, and save that.",
            )
        try:
            if kind == "Sequential" and "input_layers" not in (config if isinstance(config, dict) else {}):
                return self._sequential(config, node)
            return _Functional(self, config).build()
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(
                f"the configuration of the model is damaged: {type(error).__name__}: {str(error)[:120]}"
            ) from error

    def _sequential(self, config: Any, node: Mapping[str, Any]) -> tuple[keras.Model, list[BuiltLayer]]:
        if isinstance(config, list):  # as Keras 2.2 wrote it
            config = {"layers": config}
        entries = list(config["layers"])
        shape, dtype, name = _sequential_input(entries, config, node)
        built: list[BuiltLayer] = []
        inputs = keras.Input(batch_shape=shape, dtype=dtype, name=name)
        outputs = inputs
        for entry in entries:
            if entry["class_name"] == "InputLayer":
                continue
            made, call = self.make(entry)
            outputs = call(outputs)
            built.append(made)
        layers = [keras.layers.InputLayer(batch_shape=shape, dtype=dtype, name=name)]
        if not all(each.is_plain for each in built) or len({id(each.layer) for each in built}) != len(built):
            return keras.Model(inputs, outputs, name=config.get("name")), built
        return keras.Sequential([*layers, *(each.layer for each in built)], name=config.get("name")), built

    def make(self, entry: Mapping[str, Any]) -> tuple[BuiltLayer, Callable[..., Any]]:
        """Return a layer, and how to call it with symbolic tensors."""
        node, wrappers = unwrap(entry)
        kind, config = str(node["class_name"]), node["config"]
        if not isinstance(config, dict) and not (kind == "Sequential" and isinstance(config, list)):
            raise ModelError(f"a layer of class {kind[:60]} has no configuration.")
        name = str(entry.get("name") or (entry["config"].get("name") if isinstance(entry["config"], dict) else ""))
        if kind in _MODELS:
            model, inner = self.build(node)
            return BuiltLayer(name, kind, model, wrappers, inner), model
        made = BuiltLayer(name, kind, None, wrappers, config=config)
        if kind == INPUT_QUANTIZER:
            made.is_plain, made.quantizers = False, {name: make_quantizer(name)}
            return made, made.quantizers[name]
        if kind in CLASSES:
            made.is_plain = False
            return made, self._function(config, name)
        slots = next((slots_of(each, kind, config) for each in wrappers if each.kind == "quantization"), Slots())
        return made, self._steps(made, node, slots)

    def _steps(self, made: BuiltLayer, node: Mapping[str, Any], slots: Slots) -> Callable[..., Any]:
        """Make the layer of `made`, and return a call of it and of what follows: quantizers, an activation."""
        config = node["config"]
        activation = activation_name(config.get("activation"))
        own_call = activation == HARD_SIGMOID and made.kind not in RECURRENT and "recurrent_activation" not in config
        split = slots.pre_activation or own_call
        steps: list[Callable[..., Any]] = []
        if not (split and made.kind == "Activation"):
            made.layer = self._layer(node, without_activation=split)
            steps.append(self._checked(made.layer, made.kind, config))
        for slot in slots.activations:
            made.quantizers[slot] = make_quantizer(f"{made.name}_{slot}")
        if slots.pre_activation:
            steps.append(made.quantizers["pre_activation"])
        if own_call:
            steps.append(hard_sigmoid)
        elif split:
            known = translate_activation(config.get("activation"), self.target, made.name)
            steps.append(keras.layers.Activation(known, name=f"{config.get('name', made.name)}_{known}"))
        steps += [made.quantizers[slot] for slot in slots.activations if slot != "pre_activation"]
        made.is_plain = made.layer is not None and len(steps) == 1

        def call(x: Any, **kwargs: Any) -> Any:
            x = steps[0](x, **kwargs) if made.layer is not None else steps[0](x)
            for step in steps[1:]:
                x = step(x)
            return x

        return call

    def _layer(self, node: Mapping[str, Any], without_activation: bool) -> keras.layers.Layer:
        kind, config = str(node["class_name"]), node["config"]
        if kind in _SPECIAL:
            return _SPECIAL[kind](config)
        if kind not in LAYERS and _is_custom(node):
            return self._custom(node)
        return translate_layer(kind, config, self.target, self._custom, without_activation)

    def _checked(self, layer: Any, kind: str, config: Mapping[str, Any]) -> Callable[..., Any]:
        """Return how to call a layer: its size is compared with the weights that there are first."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not layer.built:
                shapes = [list(tensor.shape) for tensor in keras.tree.flatten((args, kwargs)) if _is_tensor(tensor)]
                self.limit.take({"class_name": kind, "config": dict(config), "inbound_nodes": shapes})
            try:
                return layer(*args, **kwargs)
            except Exception as error:  # Keras raises many types for inputs that a layer cannot take
                reason = " ".join(str(error).split())[:200]
                raise ModelError(f"{layer.name!r} ({kind}) cannot be called as it was: {reason}") from error

        return call

    def _function(self, config: Mapping[str, Any], name: str) -> Callable[..., Any]:
        function = str(config.get("function", ""))
        if function not in OPERATIONS:
            raise ModelError(
                f"{name[:80]!r} calls tf.{function[:80]}, for which there is no counterpart here.",
                "Replace the call by a layer in Keras 2, and save the model again.",
            )

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("name", None)
            try:
                return OPERATIONS[function](*args, **kwargs)
            except (TypeError, ValueError) as error:
                raise ModelError(f"{name[:80]!r}: tf.{function} cannot be called so: {str(error)[:160]}") from error

        return call

    def _custom(self, node: Mapping[str, Any]) -> Any:
        """Return a layer of a class from a trusted package, made from its configuration."""
        kind, module = str(node["class_name"]), node.get("module")
        registered = node.get("registered_name") if isinstance(node.get("registered_name"), str) else kind
        package = (module if isinstance(module, str) else registered.partition(">")[0]).partition(".")[0]
        if not package.isidentifier() or package not in self.allow_imports:
            raise refuse_custom({"registered_name": None, "module": None, **node}, f"the layer {kind[:60]!r}")
        try:
            found = import_module(module if isinstance(module, str) else package)
            cls = keras.saving.get_registered_object(registered) or getattr(found, kind.rpartition(">")[2])
            return cls.from_config(node["config"])
        except Exception as error:  # the package's own code runs here
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise ModelError(f"the layer {kind[:60]!r} of {package} cannot be made: {reason}") from error


class _Functional:
    """Replays the calls of a functional model: `inbound_nodes` say of each call what it read."""

    def __init__(self, builder: Builder, config: Mapping[str, Any]):
        self._builder, self._config = builder, config
        self._outputs: dict[tuple[str, int], Any] = {}

    def build(self) -> tuple[keras.Model, list[BuiltLayer]]:
        built, pending = [], []
        for entry in self._config["layers"]:
            name = str(entry.get("name") or entry["config"]["name"])
            if entry["class_name"] == "InputLayer":
                self._outputs[name, 0] = _make_input(entry["config"], name)
                continue
            made, call = self._builder.make(entry)
            built.append(made)
            pending.append((made, call, name, list(_calls_of(entry))))
        done = {name: 0 for _, _, name, _ in pending}
        first = self._first_calls(pending)
        progress = True
        while progress:
            progress = False
            for made, call, name, calls in pending:
                while done[name] < len(calls) and self._is_ready(calls[done[name]]):
                    self._outputs[name, first[name] + done[name]] = self._call(made, call, calls[done[name]])
                    done[name] += 1
                    progress = True
        if missing := [name for _, _, name, calls in pending if done[name] < len(calls)]:
            raise ModelError(f"the calls of {missing[0][:80]!r} read what no layer makes.")
        inputs = self._structure(self._config["input_layers"])
        outputs = self._structure(self._config["output_layers"])
        return keras.Model(inputs, outputs, name=self._config.get("name")), built

    def _first_calls(self, pending: list[tuple[BuiltLayer, Any, str, list[Any]]]) -> dict[str, int]:
        """Return the number of each layer's first call: 1 for models that were built before, as Keras 2 counts."""
        used: dict[str, set[int]] = {}
        saved = [calls for _, _, _, calls in pending]
        for name, call, _ in _references([saved, self._config["output_layers"]]):
            used.setdefault(name, set()).add(call)
        return {name: int(bool(made.inner) and 0 not in used.get(name, {0})) for made, _, name, _ in pending}

    def _call(self, made: BuiltLayer, call: Callable[..., Any], node: Any) -> Any:
        first, kwargs = self._arguments(node)
        if made.kind in RECURRENT and isinstance(first, list) and len(first) > 1:
            kwargs["initial_state"] = first[1:]
            first = first[0]
        kwargs = {key: value for key, value in kwargs.items() if not (key in ("mask", "training") and value is None)}
        return call(first, **kwargs)

    def _arguments(self, node: Any) -> tuple[Any, dict[str, Any]]:
        """Return the first argument of a call and the others, which Keras 2 saved beside each tensor of the first."""
        kwargs: dict[str, Any] = {}

        def read(item: Any) -> Any:
            if isinstance(item, dict):
                return {key: read(value) for key, value in item.items()}
            if _is_reference(item):
                if len(item) > 3 and isinstance(item[3], dict):
                    kwargs.update(item[3])
                return item[2] if item[0] == _CONSTANT else self._tensor(*item[:3])
            return [read(each) for each in item]

        first = read(node)
        if isinstance(first, list) and len(first) == 1:
            first = first[0]
        return first, {key: self._resolve(value) for key, value in kwargs.items()}

    def _resolve(self, value: Any) -> Any:
        """Return an argument with tensors in place of references to them."""
        if _is_reference(value) and (value[0], value[1]) in self._outputs:
            return self._tensor(*value[:3])
        if isinstance(value, list):
            return [self._resolve(item) for item in value]
        return value

    def _tensor(self, name: str, call: int, index: int) -> Any:
        return keras.tree.flatten(self._outputs[name, call])[index]

    def _is_ready(self, node: Any) -> bool:
        return all((name, call) in self._outputs for name, call, _ in _references(node))

    def _structure(self, saved: Any) -> Any:
        if isinstance(saved, dict):
            return {key: self._structure(value) for key, value in saved.items()}
        if _is_reference(saved):
            return self._tensor(*saved[:3])
        items = [self._structure(item) for item in saved]
        return items[0] if len(items) == 1 else items


def _calls_of(entry: Mapping[str, Any]) -> Iterator[Any]:
    for node in entry.get("inbound_nodes") or ():
        yield [node] if _is_reference(node) else node


def _references(node: Any) -> Iterator[tuple[str, int, int]]:
    """Yield the tensors that a call reads, those in its keyword arguments too."""
    if isinstance(node, dict):
        for value in node.values():
            yield from _references(value)
    elif _is_reference(node):
        if node[0] != _CONSTANT:
            yield node[0], node[1], node[2]
        yield from _references(node[3:])
    elif isinstance(node, list):
        for item in node:
            yield from _references(item)


def _is_reference(item: Any) -> bool:
    """Return whether this is `[layer, call, tensor]` or `[layer, call, tensor, keyword arguments]`."""
    if not isinstance(item, list) or len(item) not in (3, 4) or not isinstance(item[0], str):
        return False
    return item[0] == _CONSTANT or (type(item[1]) is int and type(item[2]) is int)


def _make_input(config: Mapping[str, Any], name: str) -> Any:
    if config.get("ragged"):
        raise ModelError(f"the input {name[:60]!r} is ragged, which Keras 3 does not have.")
    shape = config.get("batch_input_shape") or config.get("batch_shape")
    dtype = config.get("dtype") or "float32"
    return keras.Input(
        batch_shape=_shape(shape, name), dtype=dtype, name=name.replace("/", "_"), sparse=bool(config.get("sparse"))
    )


def _shape(value: Any, name: str) -> tuple[int | None, ...]:
    if not isinstance(value, list) or not all(each is None or type(each) is int for each in value):
        raise ModelError(f"the input {name[:60]!r} has no known shape.", "Call the model once in Keras 2, and save it.")
    return tuple(value)


def _sequential_input(
    entries: list[Any], config: Mapping[str, Any], node: Mapping[str, Any]
) -> tuple[tuple[int | None, ...], str, str]:
    """Return shape, dtype and name of a sequential model's input, wherever it is stated."""
    first, _ = unwrap(entries[0])
    options = first["config"]
    built = node.get("build_config") if isinstance(node.get("build_config"), dict) else {}
    shape = options.get("batch_input_shape") or config.get("build_input_shape") or built.get("input_shape")
    if first["class_name"] == "Embedding" and not options.get("batch_input_shape"):
        shape = shape or [None, options.get("input_length")]
    if first["class_name"] in _MODELS and shape is None:
        inner = options["layers"]
        return _sequential_input(inner, options, first)
    name = str(options.get("name", "input"))
    is_input = first["class_name"] == "InputLayer"
    dtype = options.get("dtype") if is_input else ("int32" if first["class_name"] == "Embedding" else None)
    return _shape(shape, name), dtype or "float32", name.replace("/", "_") if is_input else f"{name}_input"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _is_custom(node: Mapping[str, Any]) -> bool:
    """Return whether a class is not one of Keras, judged by where it says to be from, or by its registered name."""
    module, registered = node.get("module"), node.get("registered_name")
    if ">" in str(node["class_name"]) or (isinstance(registered, str) and registered != node["class_name"]):
        return True
    return isinstance(module, str) and module.partition(".")[0] not in ("keras", "tf_keras", "builtins")


def _thresholded_relu(config: Mapping[str, Any]) -> keras.layers.Layer:
    return keras.layers.ReLU(threshold=float(config.get("theta", 1.0)), name=config.get("name"))


_SPECIAL: dict[str, Callable[[Mapping[str, Any]], keras.layers.Layer]] = {"ThresholdedReLU": _thresholded_relu}
"""Layers of Keras 2 that have another name, and meaning of options, in Keras 3."""
