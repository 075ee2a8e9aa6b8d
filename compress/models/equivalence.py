"""Whether a changed model computes what it should: compared with a reference on random inputs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from compress.errors import ModelError

_TOLERANCE, _HALF_TOLERANCE = 1e-4, 3e-2
_HALF = ("float16", "bfloat16")
_SAMPLES = 4
_OPEN_SIZE = 16


def check_equal(
    changed: keras.Model, reference: keras.Model, claim: str = "two models that must be equal are not"
) -> float:
    """Return the largest difference of the outputs, relative to the largest output, or raise ModelError.

    Args:
        changed: the new model.
        reference: what it should be equal to, within 1e-4, or 3e-2 where it computes in half precision.
        claim: what the new model then does not do, for the message.
    """
    inputs = _draw(reference)
    first, second = (_outputs(model, inputs) for model in (changed, reference))
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        scale = float(np.abs(other).max(initial=0)) or 1.0
        difference = float(np.abs(one - other).max(initial=0)) / scale
        worst = worst if difference <= worst else difference  # NaN is the worst
    allowed = _HALF_TOLERANCE if any(layer.compute_dtype in _HALF for layer in reference.layers) else _TOLERANCE
    if not worst <= allowed:
        raise ModelError(
            f"{claim}. Received: a difference of {worst:.3g}, allowed are {allowed:g}",
            "Leave out the layers with rules of your own, or report the model.",
        )
    return worst


def _outputs(model: keras.Model, inputs: Any) -> list[np.ndarray]:
    outputs = keras.tree.flatten(model(inputs, training=False))
    return [keras.ops.convert_to_numpy(each).astype("float64") for each in outputs]


def _draw(model: keras.Model) -> Any:
    """Return random inputs: normal floats, and integers 0 and 1, which every embedding has."""
    generator = np.random.default_rng(0)

    def draw(tensor: keras.KerasTensor) -> np.ndarray:
        batch = tensor.shape[0] or _SAMPLES
        shape = (batch, *(size or _OPEN_SIZE for size in tensor.shape[1:]))
        if "float" in tensor.dtype:
            return generator.standard_normal(shape, dtype="float32").astype(tensor.dtype)
        return generator.integers(0, 2, shape).astype(tensor.dtype)

    return keras.tree.map_structure(draw, model.input)
