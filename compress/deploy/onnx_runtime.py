"""`.onnx` files in ONNX Runtime on the CPU, with its default graph optimizations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from compress.deploy.records import TensorInfo
from compress.deploy.runtimes import FileRuntime, one_line
from compress.errors import DataError, ModelError

_ONLY_ERRORS = 3


class OnnxRuntime(FileRuntime):
    """A loaded `.onnx` file. Inputs and outputs are in the order of its graph."""

    name = "onnx"
    version = onnxruntime.__version__

    def __init__(self, path: Path, threads: int):
        self._path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _ONLY_ERRORS
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no public base; each means a file it cannot run
            raise ModelError(
                f"{path} cannot be opened by ONNX Runtime {self.version}. Received: {one_line(error)}",
                "Export the model again.",
            ) from error
        inputs = tuple(_describe(argument, path) for argument in self._session.get_inputs())
        super().__init__(inputs, tuple(_describe(argument, path) for argument in self._session.get_outputs()), threads)

    def _invoke(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        feeds = {info.name: array for info, array in zip(self.inputs, arrays, strict=True)}
        try:
            return self._session.run([info.name for info in self.outputs], feeds)
        except Exception as error:  # as above
            raise DataError(
                f"{self._path} could not run on inputs of shape "
                f"{', '.join(str(array.shape) for array in arrays)}. "
                f"Received: {one_line(error)}"
            ) from error


def _describe(argument: Any, path: Path) -> TensorInfo:
    if not argument.type.startswith("tensor("):
        raise ModelError(f"{path}: {argument.name!r} must be a tensor. Received: {argument.type}")
    kind = argument.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
    shape = tuple(size if isinstance(size, int) else None for size in argument.shape or ())
    return TensorInfo(name=argument.name, shape=shape, dtype=dtype)
