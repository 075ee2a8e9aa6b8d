"""What is quantized to how many bits: the schemes that users name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from compress.errors import UsageError
from compress.quantization.stored import Compute

SchemeName = Literal["int8", "int16x8", "int8_dynamic", "int8_weights", "int4_weights", "float16", "bfloat16"]
"""A scheme by name: see `SCHEMES`."""


@dataclass(frozen=True)
class Scheme:
    """How numbers are stored and computed.

    Args:
        compute: in integers, with activations quantized at run time, or in float from stored weights.
        weight_bits: bits of a weight, unless a layer is given others.
        activation_bits: bits of an activation, or `None` where they stay float.
        dtype: what weights are stored as.
        group_size: weights along the input axis that share a scale, or `None` for one scale per channel.
    """

    compute: Compute
    weight_bits: int = 8
    activation_bits: int | None = None
    dtype: Literal["int", "float16", "bfloat16"] = "int"
    group_size: int | None = None


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme("integer", activation_bits=8),
    "int16x8": Scheme("integer", activation_bits=16),
    "int8_dynamic": Scheme("dynamic"),
    "int8_weights": Scheme("weights"),
    "int4_weights": Scheme("weights", weight_bits=4, group_size=32),
    "float16": Scheme("weights", weight_bits=16, dtype="float16"),
    "bfloat16": Scheme("weights", weight_bits=16, dtype="bfloat16"),
}


def find_scheme(name: str) -> Scheme:
    """Return the scheme `name`, or raise UsageError with the known ones."""
    if name not in SCHEMES:
        raise UsageError(f"expected a scheme out of {', '.join(get_args(SchemeName))}. Received: scheme={name!r}")
    return SCHEMES[name]
