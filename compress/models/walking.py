"""Walking a Keras model: its leaf layers with their paths, and the kernels that compression may change.

Only `model.layers` is followed, so a layer inside another layer (a cell, a wrapped layer, the projections
of an attention layer) belongs to that outer layer. What is not known is left alone and reported as skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from compress.errors import UsageError
from compress.models.layer_table import KERNEL_NAMES
from compress.models.patterns import matches, require_matches


@dataclass(frozen=True)
class Kernel:
    """A weight matrix or filter bank.

    Args:
        path: path of the variable, such as `"encoder/conv1/kernel"`.
        layer_path: path of the leaf layer that owns it, such as `"encoder/conv1"`; empty where no layer does.
        variable: the variable, of rank 2 or more.
    """

    path: str
    layer_path: str
    variable: keras.Variable


@dataclass(frozen=True)
class Skipped:
    """A layer or kernel with weights that is left as it is.

    Args:
        path: path of the layer or kernel.
        reason: why, in a few words.
    """

    path: str
    reason: str


def find_layers(model: keras.Model) -> list[tuple[str, keras.Layer]]:
    """Return `(path, layer)` of every leaf layer, in order; nested models are opened and joined with `"/"`.

    A layer that is used in several places is listed once, under the first of its paths.
    """
    return list(_leaves(model, "", set()))


def find_all_layers(model: keras.Model) -> list[keras.Layer]:
    """Return `model` and every layer in it, also those that are attributes of other layers."""
    found: list[keras.Layer] = []
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, keras.Layer):
            found.append(value)
            waiting.extend(vars(value).values())
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
    return found


def list_kernels(model: keras.Model, *, trainable: bool = False) -> list[Kernel]:
    """Return every kernel of `model`, or those that training changes."""
    found = list(_candidates(model, find_layers(model)))
    changed = {id(variable) for variable in model.trainable_variables} if trainable else set()
    return [kernel for kernel in found if id(kernel.variable) in changed] if trainable else found


def find_kernels(
    model: keras.Model, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> tuple[list[Kernel], list[Skipped]]:
    """Return the trainable kernels of `model` that the patterns select, and what is left alone.

    Args:
        model: a built model.
        include: shell patterns over layer or kernel paths; a kernel must fit one of them.
        exclude: shell patterns; a kernel that fits one of them is skipped.

    Raises:
        UsageError: a pattern matches nothing, or no kernel is left.
    """
    layers = find_layers(model)
    trainable = {id(variable) for variable in model.trainable_variables}
    found = list(_candidates(model, layers))
    paths = [path for path, _ in layers] + [kernel.path for kernel in found]
    require_matches(paths, include, "include")
    require_matches(paths, exclude, "exclude")

    kernels = []
    skipped = [Skipped(path, f"{type(layer).__name__} has no kernel") for path, layer in _without_kernel(layers, found)]
    for kernel in found:
        if reason := _reason_to_skip(kernel, trainable, include, exclude):
            skipped.append(Skipped(kernel.path, reason))
        else:
            kernels.append(kernel)
    if not kernels:
        listed = "; ".join(f"{each.path}: {each.reason}" for each in skipped[:10]) or "the model has no weights"
        raise UsageError(
            f"expected at least one trainable kernel in model {model.name!r}. "
            f"Received: include={list(include)}, exclude={list(exclude)}",
            f"Change the patterns, build the model or unfreeze layers ({listed}).",
        )
    return kernels, skipped


def _leaves(model: keras.Model, prefix: str, seen: set[int]) -> Iterator[tuple[str, keras.Layer]]:
    for layer in model.layers:
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if isinstance(layer, keras.Model):
            yield from _leaves(layer, f"{prefix}{layer.name}/", seen)
        else:
            yield f"{prefix}{layer.name}", layer


def _candidates(model: keras.Model, layers: list[tuple[str, keras.Layer]]) -> Iterator[Kernel]:
    """Yield every variable that is a kernel by its name and rank, each once; those of layers come first."""
    seen: set[int] = set()
    for layer_path, layer in layers:
        for variable in layer.weights:
            if id(variable) not in seen and _is_kernel(variable):
                yield Kernel(f"{layer_path}/{path_inside(variable, layer)}", layer_path, variable)
            seen.add(id(variable))
    for variable in model.weights:  # weights that a subclassed model holds itself
        if id(variable) not in seen and _is_kernel(variable):
            seen.add(id(variable))
            yield Kernel(variable.path, "", variable)


def _is_kernel(variable: keras.Variable) -> bool:
    return variable.name in KERNEL_NAMES and len(variable.shape) >= 2


def path_inside(variable: keras.Variable, layer: keras.Layer) -> str:
    """Return the part of a variable's path after its layer; what comes before changes on save and load."""
    parts = variable.path.split("/")
    owners = parts[:-1]
    if layer.name in owners:
        return "/".join(parts[len(owners) - owners[::-1].index(layer.name) :])
    return variable.path


def _reason_to_skip(kernel: Kernel, trainable: set[int], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if not matches(kernel.path, include):
        return "not included"
    if matches(kernel.path, exclude):
        return "excluded"
    if "float" not in keras.backend.standardize_dtype(kernel.variable.dtype):
        return f"is {kernel.variable.dtype}, expected a float kernel"
    return None if id(kernel.variable) in trainable else "frozen"


def _without_kernel(layers: list[tuple[str, keras.Layer]], found: list[Kernel]) -> Iterator[tuple[str, keras.Layer]]:
    with_kernel = {kernel.layer_path for kernel in found}
    return ((path, layer) for path, layer in layers if layer.weights and path not in with_kernel)
