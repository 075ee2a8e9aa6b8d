"""Folders of images, one folder per class, read as `keras.utils.image_dataset_from_directory` reads them.

The files are listed here rather than by Keras so that `take` is a random subset instead of the first class, a
broken or oversized file is named, and nothing outside the folder is read.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.references import ImageFolder
from compress.data.samples import Samples, fixed_order
from compress.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
_PARTS = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "validation", "val", "valid"),
    "unlabelled": ("unlabelled", "unlabeled", "train"),
}
_KNOWN_PARTS = ("train", "validation", "val", "valid", "test", "unlabelled", "unlabeled")
_MAX_PIXELS = 100_000_000
_IN_MEMORY_BYTES = 2**29


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Args:
        root: the folder that holds the class folders.
        classes: class folders in the order of their labels; none where the images lie in `root` itself.
        files: paths, class by class.
        labels: int32 position in `classes` of each file.
        whole: whether the folder has no `train/`, `test/`, ... below it.
        notes: sentences for the user.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: np.ndarray
    whole: bool
    notes: tuple[str, ...] = ()


def list_images(source: ImageFolder, wanted: str, labels: bool) -> Listing:
    """Return the images of `source` for the split `wanted`; opens none of them.

    Raises:
        DataError: no such folder, no class, no image, or a link that leaves the folder.
    """
    top = Path(source.path)
    if not top.is_dir():
        raise DataError(
            f"expected a folder of images. Received: {top}, " + ("a file" if top.exists() else "which does not exist")
        )
    parts = _find_parts(top, source.classes)
    root, notes = _choose_part(top, parts, wanted) if parts else (top, [])
    there = sorted({name for part in parts for name in _folders(top / part)} if parts else _folders(top))
    classes = source.classes or tuple(there)
    if unknown := [name for name in classes if name not in there]:
        raise DataError(f"{root}: has no class folder {unknown[0]!r}. Received: {', '.join(there) or 'no folder'}")
    if left_out := [name for name in there if name not in classes]:
        notes.append(f"{root}: folders that are not in `classes` are left out: {', '.join(left_out)}")
    if not classes and labels:
        raise DataError(
            f"expected one folder per class below {root}. Received: no folder",
            "Images without labels: `labels: false`.",
        )
    found, others = [], _count_files(root) if classes else 0
    for label, name in enumerate(classes or (".",)):
        files, skipped = _walk(root / name, top)
        found += [(file, label) for file in files]
        others += skipped
    if not found:
        raise DataError(f"{root}: has no images. Received: 0 files that end in {', '.join(SUFFIXES)}")
    if others:
        notes.append(f"{root}: {others} files are no images of a class and are left out")
    numbers = np.array([label for _, label in found], dtype=np.int32)
    return Listing(root, classes, tuple(file for file, _ in found), numbers, not parts, tuple(notes))


def read_image_folder(source: ImageFolder, wanted: str, labels: bool, cache: dict[Any, Any]) -> Samples:
    """Return files and labels in a fixed random order; they become images once they are chosen."""
    listing = list_images(source, wanted, labels)
    key = (str(listing.root), source.size, source.channels, listing.classes)
    if key not in cache:
        order = fixed_order(len(listing.files))
        cache[key] = np.array([str(file) for file in listing.files])[order], listing.labels[order]
    files, numbers = cache[key]
    return Samples(
        source.path,
        files,
        numbers if labels else None,
        names=("files", "labels") if labels else ("files",),
        whole=listing.whole,
        decode=partial(_decode, source, listing.root, listing.classes),
        notes=listing.notes,
    )


def _find_parts(top: Path, classes: tuple[str, ...] | None) -> list[str]:
    """Return the folders of `top` that are splits; raises DataError where they may as well be classes."""
    folders = _folders(top)
    parts = [name for name in _KNOWN_PARTS if name in folders]
    if not parts or (classes is not None and set(classes) <= set(folders)):
        return []
    if others := sorted(set(folders) - set(parts)):
        raise DataError(
            f"{top}: expected either splits or classes. Received: {', '.join(parts)} beside {', '.join(others)}",
            "If all of them are classes, list them in `classes:`; if not, give the path of each split.",
        )
    return parts


def _choose_part(top: Path, parts: list[str], wanted: str) -> tuple[Path, list[str]]:
    if wanted == "all":
        raise DataError(f"{top}: `split: all` is for folders without splits. Received: {', '.join(parts)}")
    part = next((name for name in _PARTS[wanted] if name in parts), None)
    if part is None:
        raise DataError(f"{top}: has no folder {wanted!r}. Received: {', '.join(parts)}")
    said = wanted == "test" and part != "test"
    return top / part, [f"{top} has no test folder: {part} is measured on"] if said else []


def _count_files(folder: Path) -> int:
    return sum(entry.is_file() and not entry.name.startswith(".") for entry in folder.iterdir())


def _folders(root: Path) -> list[str]:
    return [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _walk(folder: Path, top: Path) -> tuple[list[Path], int]:
    """Return the image files below `folder` in order of their names, and the number of other files."""
    if not folder.is_dir():
        return [], 0  # a class that another split has
    files, others = [], 0
    inside = top.resolve()
    _refuse_link(folder, inside)
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in (*folders, *sorted(names)):
            _refuse_link(Path(place) / name, inside)
        images = [name for name in sorted(names) if name.lower().endswith(SUFFIXES)]
        files += [Path(place) / name for name in images]
        others += sum(not name.startswith(".") for name in names) - len(images)
        if folder == top:
            break  # images of no class lie in the folder itself
    return files, others


def _refuse_link(path: Path, inside: Path) -> None:
    if not path.is_symlink():
        return
    target = path.resolve()
    if path.is_dir() or not target.is_relative_to(inside):
        raise DataError(
            f"{path}: links to folders, and out of {inside}, are not followed. Received: a link to {target}"
        )


def check_image_file(path: str) -> None:
    """Raise DataError that names the file unless it begins as an image of at most 100 million pixels."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(32)
    except OSError as error:
        raise DataError(f"image cannot be read: {error.strerror}. Received: {path}") from None
    sizes = (0, 0)
    if head.startswith(b"\x89PNG") and len(head) >= 24:
        sizes = struct.unpack(">II", head[16:24])
    elif head.startswith(b"GIF8") and len(head) >= 10:
        sizes = struct.unpack("<HH", head[6:10])
    elif head.startswith(b"BM") and len(head) >= 26:
        sizes = struct.unpack("<ii", head[18:26])
    elif not head.startswith(b"\xff\xd8\xff"):
        what = "an empty file" if not head else "something else"
        raise DataError(f"expected a PNG, JPEG, GIF or BMP image. Received: {path}, {what}")
    check_pixels(path, *sizes)


def check_pixels(path: str, width: int, height: int) -> None:
    """Raise DataError when decoding the image would take unreasonable memory."""
    if abs(width * height) > _MAX_PIXELS:
        raise DataError(f"image must have at most {_MAX_PIXELS} pixels. Received: {path}, {width} x {height}")


def _decode(
    source: ImageFolder, root: Path, classes: tuple[str, ...], files: np.ndarray, labels: np.ndarray | None
) -> Any:
    """Return `(x, y, stream, digest)`: arrays where they fit in memory, a stream otherwise."""
    from compress.data.image_batches import ImageBatches

    for file in files:
        check_image_file(file)
    batches = ImageBatches(files, labels, source.size, source.channels)
    if len(files) * source.size[0] * source.size[1] * source.channels * 4 <= _IN_MEMORY_BYTES:
        return batches.read_all(), labels, None, ""
    digest = hashlib.sha256(f"{source.size} {source.channels} {classes}".encode())
    for index, file in enumerate(files):
        status = os.stat(file)
        label = "" if labels is None else labels[index]
        digest.update(f"{Path(file).relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\0{label}\n".encode())
    return None, None, batches, digest.hexdigest()
