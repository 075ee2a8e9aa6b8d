"""Quantized weights as files are to hold them: the hand-over from the Keras model to the file formats. NumPy only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Compute = Literal["integer", "dynamic", "weights"]
"""How a file computes: in integers, with activations quantized at run time, or in float from stored weights."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """One weight of a layer, as a file is to hold it.

    Args:
        path: path of the variable in the model, such as `"encoder/conv1/kernel"`.
        layer: name of the layer in the exported graph.
        values: integers (int8) of the shape of the Keras variable; the cast floats where `dtype` is a float type.
        scale: float32 that broadcasts against `values`; with groups, the grouped axis has `size / group_size` entries.
            `None` for float types.
        bits: 2 to 8 for integers, 16 for float types.
        dtype: `"int"`, `"float16"` or `"bfloat16"`; bfloat16 values are float32 that bfloat16 holds exactly.
        group_size: weights that share a scale along `axis`, or `None` where scales are per channel or per tensor.
        axis: the grouped axis of `values`, or `None`.
    """

    path: str
    layer: str
    values: np.ndarray
    scale: np.ndarray | None
    bits: int = 8
    dtype: Literal["int", "float16", "bfloat16"] = "int"
    group_size: int | None = None
    axis: int | None = None

    def dequantize(self) -> np.ndarray:
        """Return the weight as float32; the deployed Keras model holds exactly this."""
        if self.scale is None:
            return self.values.astype("float32")
        scale = self.scale if self.group_size is None else self._spread()
        return self.values.astype("float32") * scale

    def _spread(self) -> np.ndarray:
        """Return the scales of groups, one for each weight along the grouped axis; the last group may be short."""
        return np.repeat(self.scale, self.group_size, axis=self.axis).take(
            range(self.values.shape[self.axis]), axis=self.axis
        )


def save_weights(path: str | Path, weights: Sequence[StoredWeight]) -> None:
    """Write weights to one `.npz` file, without pickle."""
    arrays: dict[str, np.ndarray] = {}
    facts = []
    for i, weight in enumerate(weights):
        arrays[f"values_{i}"] = weight.values
        if weight.scale is not None:
            arrays[f"scale_{i}"] = weight.scale
        fields = {name: value for name, value in vars(weight).items() if name not in ("values", "scale")}
        facts.append(fields)
    np.savez(path, facts=np.array(json.dumps(facts)), **arrays)


def load_weights(path: str | Path) -> list[StoredWeight]:
    """Return what `save_weights` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        facts = json.loads(str(arrays["facts"]))
        return [
            StoredWeight(values=arrays[f"values_{i}"], scale=arrays.get(f"scale_{i}"), **fields)
            for i, fields in enumerate(facts)
        ]
