"""What child processes do to a file: open it, predict with it, invent inputs for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.data.split import Arrays, Split
from compress.deploy.runtimes import Runtime, detect_format, open_runtime, predict
from compress.errors import DataError
from compress.measure.inputs import read_inputs, write_inputs

_FREE_AXIS = 16


def open_file(path: str | Path, threads: int = 1, allow_imports: Sequence[str] = (), device: str = "cpu") -> Runtime:
    """Open a model file; a `.keras` file is checked first, and may name classes of `allow_imports`.

    Raises:
        ModelError: the file is missing, corrupt or unsafe.
        SetupError: its runtime cannot use the device.
    """
    if detect_format(Path(path)) != "keras":
        return open_runtime(path, threads=threads, device=device)
    from compress.models.opening import trust_packages  # Keras, which the other formats do without

    with trust_packages(tuple(allow_imports)):
        return open_runtime(path, threads=threads, device=device)


def predict_files(
    files: dict[str, str], inputs: str, batch_size: int, allow_imports: Sequence[str]
) -> dict[str, list[str]]:
    """Write the outputs of each file for all samples, and return their names by file.

    Args:
        files: model file -> `.npz` file for its outputs.
        inputs: folder of the samples.
        batch_size: samples per call.
        allow_imports: packages whose classes a `.keras` file may name.
    """
    names = {}
    for path, outputs in files.items():
        runtime = open_file(path, allow_imports=allow_imports)
        np.savez(outputs, *predict(runtime, Split("samples", x=read_inputs(inputs)), batch_size))
        names[path] = [info.name for info in runtime.outputs]
    return names


def read_outputs(path: str | Path) -> list[np.ndarray]:
    """Return the arrays that `predict_files` wrote, in the order of the file's outputs."""
    with np.load(path, allow_pickle=False) as archive:
        return [archive[f"arr_{index}"] for index in range(len(archive.files))]


def write_random_inputs(path: str, folder: str, samples: int, seed: int, allow_imports: Sequence[str]) -> list[str]:
    """Write random inputs that fit `path`, and return a sentence for each size that had to be chosen."""
    runtime = open_file(path, allow_imports=allow_imports)
    write_inputs(folder, random_inputs(runtime, samples, np.random.default_rng(seed)))
    return [
        f"input {info.name!r} of {Path(path).name} takes any size: random inputs have {_FREE_AXIS}"
        for info in runtime.inputs
        if None in info.shape[1:]
    ]


def random_inputs(runtime: Runtime, samples: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return random arrays `(samples, ...)` for the inputs of an opened file; a free axis has 16 places."""
    shapes = [(samples, *(_FREE_AXIS if size is None else size for size in info.shape[1:])) for info in runtime.inputs]
    return [random_array(rng, shape, info.dtype, info.name) for info, shape in zip(runtime.inputs, shapes, strict=True)]


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, name: str) -> Arrays:
    """Return numbers in [0, 1); integers are 0 or 1, which are valid indices of any table."""
    if dtype == "string":
        raise DataError(f"input {name!r} takes text, which cannot be invented.", "Give data.")
    kind = np.dtype(dtype)
    return rng.random(shape).astype(kind) if kind.kind == "f" else rng.integers(0, 2, shape).astype(kind)
