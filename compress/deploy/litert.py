"""`.tflite` files in LiteRT's interpreter, with its default options (XNNPACK kernels).

Inputs and outputs of files that take integers hold real values here: floats are put onto the grid of the tensor and
outputs are taken off it, so every file is compared and measured in the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from compress.deploy.records import TensorInfo
from compress.deploy.runtimes import FileRuntime, Grid, one_line, package_version, put_on_grid, take_off_grid
from compress.errors import DataError, ModelError, SetupError


class LiteRtRuntime(FileRuntime):
    """A loaded `.tflite` file. Inputs and outputs are in the order of the file, named as in its signature.

    `run` quantizes what is not of an integer input's own type, and returns quantized outputs as float32; `inputs` and
    `outputs` say the types in the file.
    """

    name = "tflite"

    def __init__(self, path: Path, threads: int, *, device: str = "cpu"):
        if device != "cpu":
            raise SetupError(
                f"LiteRT's interpreter runs on the CPU. Received: device={device}", "Measure the .onnx file there."
            )
        self.version = package_version("ai-edge-litert")
        self._path = path
        try:
            self._interpreter = self._open_interpreter(path, threads)
            self._inputs = self._interpreter.get_input_details()
            self._outputs = self._interpreter.get_output_details()
            inputs, outputs = self._describe_tensors()
            self._shapes: list[tuple[int, ...]] = []
            if all(
                size is not None for info in inputs for size in info.shape[1:]
            ):  # else not before the sizes are known
                self._interpreter.allocate_tensors()
                self._shapes = [tuple(details["shape"]) for details in self._inputs]
        except Exception as error:  # LiteRT raises ValueError, RuntimeError and others; each means a file it cannot run
            raise ModelError(
                f"{path} cannot be opened by LiteRT {self.version}. Received: {one_line(error)}",
                "Export the model again.",
            ) from error
        super().__init__(inputs, outputs, threads)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        known = zip(inputs, self.inputs, self._inputs, strict=False)  # a wrong number is refused below
        quantized = [put_on_grid(array, info.dtype, _grid(details)) for array, info, details in known]
        return super().run([*quantized, *inputs[len(self.inputs) :]])

    def tensor_details(self) -> list[dict[str, Any]]:
        """Return what LiteRT tells of each tensor, with the shapes of the last run."""
        return self._interpreter.get_tensor_details()

    def _open_interpreter(self, path: Path, threads: int) -> Interpreter:
        return Interpreter(model_path=str(path), num_threads=threads)

    def _describe_tensors(self) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        """Return the inputs and the outputs, under the names in the file's signature if it has one."""
        if len(self._interpreter.get_signature_list()) != 1:
            return _describe(self._inputs, {}), _describe(self._outputs, {})
        runner = self._interpreter.get_signature_runner()
        return _describe(self._inputs, runner.get_input_details()), _describe(
            self._outputs, runner.get_output_details()
        )

    def _invoke(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        try:
            shapes = [array.shape for array in arrays]
            if shapes != self._shapes:
                for details, shape in zip(self._inputs, shapes, strict=True):
                    self._interpreter.resize_tensor_input(details["index"], shape)
                self._interpreter.allocate_tensors()
                self._shapes = shapes
            for details, array in zip(self._inputs, arrays, strict=True):
                self._interpreter.set_tensor(details["index"], array)
            self._interpreter.invoke()
            outputs = [self._interpreter.get_tensor(details["index"]) for details in self._outputs]
            return [take_off_grid(array, _grid(details)) for array, details in zip(outputs, self._outputs, strict=True)]
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"{self._path} could not run on inputs of shape "
                f"{', '.join(str(array.shape) for array in arrays)}. "
                f"Received: {one_line(error)}"
            ) from error


def _grid(details: dict[str, Any]) -> Grid | None:
    scale, zero_point = details["quantization"]
    return (scale, zero_point) if scale else None


def _describe(tensors: list[dict[str, Any]], signature: dict[str, dict[str, Any]]) -> tuple[TensorInfo, ...]:
    names: dict[int, list[str]] = {}  # one tensor may be returned under several names
    for name in sorted(signature):
        names.setdefault(signature[name]["index"], []).append(name)
    found = []
    for details in tensors:
        sizes = details["shape_signature"] if len(details["shape_signature"]) else details["shape"]
        left = names.get(details["index"])
        found.append(
            TensorInfo(
                name=left.pop(0) if left else details["name"],
                shape=tuple(None if size < 0 else int(size) for size in sizes),
                dtype=np.dtype(details["dtype"]).name,
            )
        )
    return tuple(found)
