"""What a model costs as an exported file, as a share of what another one does: bytes, or measured time."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Self

import keras

from compress.deploy.exporting import export_model
from compress.deploy.signature import draw_samples, pack_inputs, read_signature
from compress.errors import UsageError
from compress.measure.inputs import write_inputs
from compress.measure.latency import measure_latency

FileCost = Literal["bytes", "latency"]
Runtime = Literal["tflite", "onnx"]

TOLERANCE = 0.03
"""How far from its target, as a share of it, a model may be."""

_SAMPLES = 16
_PROCESSES, _SECONDS = 3, 3.0


class FileCosts:
    """Exports models and compares their files with the original's; use it in a `with` block.

    Args:
        original: a built model.
        cost: `"bytes"` of the file, or `"latency"`: the median ratio of runs that take turns with the original's, in
            fresh processes.
        runtime: `"tflite"`, run by LiteRT, or `"onnx"`, run by ONNX Runtime.
        threads: of the runtime.

    Raises:
        ExportError: the original has no such file.
    """

    def __init__(self, original: keras.Model, cost: FileCost, runtime: Runtime = "tflite", threads: int = 1):
        if threads < 1:
            raise UsageError(f"threads must be at least 1. Received: threads={threads}")
        self._cost, self._runtime, self._threads, self._original = cost, runtime, threads, original
        self._stack = ExitStack()
        self._count = 0

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bmcompress-target-")))
        self._reference = self._export(self._original)
        if self._cost == "latency":
            signature = read_signature(self._original, None)
            arrays = draw_samples(signature, _SAMPLES, seed=0)
            write_inputs(self._folder / "inputs", pack_inputs(signature, arrays))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def share(self, model: keras.Model) -> float:
        """Return the cost of `model` as a share of the original's."""
        file = self._export(model)
        if self._cost == "bytes":
            return file.stat().st_size / self._reference.stat().st_size
        return measure_latency(
            self._reference,
            file,
            self._folder / "inputs",
            threads=self._threads,
            processes=_PROCESSES,
            max_s=_SECONDS,
        ).ratio

    def _export(self, model: keras.Model) -> Path:
        self._count += 1
        path = self._folder / f"{self._count}.{self._runtime}"
        export_model(model, path)
        return path
