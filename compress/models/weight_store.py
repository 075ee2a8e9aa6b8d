"""The weights in a `.keras` archive or a legacy `.h5` file: a tree of HDF5 groups, checked before a number is read.

HDF5 can point at other files, at other datasets and at storage that does not exist; Keras writes none of
these, so all are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, BinaryIO

import h5py
import numpy as np

from compress.errors import ModelError

_MAX_OBJECTS = 200_000
_MAX_DEPTH = 64
_BUILT_IN_FILTERS = frozenset((1, 2, 3))  # deflate, shuffle, checksum: part of HDF5 itself, never a plug-in
_SLACK_BYTES = 1 << 20
_HEAP_MARK = b"GCOL\x01\x00\x00\x00"  # signature, version, reserved
_HEAP_ENTRY = struct.Struct("<H6xQ")  # number (0: free space), size
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError)
"""What h5py raises on a damaged file."""


@dataclass(frozen=True)
class StoredWeight:
    """One array of a weights file.

    Args:
        path: HDF5 path, such as `"layers/dense/vars/0"`.
        key: position among its layer's variables, `"0"`, `"1"`, ...
        shape: its shape.
        dtype: name of its dtype; `"bfloat16"` is read as float32.
    """

    path: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    _dataset: Any = field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes as stored."""
        return self.size * int(self._dataset.dtype.itemsize)

    def read(self) -> np.ndarray:
        """Return the array, raising ModelError if the file is damaged there."""
        try:
            values = self._dataset[()]
        except HDF5_ERRORS as error:
            raise ModelError(f"the weight {self.path!r} cannot be read: {_one_line(error)}") from None
        if self.dtype == "bfloat16":  # the upper half of a float32
            bits = np.asarray(values).view(np.uint16).astype(np.uint32) << 16
            return bits.view(np.float32).reshape(self.shape)
        return np.asarray(values)


@dataclass
class WeightGroup:
    """One saved object, such as a layer, with its own weights and the objects inside it.

    Args:
        path: HDF5 path, such as `"layers/dense"`; empty for the model.
        name: the name that Keras stored with it, or `None`.
    """

    path: str
    name: str | None = None
    weights: list[StoredWeight] = field(default_factory=list)
    children: dict[str, WeightGroup] = field(default_factory=dict)

    def walk(self) -> Iterator[WeightGroup]:
        """Yield this group and every group inside it."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def all_weights(self) -> Iterator[StoredWeight]:
        """Yield every weight of this group and of the groups inside it."""
        for group in self.walk():
            yield from group.weights


class HeapFinder:
    """Collects the offsets of HDF5's global heaps, where it keeps strings, from a file given in blocks."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self._position = 0
        self._tail = b""

    def feed(self, block: bytes) -> None:
        """Search the next block."""
        content = self._tail + block
        start = content.find(_HEAP_MARK)
        while start >= 0:
            self.offsets.append(self._position - len(self._tail) + start)
            start = content.find(_HEAP_MARK, start + 1)
        self._position += len(block)
        self._tail = content[-(len(_HEAP_MARK) - 1) :]


def check_heaps(stream: BinaryIO, offsets: list[int], size_bytes: int, label: str) -> None:
    """Raise ModelError for a global heap whose entries do not fill it: HDF5 would read it for ever."""
    steps = 0
    for offset in offsets:
        stream.seek(offset + len(_HEAP_MARK))
        end = offset + int.from_bytes(stream.read(8), "little")
        position = offset + len(_HEAP_MARK) + 8
        while position + _HEAP_ENTRY.size <= min(end, size_bytes):
            stream.seek(position)
            index, size = _HEAP_ENTRY.unpack(stream.read(_HEAP_ENTRY.size))
            step = size if index == 0 else _HEAP_ENTRY.size + (size + 7) // 8 * 8
            steps += 1
            if step < _HEAP_ENTRY.size or position + step > end or steps > _MAX_OBJECTS:
                raise ModelError(f"{label} is damaged: a broken string heap at byte {offset:,}")
            position += step


class WeightStore:
    """A weights file: `root` is its tree.

    Args:
        stream: a seekable HDF5 file.
        size_bytes: its length.
        label: what errors call it.

    Raises:
        ModelError: it is not HDF5, damaged, or uses a feature that Keras does not write.
    """

    def __init__(self, stream: BinaryIO, size_bytes: int, label: str):
        self._label = label
        self._size_bytes = size_bytes
        self._declared_bytes = 0
        self._visited: set[int] = set()
        try:
            self._file = h5py.File(stream, "r")
        except HDF5_ERRORS as error:
            raise ModelError(f"{self._label} is damaged: {_one_line(error)}") from None
        self.root = WeightGroup("")
        try:
            self._read_group(self._file, self.root, 0)
        except HDF5_ERRORS as error:
            self.close()
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{self._label} is damaged: {_one_line(error)}") from None

    def close(self) -> None:
        """Close the file; weights that were not read yet cannot be read any more."""
        self._file.close()

    def read_text(self, path: str, name: str) -> str | None:
        """Return the attribute `name` of the group at `path` as text, or `None` where it is missing.

        Raises:
            ModelError: it is no text, or damaged.
        """
        value = self._read_attribute(path, name)
        if value is None or isinstance(value, str):
            return value
        raise ModelError(f"{self._label}: the attribute {name!r} is no text.")

    def read_names(self, path: str, name: str) -> list[str]:
        """Return the list of names in an attribute, which Keras splits where it is long; empty where it is missing.

        Raises:
            ModelError: it is no list of names, or damaged.
        """
        value = self._read_attribute(path, name)
        if value is None:
            parts = []
            while (part := self._read_attribute(path, f"{name}{len(parts)}")) is not None:
                parts.append(part)
            value = [item for part in parts for item in (part if isinstance(part, list) else [None])]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelError(f"{self._label}: the attribute {name!r} is no list of names.")
        return value

    def _read_attribute(self, path: str, name: str) -> Any:
        """Return text, a list of texts, or another value; HDF5 allocates what the file declares, so that is checked."""
        try:
            node = self._file[path or "/"]
            if name not in node.attrs:
                return None
            found = node.attrs.get_id(name)
            declared = prod(found.shape or ()) * found.dtype.itemsize
            if declared > self._size_bytes:
                raise ModelError(f"{self._label}: the attribute {name!r} declares {declared:,} bytes: a shape bomb.")
            value = node.attrs[name]
        except HDF5_ERRORS as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{self._label} is damaged: {_one_line(error)}") from None
        value = value.tolist() if isinstance(value, np.ndarray) else value
        try:
            if isinstance(value, list):
                return [item.decode() if isinstance(item, bytes) else item for item in value]
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            raise ModelError(f"{self._label}: the attribute {name!r} is no text.") from None

    def _read_group(self, source: h5py.Group, target: WeightGroup, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ModelError(f"{self._label}: groups are nested more than {_MAX_DEPTH} deep.")
        for key in source:
            link = source.get(key, getlink=True)
            path = f"{source.name.strip('/')}/{key}".strip("/")
            if not isinstance(link, h5py.HardLink):
                raise ModelError(f"{self._label}: {path!r} is a {type(link).__name__}; Keras writes none.")
            node = source[key]
            self._visit(node, path)
            if isinstance(node, h5py.Dataset):
                target.weights.append(self._read_dataset(node, path, key))
            elif not isinstance(node, h5py.Group):
                raise ModelError(f"{self._label}: {path!r} is neither a group nor an array.")
            elif key == "vars":
                target.name = _read_name(node)
                self._read_group(node, target, depth + 1)
            else:
                child = WeightGroup(path)
                target.children[key] = child
                self._read_group(node, child, depth + 1)
        target.weights.sort(key=lambda weight: (not weight.key.isdigit(), len(weight.key), weight.key))

    def _visit(self, node: Any, path: str) -> None:
        """Count the object, and refuse one that was seen before (a cycle, or one array under many names)."""
        address = h5py.h5o.get_info(node.id).addr
        if address in self._visited:
            raise ModelError(f"{self._label}: {path!r} is a second name for another object; Keras writes none.")
        self._visited.add(address)
        if len(self._visited) > _MAX_OBJECTS:
            raise ModelError(f"{self._label} holds more than {_MAX_OBJECTS:,} objects.")

    def _read_dataset(self, dataset: h5py.Dataset, path: str, key: str) -> StoredWeight:
        problem = _find_problem(dataset)
        if problem:
            raise ModelError(f"{self._label}: {path!r} {problem}; Keras writes none.")
        is_bfloat16 = dataset.dtype.kind == "V" and str(dataset.attrs.get("dtype")) == "bfloat16"
        if dataset.dtype.kind not in "fiub" and not (is_bfloat16 and dataset.dtype.itemsize == 2):
            raise ModelError(f"{self._label}: {path!r} holds no numbers. Received: dtype={dataset.dtype}")
        declared = prod(dataset.shape) * dataset.dtype.itemsize  # exact: Python integers do not overflow
        stored = dataset.id.get_storage_size()
        self._declared_bytes += declared
        limit = min(stored, self._size_bytes) * 1.05 + _SLACK_BYTES
        if declared > limit or self._declared_bytes > self._size_bytes * 1.05 + _SLACK_BYTES:
            raise ModelError(
                f"{self._label}: {path!r} declares {declared:,} bytes and stores {stored:,}: "
                "a shape bomb or a damaged file."
            )
        dtype = "bfloat16" if is_bfloat16 else dataset.dtype.name
        return StoredWeight(path, key, tuple(int(dim) for dim in dataset.shape), dtype, dataset)


def _find_problem(dataset: h5py.Dataset) -> str | None:
    """Return what `dataset` uses that Keras never writes, or `None`."""
    creation = dataset.id.get_create_plist()
    if creation.get_external_count():
        return "reads another file (external storage)"
    if creation.get_layout() == h5py.h5d.VIRTUAL:
        return "is a virtual dataset"
    if dataset.shape is None:
        return "has no shape"
    filters = [creation.get_filter(index)[0] for index in range(creation.get_nfilters())]
    if unknown := [number for number in filters if number not in _BUILT_IN_FILTERS]:
        return f"needs the HDF5 filter plug-in {unknown[0]}"
    return None


def _read_name(group: h5py.Group) -> str | None:
    name = group.attrs.get("name") if "name" in group.attrs else None
    return name if isinstance(name, str) else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
