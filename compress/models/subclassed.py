"""Subclassed models as functional ones: `call` runs once on symbolic tensors."""

from __future__ import annotations

from typing import Any

import keras

from compress.errors import ModelError
from compress.models.copying import copy_model
from compress.models.graph import Names, is_functional, plain_functional, repeat, replay
from compress.models.symbolic_calls import Untraceable, open_call


def make_functional(model: keras.Model, inputs: Any = None) -> keras.Model:
    """Return a functional copy of `model`, which predicts the same; `model` is not changed.

    Layers keep the names that were given to them; others are called after the attributes that hold them. Where
    call() does something else in training, the copy does what it does in prediction.

    Args:
        model: a built model of any kind.
        inputs: samples or symbolic tensors that tell what the model takes, in its structure; the first dimension is
            the batch. `None` takes what Keras has recorded when the model was built.

    Raises:
        ModelError: what the model takes is not known, or its call() is not made of Keras operations and layers.
    """
    copy = copy_model(model)
    if is_functional(copy):
        return plain_functional(copy)
    start = _inputs_of(model) if inputs is None else _symbols(inputs, None)
    tensors = keras.tree.flatten(start)
    try:
        opened = open_call(copy, (start,), {}, "", Names({tensor.name for tensor in tensors}, {}))
    except Untraceable as error:
        raise ModelError(
            f"expected a model whose call() is made of Keras layers and operations. Received: model {model.name!r} of "
            f"class {type(model).__name__}: {error}",
            "Use keras.ops and layers in call(), or build the model with the functional API.",
        ) from error
    return keras.Model(start, replay(opened.graph, opened.inputs, repeat), name=model.name)


def _inputs_of(model: keras.Model) -> Any:
    shape = (model.get_build_config() or {}).get("input_shape") if model.built else None
    if shape is None:
        raise ModelError(
            f"expected a built model that is called with one argument. Received: model {model.name!r} of class "
            f"{type(model).__name__}, whose inputs are not known",
            "Call the model once on a batch of data and let call() take one tensor, list or dict, or pass inputs=.",
        )
    return _map_shapes(shape, "input", model.input_dtype)


def _map_shapes(shape: Any, name: str, dtype: str) -> Any:
    if isinstance(shape, dict):
        return {key: _map_shapes(item, str(key), dtype) for key, item in shape.items()}
    if all(size is None or isinstance(size, int) for size in shape):
        return keras.Input(tuple(shape)[1:], dtype=dtype, name=name)
    return [_map_shapes(item, f"{name}_{index}", dtype) for index, item in enumerate(shape)]


def _symbols(value: Any, name: str | None) -> Any:
    if isinstance(value, dict):
        return {key: _symbols(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_symbols(item, None) for item in value)
    return keras.Input(tuple(value.shape)[1:], dtype=keras.backend.standardize_dtype(value.dtype), name=name)
