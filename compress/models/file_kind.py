"""What a file is, judged by its content and never by its name: a wrong file is named for what it is."""

from __future__ import annotations

from pathlib import Path

from compress.errors import ModelError

_SAVE_AGAIN = "Load it with the Keras that saved it, then model.save('model.keras')."
_HDF5 = b"\x89HDF\r\n\x1a\n"
_KINDS: tuple[tuple[bytes, int, str, str | None], ...] = (
    (_HDF5, 0, "an HDF5 file (a model or weights of Keras 2)", "Migrate it: bmcompress migrate OLD.h5 -o NEW.keras"),
    (b"TFL3", 4, "a TFLite model", "Pass the .keras file that it was exported from."),
    (b"\x89PNG\r\n\x1a\n", 0, "a PNG image", None),
    (b"GIF8", 0, "a GIF image", None),
    (b"\xff\xd8\xff", 0, "a JPEG image", None),
    (b"%PDF-", 0, "a PDF document", None),
    (b"\x1f\x8b", 0, "a gzip archive", "Unpack it first."),
    (b"\x93NUMPY", 0, "a NumPy array", None),
    (b"\x7fELF", 0, "a program", None),
    (b"PK\x05\x06", 0, "an empty zip archive", None),
    (b"version https://git-lfs", 0, "a Git LFS pointer, not the model itself", "Fetch it with: git lfs pull"),
    (b"\x80\x02", 0, "a Python pickle, which is never opened", _SAVE_AGAIN),
    (b"\x80\x03", 0, "a Python pickle, which is never opened", _SAVE_AGAIN),
    (b"\x80\x04", 0, "a Python pickle, which is never opened", _SAVE_AGAIN),
    (b"\x80\x05", 0, "a Python pickle, which is never opened", _SAVE_AGAIN),
)
_ONNX_FIRST_FIELD = 0x08  # ModelProto.ir_version, a varint
_ONNX_PRODUCER_FIELD = 0x12


def require_zip(path: Path) -> None:
    """Raise ModelError that names what `path` is, unless its content starts like a zip archive."""
    head, size = _read_head(path)
    if not head.startswith(b"PK\x03\x04"):
        kind, way_out = _identify(head)
        raise ModelError(f"{path} is {kind}, not a .keras file ({size:,} bytes).", way_out)


def is_hdf5(path: Path) -> bool:
    """Return whether the content of `path` starts like an HDF5 file.

    Raises:
        ModelError: it is missing, no regular file, or cannot be read.
    """
    return _read_head(path)[0].startswith(_HDF5)


def _read_head(path: Path) -> tuple[bytes, int]:
    """Return the first bytes of a file, and how many it has."""
    if path.is_dir():
        raise _refuse_directory(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ModelError(f"{path} is not a regular file.", "Pass the path of a .keras file.")
        with path.open("rb") as file:
            return file.read(1024), size
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.", "Pass the path of a .keras file.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {reason}") from None


def _refuse_directory(path: Path) -> ModelError:
    if (path / "saved_model.pb").exists() or (path / "saved_model.pbtxt").exists():
        return ModelError(f"{path} is a SavedModel directory, not a .keras file.", _SAVE_AGAIN)
    if (path / "config.json").exists():
        return ModelError(f"{path} is an unpacked Keras model, not a .keras file.", _SAVE_AGAIN)
    return ModelError(f"{path} is a directory, not a .keras file.", "Pass the path of a .keras file.")


def _identify(head: bytes) -> tuple[str, str | None]:
    """Return what a file with these first bytes is, and the way out."""
    if not head:
        return "empty", "Save or copy the model again."
    for magic, offset, kind, way_out in _KINDS:
        if head[offset : offset + len(magic)] == magic:
            return kind, way_out
    if len(head) > 2 and head[0] == _ONNX_FIRST_FIELD and head[1] < 0x20 and head[2] == _ONNX_PRODUCER_FIELD:
        return "an ONNX model", "Pass the .keras file that it was exported from."
    if not head.strip(b"\x00"):
        return "filled with zero bytes", "Save or copy the model again."
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < 1024 else "ignore")
    except UnicodeDecodeError:
        return "of an unknown binary format", None
    if any(ord(letter) < 32 and letter not in "\t\n\r\f" for letter in text):
        return "of an unknown binary format", None
    return "a text file", None
