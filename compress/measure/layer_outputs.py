"""The tensors inside a model file, observed while it runs: what every format offers, whatever executes it.

A value that is stored quantized is observed as the real numbers that its integers stand for, since that is what
the next layer computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from compress.deploy.records import TensorInfo
from compress.deploy.runtimes import detect_format

INTEGERS = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
"""Types that activations are stored in when they are quantized."""


@dataclass(frozen=True)
class Observed:
    """One tensor that a file computes.

    Args:
        name: what a report calls it: the path of a layer in a `.keras` file, the name of the tensor in others.
        kind: what computes it, such as `"Conv2D"`, `"CONV_2D"` or `"Conv"`.
        labels: every name that the file gives it, the most telling one first.
        parents: positions of the observed tensors that it is computed from.
        is_output: whether the model returns it.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    parents: tuple[int, ...]
    is_output: bool


class LayerRuntime(Protocol):
    """A model file that is loaded and shows its inner tensors.

    Attributes:
        tensors: what `run` returns, in the order of execution.
        inputs: what `run` takes.
        batch: the only batch size that the file takes, or `None`.
        layers: paths of the layers, or nothing where the file does not know them.
        quantized: whether it holds integers as weights or activations, or simulates that.
        notes: sentences on what cannot be observed.
    """

    tensors: tuple[Observed, ...]
    inputs: tuple[TensorInfo, ...]
    batch: int | None
    layers: tuple[str, ...]
    quantized: bool
    notes: tuple[str, ...]

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return each observed tensor for one batch of real inputs, which integer inputs quantize."""
        ...


def open_layers(path: str | Path, folder: Path, allow_imports: Sequence[str] = ()) -> LayerRuntime:
    """Load a model file so that its inner tensors can be observed.

    Args:
        path: a `.keras`, `.tflite` or `.onnx` file.
        folder: a place for temporary files.
        allow_imports: packages whose classes a `.keras` file may name.

    Raises:
        ModelError: the file is missing, corrupt, unsafe or of no known format.
    """
    path = Path(path)
    file_format = detect_format(path)
    if file_format == "tflite":
        from compress.measure.tflite_layers import TfliteLayers

        return TfliteLayers(path)
    if file_format == "onnx":
        from compress.measure.onnx_layers import OnnxLayers

        return OnnxLayers(path, folder)
    from compress.measure.keras_layers import KerasLayers
    from compress.models.opening import trust_packages

    with trust_packages(tuple(allow_imports)):
        return KerasLayers(path)


class Lineage:
    """Collects observed tensors in the order of execution, with the nearest observed ancestors of each."""

    def __init__(self) -> None:
        self.tensors: list[Observed] = []
        self._nearest: dict[Hashable, tuple[int, ...]] = {}

    def add(self, key: Hashable, inputs: Iterable[Hashable], make: Callable[[tuple[int, ...]], Observed]) -> None:
        """Observe the tensor `key`; `make` gets the positions of its parents."""
        self.tensors.append(make(self._ancestors(inputs)))
        self._nearest[key] = (len(self.tensors) - 1,)

    def skip(self, key: Hashable, inputs: Iterable[Hashable]) -> None:
        """Let the tensor `key`, which is not observed, stand for its own ancestors."""
        self._nearest[key] = self._ancestors(inputs)

    def __contains__(self, key: Hashable) -> bool:
        """Return whether `key` is observed or descends from a tensor that is."""
        return bool(self._nearest.get(key))

    def _ancestors(self, inputs: Iterable[Hashable]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(position for key in inputs for position in self._nearest.get(key, ())))
