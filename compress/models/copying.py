"""Independent copies of models in memory: same structure, names, weights and compile settings.

The copy goes through Keras' own serialization, which keeps the names of inputs and layers (`clone_model`
renames inputs). Custom classes and functions need not be registered: those that the model holds are handed
to Keras.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import keras

from compress.errors import ModelError

_PARTS = (
    keras.Layer,
    keras.Initializer,
    keras.Regularizer,
    keras.constraints.Constraint,
    keras.Loss,
    keras.Metric,
    keras.Optimizer,
    keras.optimizers.schedules.LearningRateSchedule,
)


def copy_model(model: keras.Model) -> keras.Model:
    """Return an independent copy of `model`; the original is not changed.

    Layer names, weights, the state of random generators, trainable flags and compile settings are the same.
    The optimizer has the same settings and a fresh state. Python functions and losses are shared.

    Raises:
        ModelError: the model cannot be rebuilt from its configuration.
    """
    objects = custom_objects_of(model)
    copy = _rebuild(model, objects)
    _copy_variables(model, copy)
    copy_compile_settings(model, copy, objects)
    return copy


def _rebuild(model: keras.Model, objects: dict[str, Any]) -> keras.Model:
    try:
        config = keras.saving.serialize_keras_object(model)
        config.pop("compile_config", None)
        lambdas: dict[str, FunctionType] = {}
        _name_lambdas(config, model, lambdas)
        with keras.saving.custom_object_scope({**objects, **lambdas}):  # inner scopes hide outer ones
            return keras.saving.deserialize_keras_object(config, safe_mode=False)
    except Exception as error:  # user code runs here: get_config, from_config and call of custom layers
        raise ModelError(
            f"expected a model that can be rebuilt from its configuration. "
            f"Received: model {model.name!r} of class {type(model).__name__}: {_summary(error)}",
            "Add get_config() and from_config() to the model and its custom layers, or make it functional.",
        ) from error


def _name_lambdas(config: dict[str, Any], model: keras.Model, lambdas: dict[str, FunctionType]) -> None:
    """Replace the bytecode of each lambda in `config` by a name in `lambdas`: bytecode loses its globals."""
    layers = {layer.name: layer for layer in model.layers}
    entries = config["config"].get("layers")
    for entry in entries if isinstance(entries, list) else ():
        options = entry.get("config", {}) if isinstance(entry, dict) else {}
        layer = layers.get(options.get("name"))
        if isinstance(layer, keras.Model):
            _name_lambdas(entry, layer, lambdas)
            continue
        _name_own_lambdas(options, layer, lambdas)


def _name_own_lambdas(options: dict[str, Any], layer: Any, lambdas: dict[str, FunctionType]) -> None:
    for key, value in options.items():
        function = getattr(layer, key, None) if isinstance(value, dict) else None
        if isinstance(function, FunctionType) and function.__name__ == "<lambda>":
            name = f"copied_lambda_{len(lambdas)}"
            lambdas[name] = function
            reference = {"class_name": "function", "config": name, "module": "builtins"}
            options[key] = {**reference, "registered_name": name}


def rebuild_operation(operation: keras.Operation, config: dict[str, Any]) -> keras.Operation:
    """Return an operation of the same class with the configuration `config`, not built, without weights.

    Custom classes and functions that `operation` holds need not be registered, and its lambdas go on to be themselves.

    Args:
        operation: a layer, or the operation behind a `keras.ops` function.
        config: what its `get_config()` returned, with what is to be different.
    """
    lambdas: dict[str, FunctionType] = {}
    config = dict(config)
    _name_own_lambdas(config, operation, lambdas)
    with keras.saving.custom_object_scope({**_custom_objects([operation]), **lambdas}):
        return type(operation).from_config(config)


def _copy_variables(model: keras.Model, copy: keras.Model) -> None:
    sources, targets = model.variables, copy.variables
    if [tuple(v.shape) for v in sources] != [tuple(v.shape) for v in targets]:
        raise ModelError(
            f"expected a copy with the same {len(sources)} variables. "
            f"Received: model {model.name!r} of class {type(model).__name__} is rebuilt with {len(targets)}",
            "Give the model a get_config() with everything that its layers depend on, build all of them in "
            "build(), or use the functional API.",
        )
    for source, target in zip(sources, targets, strict=True):
        target.assign(keras.ops.copy(source))  # on JAX they would share a buffer, which training gives away
        target.trainable = source.trainable


def copy_compile_settings(model: keras.Model, copy: keras.Model, objects: dict[str, Any] | None = None) -> None:
    """Compile `copy` as `model` is; the optimizer starts afresh. A model that is not compiled leaves it as it is.

    Args:
        objects: what `custom_objects_of(model)` returned, where that is known.

    Raises:
        ModelError: the settings cannot be rebuilt.
    """
    if not model.compiled:
        return
    objects = custom_objects_of(model) if objects is None else objects
    try:
        with keras.saving.custom_object_scope(objects):
            config = model.get_compile_config()
            if type(copy).compile is not keras.Model.compile:  # such a class restores its settings itself
                copy.compile_from_config(config)
                return
            settings = keras.saving.deserialize_keras_object(config, safe_mode=False)
        settings["loss"] = model.loss  # the object itself: bytecode of a lambda loses its globals
        copy.compile(**settings)
    except Exception as error:  # user code runs here: get_config and from_config of losses and metrics
        raise ModelError(
            f"expected compile settings that can be rebuilt. Received: model {model.name!r}: {_summary(error)}",
            "Add get_config() to custom losses and metrics, or pass a model that is not compiled.",
        ) from error


def custom_objects_of(model: keras.Model) -> dict[str, Any]:
    """Return the classes and named functions that the model, its layers, loss and metrics use, by name."""
    return _custom_objects([model, model.loss, getattr(model, "optimizer", None), list(model.metrics)])


def _custom_objects(parts: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in _reachable(parts, {}):
        item = part if isinstance(part, FunctionType) else type(part)
        if not item.__module__.startswith("keras."):
            found.setdefault(item.__name__, item)
    return found


def _reachable(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """Yield every function and Keras object that `value` holds in attributes, lists and dicts, each once."""
    if id(value) in seen:
        return
    seen[id(value)] = value  # held, so that no later object gets the same id
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, _PARTS):
        yield value
        yield from _reachable(vars(value), seen)
        if isinstance(value, keras.Model):
            yield from _reachable(value.layers, seen)
    elif isinstance(value, dict):
        yield from _reachable(list(value.values()), seen)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _reachable(child, seen)


def _summary(error: Exception) -> str:
    """Return one line; Keras puts the reason last, after the whole configuration."""
    lines = str(error).rpartition("Exception encountered:")[2].strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
