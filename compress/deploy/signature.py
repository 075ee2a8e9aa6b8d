"""What a Keras model takes and returns, as a flat list of named tensors, and samples that fit it.

Files have flat inputs while Keras models may take dicts and lists; both sides agree on the order in which
Keras flattens structures.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from compress.data.split import Arrays, Split, map_arrays
from compress.deploy.records import TensorInfo
from compress.deploy.runtimes import fit_array, match_inputs, plain_name
from compress.errors import DataError, ExportError

_OPEN_SIZE = 32
"""Size that drawn samples have where the model takes any, such as the height of an image."""

_SAMPLES_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ModelSignature:
    """The inputs of a model.

    Args:
        inputs: each input in the order in which Keras flattens them; the first dimension is the batch.
        structure: what the model is called with: one leaf, or dicts and lists of leaves.
    """

    inputs: tuple[TensorInfo, ...]
    structure: Any


def read_signature(model: keras.Model, samples: Arrays = None) -> ModelSignature:
    """Return what `model` takes.

    Args:
        model: a built model of any kind.
        samples: inputs that fit the model, which tell more than a subclassed model knows about itself; or
            `None`.

    Raises:
        ExportError: the model is not built, or takes several arguments.
    """
    if not model.built:
        raise ExportError(
            f"expected a built model. Received: model {model.name!r} of class {type(model).__name__}, which "
            "has never been "
            "called",
            "Call the model once on a batch of data.",
        )
    if getattr(model, "inputs", None):
        structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        names = [_stable_name(tensor.name, i) for i, tensor in enumerate(keras.tree.flatten(structure))]
    elif samples is not None:
        structure = map_arrays(
            lambda array: keras.KerasTensor(array.shape, dtype=_plain_dtype(array.dtype.name)), samples
        )
        names = [f"input_{i}" for i in range(len(keras.tree.flatten(structure)))]
    else:
        structure = _built_structure(model)
        names = [f"input_{i}" for i in range(len(keras.tree.flatten(structure)))]
    if isinstance(structure, dict) and len(structure) == len(names):
        names = sorted(map(str, structure))
    inputs = tuple(
        TensorInfo(name=name, shape=(None, *tensor.shape[1:]), dtype=_plain_dtype(tensor.dtype))
        for name, tensor in zip(_unique(names), keras.tree.flatten(structure), strict=True)
    )
    return ModelSignature(inputs, keras.tree.map_structure(lambda _: 0, structure))


def pack_inputs(signature: ModelSignature, flat: list[Any]) -> Any:
    """Return the flat inputs in the structure that the model is called with."""
    return keras.tree.pack_sequence_as(signature.structure, flat)


def name_outputs(model: keras.Model, outputs: Any, taken: tuple[str, ...] = ()) -> list[str]:
    """Return a distinct name for each output, in the order in which Keras flattens them.

    Args:
        model: the model that returned `outputs`.
        outputs: what it returned: a tensor, or dicts and lists of tensors.
        taken: names that must not be used.
    """
    count = len(keras.tree.flatten(outputs))
    if isinstance(outputs, dict) and len(outputs) == count:
        names = sorted(map(str, outputs))
    else:
        names = list(getattr(model, "output_names", ()))
    if len(names) != count:
        names = [f"output_{i}" for i in range(count)]
    return _unique(names, taken)


def take_samples(signature: ModelSignature, x: Arrays | Split, limit: int) -> list[np.ndarray]:
    """Return up to `limit` samples, one array per input, in the dtypes of the inputs.

    Raises:
        DataError: the samples do not fit the model.
    """
    if isinstance(x, Split):
        x, _ = x.head(limit)
    arrays = match_inputs([info.name for info in signature.inputs], map_arrays(np.asarray, x))
    counts = [len(array) if array.ndim else 0 for array in arrays]
    if min(counts) == 0 or len(set(counts)) != 1:
        raise DataError(f"samples must be equally many for each input, at least 1. Received: {counts} samples")
    rows = min(limit, _affordable(signature, [array.shape for array in arrays]))
    return [fit_array(array[:rows], info) for array, info in zip(arrays, signature.inputs, strict=True)]


def draw_samples(signature: ModelSignature, count: int, seed: int) -> list[np.ndarray]:
    """Return up to `count` random samples, one array per input: standard normal floats, and integers 0 and 1.

    The integers are indices that every embedding has.
    """
    generator = np.random.default_rng(seed)
    shapes = [tuple(size or _OPEN_SIZE for size in info.shape[1:]) for info in signature.inputs]
    rows = min(count, _affordable(signature, [(1, *shape) for shape in shapes]))
    samples = []
    for info, shape in zip(signature.inputs, shapes, strict=True):
        if info.dtype == "string":
            samples.append(np.full((rows, *shape), "a", dtype=object))
        elif np.dtype(info.dtype).kind == "f":
            samples.append(generator.standard_normal((rows, *shape), dtype="float32").astype(info.dtype))
        else:
            samples.append(generator.integers(0, 2, (rows, *shape)).astype(info.dtype))
    return samples


def _affordable(signature: ModelSignature, shapes: list[tuple[int, ...]]) -> int:
    """Return how many samples of these shapes fit into the memory that a check may take; at least 1."""
    return max(1, _SAMPLES_BYTES // max(1, sum(4 * math.prod(shape[1:]) for shape in shapes)))


def _built_structure(model: keras.Model) -> Any:
    """Return the inputs that a subclassed model was built for, from the shapes that Keras has recorded."""
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise ExportError(
            f"expected a model that is called with one argument. Received: model {model.name!r} of class "
            f"{type(model).__name__}, whose inputs are not known",
            "Let call() take one tensor, list or dict, or pass samples.",
        )
    return _map_shapes(shape, lambda sizes: keras.KerasTensor(sizes, dtype=_plain_dtype(model.input_dtype)))


def _map_shapes(value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_shapes(item, function) for key, item in value.items()}
    if all(size is None or isinstance(size, int) for size in value):
        return function(tuple(value))
    return [_map_shapes(item, function) for item in value]


def _stable_name(name: str, index: int) -> str:
    """Return `name`, or `input_0` for one that Keras made up, as that changes from process to process."""
    return f"input_{index}" if re.fullmatch(r"(keras_tensor|input_layer)(_\d+)?", name) else name


def _plain_dtype(dtype: Any) -> str:
    """Return the dtype that files take: half and double precision become single, which all runtimes know."""
    name = keras.backend.standardize_dtype(dtype) if "str" not in str(dtype) else "string"
    return "float32" if name in ("float16", "bfloat16", "float64") else name


def _unique(names: list[str], taken: tuple[str, ...] = ()) -> list[str]:
    found: list[str] = []
    for name in map(plain_name, names):
        candidate, number = name, 1
        while candidate in found or candidate in taken:
            candidate, number = f"{name}_{number}", number + 1
        found.append(candidate)
    return found
