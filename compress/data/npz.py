"""Arrays from `.npz` files that may be broken or hostile.

Pickles are refused, and what a header promises is checked against what the file holds before memory is taken.
"""

from __future__ import annotations

import difflib
import math
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from compress.data.references import NpzFile
from compress.data.samples import Samples, check_lengths
from compress.data.split import first_line, flatten_arrays, map_arrays
from compress.errors import DataError

_SUFFIXES = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
    "unlabelled": ("unlabelled", "unlabeled", "train"),
    "all": (),
}
_READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    NotImplementedError,
)


def read_members(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return name -> (shape, dtype) of each array in the file, read from the headers alone.

    Raises:
        DataError: the file is missing, truncated or no npz file, or a header promises more than it holds.
    """
    with _open_zip(path) as archive:
        return {key: _read_header(archive, path, key)[:2] for key in _keys_in(archive)}


def read_npz(source: NpzFile, path: Path, wanted: str, labels: bool, cache: dict[Any, Any]) -> Samples:
    """Return the arrays of `source` for the split `wanted`; `cache` keeps what was read before."""
    x, y, whole = choose_keys(source, path, read_members(path), wanted, labels)
    keys = (*flatten_arrays(x), *flatten_arrays(y))
    arrays = cache.setdefault(str(path), {})
    arrays.update(_read_arrays(path, {key for key in keys if key not in arrays}))
    pick = arrays.__getitem__
    samples = Samples(path.name, map_arrays(pick, x), map_arrays(pick, y), names=keys, whole=whole)
    check_lengths(samples)
    return samples


def choose_keys(
    source: NpzFile, path: Path, members: Iterable[str], wanted: str, labels: bool
) -> tuple[Any, Any, bool]:
    """Return the keys of `x` and of `y`, and whether they hold a set without splits.

    By default `x` means `x_train` for the train split where there is one, else `x`. A name that is given
    means the array of that name where there is one, else that name with the split's suffix.

    Raises:
        DataError: an array is missing; those that the file has are listed.
    """
    members = tuple(members)
    whole = True

    def find(name: str, given: bool) -> str | None:
        nonlocal whole
        suffixed = [f"{name}_{suffix}" for suffix in _SUFFIXES[wanted]]
        candidates = [name, *suffixed] if given else [*suffixed, name]
        found = next((key for key in candidates if key in members), None)
        whole = whole and found == name
        return found

    def require(name: str, given: bool) -> str:
        if found := find(name, given):
            return found
        expected = name if given or wanted == "all" else f"{name}_{_SUFFIXES[wanted][0]}"
        other = "" if expected == name else f" and no {name!r}"
        near = difflib.get_close_matches(expected, members, n=1)
        hint = f"; did you mean {near[0]!r}?" if given and near else "."
        raise DataError(
            f"{path.name}: has no array {expected!r}{other}{hint} "
            f"Received: {', '.join(map(repr, members)) or 'no array'}",
            f"Name the arrays with `x:` and `y:`, or as in npz:{path.name}?x=images&y=labels, "
            "where 20 % of one array is held out for test.",
        )

    x = require("x", given=False) if source.x is None else map_arrays(lambda name: require(name, given=True), source.x)
    if not labels:
        return x, None, whole
    if source.y is not None:
        return x, map_arrays(lambda name: require(name, given=True), source.y), whole
    if whole:
        return x, "y" if "y" in members else None, True
    return x, next((key for suffix in _SUFFIXES[wanted] if (key := f"y_{suffix}") in members), None), False


def _open_zip(path: Path) -> zipfile.ZipFile:
    if path.is_dir():
        raise DataError(
            f"expected an npz file. Received: {path}, a folder", "Write folder:PATH for a folder of images."
        )
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        if zipfile.is_zipfile(path):
            return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"data file does not exist. Received: {path}") from None
    except _READ_ERRORS as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None
    if not magic:
        what = "an empty file"
    elif magic.startswith(b"PK"):
        what = "a truncated file: its table of contents, at the end, is missing"
    elif magic.startswith(b"\x93NUMPY"):
        what = "a .npy file, which holds one array; numpy.savez writes x and y into one file"
    else:
        what = "something else"
    raise DataError(f"expected an npz file, as numpy.savez writes. Received: {path}, {what}")


def _keys_in(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _read_header(archive: zipfile.ZipFile, path: Path, key: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape, dtype and size in bytes of an array after checking them against the member's size."""
    try:
        info = archive.getinfo(f"{key}.npy")
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"unsupported header version {version}")
            old = version == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
            start = member.tell()
    except _READ_ERRORS as error:
        raise DataError(f"{path.name}: array {key!r} cannot be read: {first_line(error)}") from None
    size_bytes = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (min(shape, default=0) < 0 or start + size_bytes != info.file_size):
        raise DataError(
            f"{path.name}: array {key!r} is corrupt: its header promises shape {shape} of {dtype}, "
            f"{size_bytes} bytes. Received: {info.file_size - start} bytes"
        )
    return shape, dtype, size_bytes


def _read_arrays(path: Path, keys: set[str]) -> dict[str, np.ndarray]:
    with _open_zip(path) as archive:
        needed_bytes = 0
        for key in sorted(keys):
            _, dtype, size_bytes = _read_header(archive, path, key)
            needed_bytes += size_bytes
            if dtype.hasobject or dtype.kind not in "biufcSU":
                what = "pickled Python objects, which could run code" if dtype.hasobject else str(dtype)
                raise DataError(
                    f"{path.name}: array {key!r} must hold numbers or text. Received: {what}",
                    "Save it again as an array of numbers: np.stack(...) where the parts have one shape.",
                )
        free_bytes = psutil.virtual_memory().available
        if needed_bytes > free_bytes:
            raise DataError(
                f"{path.name}: must fit in memory, of which {free_bytes / 2**30:.1f} GiB are free. "
                f"Received: {needed_bytes / 2**30:.1f} GiB",
                "Give a function that returns a tf.data.Dataset instead: package.module:function.",
            )
        return {key: _read_array(archive, path, key) for key in keys}


def _read_array(archive: zipfile.ZipFile, path: Path, key: str) -> np.ndarray:
    try:
        with archive.open(f"{key}.npy") as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            member.read(1)  # reaching the end compares the checksum
            return array
    except _READ_ERRORS as error:
        raise DataError(f"{path.name}: array {key!r} is corrupt: {first_line(error)}") from None
