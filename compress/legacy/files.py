"""Opening a file of Keras 2: checked, and read with h5py, zipfile and json. Nothing in it is built or executed.

Keras 2 wrote `.h5` files, whose weights have names in lists by layer, and `.keras` archives, whose weights are a tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from compress.errors import ModelError
from compress.models.archive import parse_json, read_archive
from compress.models.file_kind import is_hdf5, require_zip
from compress.models.gatekeeper import check_values
from compress.models.weight_store import HeapFinder, StoredWeight, WeightGroup, WeightStore, check_heaps

_BLOCK_BYTES = 1 << 20
_WEIGHTS = "model_weights"


@dataclass(frozen=True)
class NamedArray:
    """A weight under the name that TensorFlow gave it, such as `"conv2d/kernel"`."""

    name: str
    value: np.ndarray


@dataclass(frozen=True)
class LegacyModel:
    """A serialised model of Keras 2 with its weights.

    Args:
        node: `{"class_name": ..., "config": ...}` of the model.
        keras_version: of the Keras that saved it, or `"unknown"`.
        weights: by the name of each layer of the model, the weights in and below it: the trained ones, then the others,
            or a tree, as `.keras` archives have it.
        elements: how many numbers the weights are, which bounds what may be allocated for them.
    """

    node: dict[str, Any]
    keras_version: str
    weights: dict[str, list[NamedArray]] | WeightGroup
    elements: int


@contextmanager
def open_legacy(path: str | Path) -> Iterator[LegacyModel]:
    """Open the `.h5` or `.keras` file of Keras 2 at `path`; a tree of weights can be read inside the block only.

    Raises:
        ModelError: it is missing, damaged, another kind of file, holds no model or one of Keras 3, or uses features of
            HDF5 that Keras never writes.
    """
    path = Path(path)
    if is_hdf5(path):
        with _open_store(path) as store:
            try:
                check_values(store.root, allow_nonfinite=False)
                yield _read_h5(path, store)
            except ModelError as error:
                raise _named(path, error) from None
        return
    require_zip(path)
    with read_archive(path) as archive:
        version = str(archive.metadata.get("keras_version", "unknown"))
        if not version.startswith("2."):
            raise ModelError(
                f"{path} was saved by Keras {version[:20]}; it needs no migration.", "Use the file as it is."
            )
        try:
            check_values(archive.weights, allow_nonfinite=False)
            elements = sum(weight.size for weight in archive.weights.all_weights())
            yield LegacyModel(archive.config, version, archive.weights, elements)
        except ModelError as error:
            raise _named(path, error) from None


def _named(path: Path, error: ModelError) -> ModelError:
    """Return the error with the file's name in front, once."""
    message = error.message if error.message.startswith(str(path)) else f"{path}: {error.message}"
    return ModelError(message, error.help)


@contextmanager
def _open_store(path: Path) -> Iterator[WeightStore]:
    finder = HeapFinder()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            finder.feed(block)
        store = _check_stream(path, stream, finder)
        try:
            yield store
        finally:
            store.close()


def _check_stream(path: Path, stream: BinaryIO, finder: HeapFinder) -> WeightStore:
    size = path.stat().st_size
    check_heaps(stream, finder.offsets, size, str(path))
    stream.seek(0)
    return WeightStore(stream, size, str(path))


def _read_h5(path: Path, store: WeightStore) -> LegacyModel:
    text = store.read_text("", "model_config")
    if text is None:
        raise ModelError(
            f"{path} holds weights without a model.",
            "Build the model in Keras 2, load_weights(), then model.save('model.h5').",
        )
    node = parse_json(text.encode(errors="replace"), "model_config")  # HDF5 hands on broken UTF-8 as surrogates
    if not isinstance(node.get("class_name"), str) or not isinstance(node.get("config"), (dict, list)):
        raise ModelError("model_config does not describe a Keras model (class_name and config are missing).")
    version = store.read_text("", "keras_version") or store.read_text(_WEIGHTS, "keras_version") or "unknown"
    if version.startswith("3."):
        raise ModelError(
            f"{path} was saved by Keras {version[:20]}; migrate reads files of Keras 2.",
            "Load it with keras.saving.load_model, then model.save('model.keras').",
        )
    if _WEIGHTS not in store.root.children:
        raise ModelError(f"the group {_WEIGHTS} is missing.", "Save the model again.")
    stored = {weight.path: weight for weight in store.root.children[_WEIGHTS].all_weights()}
    weights = {
        layer: _named_arrays(store, stored, f"{_WEIGHTS}/{layer}")
        for layer in store.read_names(_WEIGHTS, "layer_names")
    }
    return LegacyModel(node, version, weights, sum(array.value.size for each in weights.values() for array in each))


def _named_arrays(store: WeightStore, stored: dict[str, StoredWeight], path: str) -> list[NamedArray]:
    found = []
    for name in store.read_names(path, "weight_names"):
        weight = stored.get(f"{path}/{name}")
        if weight is None:
            raise ModelError(f"the weight {name[:120]!r} is listed, but missing.", "Save the model again.")
        found.append(NamedArray(name.partition(":")[0], weight.read()))
    return found
