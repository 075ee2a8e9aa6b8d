"""Runtimes that execute model files: LiteRT for `.tflite`, ONNX Runtime for `.onnx`, Keras for `.keras`.

All run under their default options, as users run them, on the CPU unless another device is asked for. Nothing here
imports TensorFlow unless a `.keras` file is opened, so start-up and memory of a file can be measured fairly.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress.data.split import Arrays, Split, flatten_arrays, map_arrays
from compress.deploy.formats import detect_format
from compress.deploy.records import TensorInfo
from compress.errors import DataError, SetupError

Grid = tuple[float, int]
"""The scale and the zero point of a quantized tensor: its integers `q` stand for `scale * (q - zero_point)`."""


class Runtime(Protocol):
    """A model file that is loaded and ready to run.

    Attributes:
        name: `"tflite"`, `"onnx"` or `"keras"`.
        version: version of the library that executes the file.
        inputs: what `run` takes, in order.
        outputs: what `run` returns, in order.
        batch: the only batch size that the file takes, or `None` when it takes any.
        threads: number of threads it computes with, or `None` when the library had been started with its own
            choice.
    """

    name: str
    version: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    batch: int | None
    threads: int | None

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return an array `(n, ...)` per output for an array `(n, ...)` per input, in the model's order."""
        ...


def open_runtime(path: str | Path, *, threads: int = 1, device: str = "cpu") -> Runtime:
    """Load a model file into the runtime of its format, told by its content and then by its suffix.

    Args:
        path: a `.tflite`, `.onnx` or `.keras` file.
        threads: number of threads that one inference uses.
        device: what executes it; see `compress.deploy.devices`.

    Raises:
        ModelError: the file is missing, empty, corrupt, unsafe, or of no format that is known.
        SetupError: the library that executes the format is not installed, or cannot use the device.
    """
    path = Path(path)
    file_format = detect_format(path)
    try:
        if file_format == "tflite":
            from compress.deploy.litert import LiteRtRuntime as runtime_class
        elif file_format == "onnx":
            from compress.deploy.onnx_runtime import OnnxRuntime as runtime_class
        else:
            from compress.deploy.keras_runtime import KerasRuntime as runtime_class
    except ImportError as error:
        raise SetupError(
            f"{path} needs a library that is not installed. Received: {error}",
            "Run `pip install bmcompress`.",
        ) from error
    return runtime_class(path, threads, device=device)


def put_on_grid(array: np.ndarray, dtype: str, grid: Grid | None) -> np.ndarray:
    """Return an array as the integers of a quantized input; integers of its own type are taken to be these.

    Args:
        array: real values, or integers of the type `dtype`.
        dtype: NumPy name of the input's type.
        grid: its scale and zero point, or `None` where it is not quantized.
    """
    array = np.asarray(array)
    if grid is None or np.dtype(dtype).kind not in "iu" or array.dtype == dtype or array.dtype.kind not in "biuf":
        return array
    limits = np.iinfo(dtype)
    steps = np.rint(array.astype("float32") / np.float32(grid[0])) + grid[1]
    return np.clip(np.nan_to_num(steps), limits.min, limits.max).astype(dtype)


def take_off_grid(array: np.ndarray, grid: Grid | None) -> np.ndarray:
    """Return the real values of a quantized output; one that is not quantized stays as it is."""
    if grid is None or array.dtype.kind not in "iu":
        return array
    return (array.astype("float32") - np.float32(grid[1])) * np.float32(grid[0])


def predict(runtime: Runtime, x: Arrays | Split, batch_size: int = 64) -> list[np.ndarray]:
    """Return the outputs of the file for all samples, one array `(samples, ...)` per output.

    Args:
        runtime: an opened file.
        x: a split, or arrays: one, a list in the order of the model's inputs, or a dict by input name.
        batch_size: samples per call; a stream keeps its own.

    Raises:
        DataError: the arrays do not fit the inputs of the file.
    """
    split = x if isinstance(x, Split) else Split("samples", x=map_arrays(np.asarray, x))
    names = [info.name for info in runtime.inputs]
    parts = [runtime.run(match_inputs(names, batch)) for batch, _ in split.batches(batch_size)]
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def match_inputs(names: list[str], x: Arrays) -> list[np.ndarray]:
    """Return the arrays in `x` in the order of the inputs `names`; a dict is matched by name.

    Raises:
        DataError: there are more or fewer arrays than inputs, or a dict lacks a name.
    """
    if isinstance(x, dict) and all(isinstance(value, np.ndarray) for value in x.values()):
        by_name = {plain_name(str(key)): value for key, value in x.items()}
        if missing := [name for name in names if name not in by_name]:
            raise DataError(
                f"the data has no input {missing[0]!r}. Received: {', '.join(map(str, x))}; expected {', '.join(names)}"
            )
        return [by_name[name] for name in names]
    arrays = flatten_arrays(x)
    if len(arrays) != len(names):
        raise DataError(f"the model takes {len(names)} inputs ({', '.join(names)}). Received: {len(arrays)} arrays")
    return arrays


def plain_name(name: str) -> str:
    """Return `name` with every character that a graph cannot carry replaced by `_`."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return name if re.match(r"[A-Za-z]", name) else f"t{name}"


class FileRuntime:
    """What all runtimes share: inputs are checked and cast, and a fixed batch is filled up and cut again."""

    name = ""
    version = ""

    def __init__(self, inputs: tuple[TensorInfo, ...], outputs: tuple[TensorInfo, ...], threads: int | None):
        self.inputs, self.outputs, self.threads = inputs, outputs, threads
        sizes = {info.shape[0] for info in inputs if info.shape}
        self.batch = max((size for size in sizes if size is not None), default=None)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        if len(inputs) != len(self.inputs):
            names = ", ".join(info.name for info in self.inputs)
            raise DataError(f"the model takes {len(self.inputs)} inputs ({names}). Received: {len(inputs)} arrays")
        arrays = [fit_array(array, info) for array, info in zip(inputs, self.inputs, strict=True)]
        if self.batch is None or len(arrays[0]) == self.batch:
            return self._invoke(arrays)
        count, chunks = len(arrays[0]), []
        for start in range(0, count, self.batch):
            rows = np.minimum(
                np.arange(start, start + self.batch), count - 1
            )  # the last sample fills up the last batch
            chunks.append(self._invoke([array[rows] for array in arrays]))
        return [np.concatenate(parts)[:count] for parts in zip(*chunks, strict=True)]

    def _invoke(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        raise NotImplementedError


def fit_array(array: Any, info: TensorInfo) -> np.ndarray:
    """Return `array` as the contiguous array that an input takes, without loss.

    Raises:
        DataError: its shape or dtype does not fit, or values would be lost.
    """
    array = np.asarray(array)
    inner = info.shape[1:]
    if inner[-1:] == (1,) and array.ndim == len(info.shape) - 1:  # such as images without a channel axis
        array = array[..., np.newaxis]
    fits = array.ndim == len(info.shape) and all(b in (None, a) for a, b in zip(array.shape[1:], inner, strict=True))
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in info.shape)
        raise DataError(f"input {info.name!r} takes arrays of shape ({expected}). Received: shape {array.shape}")
    if info.dtype == "string":
        return array.astype(object)
    wanted = np.dtype(info.dtype)
    if array.dtype != wanted and not _is_safe(array, wanted):
        raise DataError(f"input {info.name!r} takes {wanted} values. Received: {_describe(array)}")
    return np.ascontiguousarray(array, wanted)


def _is_safe(array: np.ndarray, wanted: np.dtype) -> bool:
    if np.can_cast(array.dtype, wanted, "safe"):
        return True
    if array.dtype.kind not in "biuf" or wanted.kind not in "iuf" or array.size == 0:
        return array.size == 0
    if wanted.kind == "f":
        return array.dtype.kind == "f" or np.abs(array.astype("float64")).max() <= 2 ** (np.finfo(wanted).nmant + 1)
    limits = np.iinfo(wanted)
    return array.dtype.kind != "f" and limits.min <= array.min() and array.max() <= limits.max


def _describe(array: np.ndarray) -> str:
    if array.size == 0 or array.dtype.kind not in "biuf":
        return str(array.dtype)
    return f"{array.dtype} from {array.min()} to {array.max()}"


def package_version(package: str) -> str:
    """Return the version of an installed package, or `"unknown"`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def one_line(error: BaseException) -> str:
    """Return what a library's error says as one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
