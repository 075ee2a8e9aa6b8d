"""Which format a model file has, told by its content and then by its suffix; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from compress.errors import ModelError

_SUFFIXES = (".tflite", ".onnx", ".keras")


def detect_format(path: Path) -> str:
    """Return `"tflite"`, `"onnx"` or `"keras"` for a model file.

    Raises:
        ModelError: the file is missing, empty, or of no format that is known.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read. Received: {error.strerror}") from error
    suffix = path.suffix.lower()
    if not head:
        raise ModelError(f"{path} is empty. Received: 0 bytes", "Export the model again.")
    if head[4:8] == b"TFL3":
        return "tflite"
    if head[:4] == b"PK\x03\x04" and suffix not in (".tflite", ".onnx"):
        return "keras"
    if suffix == ".onnx" and head[0] == 0x08:  # field 1 of the ONNX message: its version, which every file has first
        return "onnx"
    expected = f"a {suffix} model" if suffix in _SUFFIXES else "a model file (.tflite, .onnx or .keras)"
    raise ModelError(f"{path} is not {expected}. Received: content that starts with {head!r}")
