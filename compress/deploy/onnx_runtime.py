"""`.onnx` files in ONNX Runtime, with its default graph optimizations.

Inputs and outputs of files that take integers hold real values here: floats are put onto the grid that the file's
metadata tells and outputs are taken off it, so every file is compared and measured in the same numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from compress.deploy.devices import require_no_fallback, require_provider
from compress.deploy.records import TensorInfo
from compress.deploy.runtimes import FileRuntime, Grid, one_line, put_on_grid, take_off_grid
from compress.errors import DataError, ModelError

GRIDS_KEY = "bmcompress.grids"
"""Key of a file's metadata that tells the grids of its inputs and outputs, as JSON."""

_ONLY_ERRORS = 3


class OnnxRuntime(FileRuntime):
    """A loaded `.onnx` file. Inputs and outputs are in the order of its graph.

    `run` quantizes what is not of an integer input's own type, and returns quantized outputs as float32; `inputs` and
    `outputs` say the types in the file.

    Attributes:
        input_grids: the grid of each input, `None` where nothing quantizes it or the file does not tell.
        output_grids: the grid of each output, likewise; also where the file turns the integers into floats itself.
    """

    name = "onnx"
    version = onnxruntime.__version__

    def __init__(self, path: Path, threads: int, *, device: str = "cpu", profile_prefix: str | None = None):
        self._path = path
        providers = require_provider(device, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        if profile_prefix is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile_prefix
        options.intra_op_num_threads = threads
        options.log_severity_level = _ONLY_ERRORS
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no public base; each means a file it cannot run
            raise ModelError(
                f"{path} cannot be opened by ONNX Runtime {self.version}. Received: {one_line(error)}",
                "Export the model again.",
            ) from error
        require_no_fallback(device, self._session.get_providers())
        inputs = tuple(_describe(argument, path) for argument in self._session.get_inputs())
        super().__init__(inputs, tuple(_describe(argument, path) for argument in self._session.get_outputs()), threads)
        text = self._session.get_modelmeta().custom_metadata_map.get(GRIDS_KEY, "{}")
        self.input_grids = _read_grids(text, "inputs", self.inputs, path)
        self.output_grids = _read_grids(text, "outputs", self.outputs, path)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        known = zip(inputs, self.inputs, self.input_grids, strict=False)  # a wrong number is refused below
        quantized = [put_on_grid(array, info.dtype, grid) for array, info, grid in known]
        return super().run([*quantized, *inputs[len(self.inputs) :]])

    def end_profiling(self) -> str:
        """Return the path of the JSON file with the times of all runs; the file was opened with `profile_prefix`."""
        return self._session.end_profiling()

    def _invoke(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        feeds = {info.name: array for info, array in zip(self.inputs, arrays, strict=True)}
        try:
            outputs = self._session.run([info.name for info in self.outputs], feeds)
        except Exception as error:  # as above
            raise DataError(
                f"{self._path} could not run on inputs of shape "
                f"{', '.join(str(array.shape) for array in arrays)}. "
                f"Received: {one_line(error)}"
            ) from error
        return [take_off_grid(output, grid) for output, grid in zip(outputs, self.output_grids, strict=True)]


def _read_grids(text: str, side: str, tensors: tuple[TensorInfo, ...], path: Path) -> list[Grid | None]:
    """Return the grids that a file's metadata tells for `"inputs"` or `"outputs"`."""
    try:
        found = json.loads(text).get(side, {})
        grids = {name: (float(grid["scale"]), int(grid["zero_point"])) for name, grid in found.items()}
        if not all(math.isfinite(scale) and scale > 0 for scale, _ in grids.values()):
            raise ValueError("a scale that is not above 0")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{path}: expected the metadata {GRIDS_KEY!r} to tell scales and zero points. Received: {one_line(error)}",
            "Export the model again.",
        ) from error
    return [grids.get(info.name) for info in tensors]


def _describe(argument: Any, path: Path) -> TensorInfo:
    if not argument.type.startswith("tensor("):
        raise ModelError(f"{path}: {argument.name!r} must be a tensor. Received: {argument.type}")
    kind = argument.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
    shape = tuple(size if isinstance(size, int) else None for size in argument.shape or ())
    return TensorInfo(name=argument.name, shape=shape, dtype=dtype)
