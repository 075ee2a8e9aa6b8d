"""What a model file weighs and holds, measured in the file itself without running it.

Parameters, zeros, distinct values and multiply-accumulates are read from the file's own graph and tensors, so
they tell what an export kept of a compression, not what the model before it had.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

import zstandard

from compress.errors import ModelError
from compress.measure.results import FileSize
from compress.worker import run_in_worker

_WEIGHT_FIELDS = (
    "parameters",
    "nonzero_parameters",
    "kernel_weights",
    "nonzero_kernel_weights",
    "sparsity",
    "distinct_weights",
)
_CHUNK = 1 << 20
_GZIP_LEVEL = 6  # of gzip and of most servers unless told otherwise
_ZSTD_LEVEL = 19  # the best that every decoder takes; files are packed once and unpacked often
_GZIP_WINDOW = 31  # 15 bits of window, in a gzip wrapper whose header holds no name and no time


def measure_size(path: str | Path) -> tuple[FileSize, str]:
    """Return the size of the `.tflite`, `.onnx` or `.keras` file at `path`, and its sha256.

    The file is read in a child process: what parses it may crash on a damaged one.

    Raises:
        ModelError: the file is missing, damaged or of no known format.
    """
    answer = run_in_worker("compress.measure.size:read_size", {"path": str(path)})
    return FileSize(**answer["size"]), answer["sha256"]


def read_size(path: str) -> dict[str, Any]:
    """Return the fields of `FileSize` and the sha256; runs in the child process."""
    from compress.deploy.formats import detect_format

    file_format = detect_format(Path(path))
    file_bytes, gzip_bytes, zstd_bytes, sha256 = _weigh(Path(path))
    size: dict[str, Any] = {"file_bytes": file_bytes, "gzip_bytes": gzip_bytes, "zstd_bytes": zstd_bytes}
    if file_format == "keras":
        from compress.measure.keras_contents import read_keras as read_contents
    elif file_format == "onnx":
        from compress.measure.onnx_contents import read_onnx as read_contents
    else:
        from compress.measure.tflite_contents import read_tflite as read_contents
    contents = read_contents(path)
    weights = contents.weights
    reasons = {}
    if not weights.kernel_weights:
        reasons["sparsity"] = "the file has no kernels"
    zeros = weights.kernel_weights - weights.nonzero_kernel_weights
    sparsity = zeros / weights.kernel_weights if weights.kernel_weights else None
    size |= {
        "parameters": weights.parameters,
        "nonzero_parameters": weights.nonzero_parameters,
        "kernel_weights": weights.kernel_weights,
        "nonzero_kernel_weights": weights.nonzero_kernel_weights,
        "sparsity": sparsity,
        "distinct_weights": weights.distinct,
        "kernels": [vars(kernel) for kernel in weights.kernels],
        "macs": contents.macs,
        "macs_partial": bool(contents.uncounted),
        "uncounted_ops": sorted(contents.uncounted),
        "reasons": reasons,
    }
    if contents.unread:
        unknown = [name for name in _WEIGHT_FIELDS if size[name] is not None]
        size |= dict.fromkeys(unknown) | {"kernels": []}
        reasons.update(dict.fromkeys(unknown, f"the file holds {', '.join(sorted(contents.unread))}"))
    return {"size": size, "sha256": sha256}


def _weigh(path: Path) -> tuple[int, int, int, str]:
    """Return bytes, bytes after gzip and after zstd, and sha256, in one reading."""
    digest, gzip = hashlib.sha256(), zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    zstd = zstandard.ZstdCompressor(_ZSTD_LEVEL).compressobj(size=path.stat().st_size)
    plain = by_gzip = by_zstd = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                plain += len(chunk)
                by_gzip += len(gzip.compress(chunk))
                by_zstd += len(zstd.compress(chunk))
    except OSError as error:
        raise ModelError(f"{path} cannot be read. Received: {error.strerror}") from error
    return plain, by_gzip + len(gzip.flush()), by_zstd + len(zstd.flush()), digest.hexdigest()
