"""Reading `.keras` archives with zipfile, json and h5py: nothing in the file is built, imported or executed.

A `.keras` file is a zip of `config.json` (the architecture), `metadata.json`, `model.weights.h5` and, for
some layers, `assets/`. `read_archive` refuses what no Keras ever wrote; `check_archive` then decides
whether Keras may load it.
"""

from __future__ import annotations

import json
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, cast

from compress.errors import ModelError
from compress.models.file_kind import require_zip
from compress.models.gatekeeper import SizeLimit, check_classes, check_values
from compress.models.weight_store import HeapFinder, WeightGroup, WeightStore, check_heaps

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_MAX_MEMBERS = 10_000
_MAX_TOTAL_BYTES = 16 << 30
_MAX_CONFIG_BYTES = 64 << 20
_RATIO_FLOOR_BYTES = 16 << 20
_MAX_RATIO = 100
_MAX_DEPTH = 200
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_JSON_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]', re.DOTALL)
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    RuntimeError,
    NotImplementedError,
    EOFError,
    struct.error,
)


@dataclass
class Archive:
    """A `.keras` file that is well formed. Close it, or use it in a `with` block.

    Args:
        path: where it is.
        size_bytes: its length.
        config: the architecture, as Keras serialised it.
        metadata: `keras_version` and `date_saved`, where stored.
        assets: names of its other members, such as vocabularies.
    """

    path: Path
    size_bytes: int
    config: dict[str, Any]
    metadata: dict[str, Any]
    assets: tuple[str, ...]
    _store: WeightStore = field(repr=False)
    _stream: BinaryIO = field(repr=False)

    @property
    def weights(self) -> WeightGroup:
        """The tree of everything stored, optimizer included."""
        return self._store.root

    def read_asset(self, name: str) -> bytes:
        """Return the bytes of one of `assets`, raising ModelError if it is damaged."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(name)
        except (KeyError, *_ZIP_ERRORS) as error:
            raise ModelError(f"the archive member {name!r} cannot be read: {error}") from None

    def close(self) -> None:
        """Close the file."""
        self._store.close()
        self._stream.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_archive(path: str | Path) -> Archive:
    """Open the `.keras` file at `path` and check its form.

    Raises:
        ModelError: it is missing, another kind of file, truncated, damaged, or holds what Keras never writes.
    """
    path = Path(path)
    require_zip(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _check_members(archive)
            config = _read_json(archive, members[CONFIG])
            metadata = _read_json(archive, members[METADATA]) if METADATA in members else {}
            stream = _open_member(path, archive, members[WEIGHTS])
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", error.help) from None
    except _ZIP_ERRORS as error:
        raise ModelError(_describe_damage(path, error), "Save or copy the model again.") from None
    try:
        store = WeightStore(stream, members[WEIGHTS].file_size, WEIGHTS)
    except ModelError as error:
        stream.close()
        raise ModelError(f"{path}: {error.message}", error.help) from None
    assets = tuple(name for name in members if name not in (CONFIG, METADATA, WEIGHTS))
    return Archive(path, path.stat().st_size, config, metadata, assets, store, stream)


def check_archive(
    archive: Archive | str | Path,
    allow_imports: tuple[str, ...] = (),
    allow_nonfinite: bool = False,
    compiled: bool = True,
) -> None:
    """Raise ModelError unless Keras can load the file without executing anything that the file brings.

    Args:
        archive: an opened file, or its path.
        allow_imports: packages whose classes the file may name: a top-level package (`"mylib"`), the
            package of a registered name (`"mylib"` of `"mylib>Layer"`), or `"__main__"` for classes of the
            running script.
        allow_nonfinite: accept weights that hold NaN or infinity.
        compiled: check the loss, metrics and optimizer too; without, load with `compile=False`.

    Raises:
        ModelError: naming the layer or weight, the reason and the way out.
    """
    if not isinstance(archive, Archive):
        with read_archive(archive) as opened:
            check_archive(opened, allow_imports, allow_nonfinite, compiled)
        return
    config = archive.config if compiled else {**archive.config, "compile_config": None}
    try:
        _check_version(archive.metadata)
        check_classes(config, allow_imports)
        SizeLimit(sum(weight.size for weight in archive.weights.all_weights())).take(config)
        check_values(archive.weights, allow_nonfinite)
        for name in archive.assets:
            archive.read_asset(name)  # proves its checksum
    except ModelError as error:
        raise ModelError(f"{archive.path}: {error.message}", error.help) from None
    except RecursionError:
        raise ModelError(f"{archive.path}: {CONFIG} is nested too deep.") from None


def _check_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name, after checking names, types and sizes."""
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise ModelError(f"the archive has {len(infos):,} members; at most {_MAX_MEMBERS:,} are accepted.")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in members:
            raise ModelError(f"the archive holds {info.filename!r} twice.")
        members[info.filename] = info
        if problem := _find_problem(info):
            raise ModelError(f"the archive member {info.filename[:120]!r} {problem}.")
    if (total := sum(info.file_size for info in infos)) > _MAX_TOTAL_BYTES:
        raise ModelError(f"the archive unpacks to {total:,} bytes; at most {_MAX_TOTAL_BYTES:,} are accepted.")
    for name in (CONFIG, WEIGHTS):
        if name not in members:
            raise ModelError(
                f"a zip archive without {name}, so not a .keras model. Members: {_shorten(list(members))}",
                "Save the model with model.save('model.keras').",
            )
    return members


def _find_problem(info: zipfile.ZipInfo) -> str | None:
    """Return what is wrong with a member, or `None`."""
    name = PurePosixPath(info.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename:
        return "would be written outside its folder"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a symbolic link"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type}, which Keras does not use"
    if info.filename not in (CONFIG, METADATA, WEIGHTS) and name.parts[:1] != ("assets",):
        return "does not belong in a .keras file"
    if info.filename in (CONFIG, METADATA) and info.file_size > _MAX_CONFIG_BYTES:
        return f"unpacks to {info.file_size:,} bytes; at most {_MAX_CONFIG_BYTES:,} are accepted"
    if info.file_size > max(_RATIO_FLOOR_BYTES, _MAX_RATIO * info.compress_size):
        return f"unpacks from {info.compress_size:,} to {info.file_size:,} bytes: a zip bomb"
    return None


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in `content`, refusing deep nesting before the parser sees it.

    Raises:
        ModelError: it is no JSON, no object, or nested too deep; the message calls it `name`.
    """
    depth = 0
    for match in _JSON_TOKEN.finditer(content):
        first = match[0][0]
        depth += 1 if first in b"[{" else -1 if first in b"]}" else 0
        if depth > _MAX_DEPTH:
            raise ModelError(f"{name} is nested more than {_MAX_DEPTH} deep.")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not valid JSON: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{name} must hold an object. Received: {type(value).__name__}")
    return value


def _read_json(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> dict[str, Any]:
    with archive.open(info) as file:
        value = parse_json(file.read(_MAX_CONFIG_BYTES + 1), info.filename)
    if info.filename == CONFIG and not (isinstance(value.get("config"), dict) and "class_name" in value):
        raise ModelError(f"{CONFIG} does not describe a Keras model (class_name and config are missing).")
    return value


def _open_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> BinaryIO:
    """Return a seekable stream over one member: a window on the file, or an unpacked temporary copy.

    The member is read once: that proves its checksum and finds the parts of HDF5 that need their own check.
    """
    copy = None
    if info.compress_type != zipfile.ZIP_STORED:
        copy = tempfile.SpooledTemporaryFile(max_size=64 << 20)  # noqa: SIM115 - returned open
    finder = HeapFinder()
    with archive.open(info) as source:
        while block := source.read(1 << 20):
            finder.feed(block)
            if copy is not None:
                copy.write(block)
    stream = cast("BinaryIO", copy) if copy is not None else _open_window(path, info)
    try:
        check_heaps(stream, finder.offsets, info.file_size, info.filename)
    except ModelError:
        stream.close()
        raise
    return stream


def _open_window(path: Path, info: zipfile.ZipInfo) -> BinaryIO:
    file = path.open("rb")
    file.seek(info.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04" or start + info.file_size > path.stat().st_size:
        file.close()
        raise zipfile.BadZipFile(f"{info.filename} reaches past the end of the file")
    return cast("BinaryIO", _Window(file, start, info.file_size))


class _Window(RawIOBase):
    """Part of a file as a file; zipfile's own stream starts over on each backward seek."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._start + self._position)
        block = self._file.read(max(0, min(len(view), self._size - self._position)))
        view[: len(block)] = block
        self._position += len(block)
        return len(block)

    def close(self) -> None:
        self._file.close()
        super().close()


def _check_version(metadata: dict[str, Any]) -> None:
    version = str(metadata.get("keras_version", ""))
    major = version.partition(".")[0]
    if major.isdigit() and int(major) > 3:
        raise ModelError(f"saved by Keras {version[:20]}; Keras 3 cannot open it.", "Save it with Keras 3.")
    if major == "2":
        raise ModelError(
            f"saved by Keras {version[:20]}, which Keras 3 does not open.",
            "Migrate it: bmcompress migrate OLD.keras -o NEW.keras",
        )


def _describe_damage(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        return f"{path} is a truncated zip: central directory missing, {size:,} bytes."
    return f"{path} is a damaged zip: {' '.join(str(error).split())[:160]}, {size:,} bytes."


def _shorten(names: list[str], count: int = 5) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:count]) or "none"
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")
