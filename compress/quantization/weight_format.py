"""How one weight of a layer is stored: bits, which weights share a scale, and where the scale comes from.
Imports nothing, so that plans and files can speak of formats without a framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compress.errors import UsageError

ScaleSource = Literal["absmax", "stored", "learned"]


@dataclass(frozen=True)
class WeightFormat:
    """The format of one weight.

    Args:
        bits: 2 to 8 bits an integer; ignored for float types.
        channel_axes: axes of the variable that keep a scale of their own; empty means one scale per tensor.
        group_size: weights along `axis` that share a scale, or `None`; the last group may be shorter.
        axis: the grouped axis, or `None`.
        dtype: `"int"`, `"float16"` or `"bfloat16"`.
        scale: `"absmax"`: computed from the weights at every step; `"stored"`: a variable that stays as it is set,
            for methods that choose scale and rounding together; `"learned"`: a variable that is trained (LSQ).

    Raises:
        UsageError: a value outside of what is said above.
    """

    bits: int = 8
    channel_axes: tuple[int, ...] = ()
    group_size: int | None = None
    axis: int | None = None
    dtype: Literal["int", "float16", "bfloat16"] = "int"
    scale: ScaleSource = "absmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_axes", tuple(self.channel_axes))
        if self.dtype not in ("int", "float16", "bfloat16"):
            raise UsageError(f"expected dtype int, float16 or bfloat16. Received: dtype={self.dtype!r}")
        if self.scale not in ("absmax", "stored", "learned"):
            raise UsageError(f"expected scale absmax, stored or learned. Received: scale={self.scale!r}")
        if self.dtype == "int" and (type(self.bits) is not int or not 2 <= self.bits <= 8):
            raise UsageError(f"expected 2 to 8 bits for integer weights. Received: bits={self.bits!r}")
        if (self.group_size is None) != (self.axis is None):
            raise UsageError(
                f"expected group_size and axis together. Received: group_size={self.group_size}, axis={self.axis}"
            )
        if self.group_size is not None and (self.group_size < 1 or self.axis in self.channel_axes):
            raise UsageError(
                f"expected a positive group_size along an axis that is not a channel axis. "
                f"Received: group_size={self.group_size}, axis={self.axis}, channel_axes={self.channel_axes}"
            )

    @property
    def has_variable(self) -> bool:
        """Whether the scale is a variable of its own."""
        return self.dtype == "int" and self.scale != "absmax"

    def get_config(self) -> dict[str, Any]:
        """Return the format as plain values, for JSON."""
        return {**asdict(self), "channel_axes": list(self.channel_axes)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WeightFormat:
        """Return the format that `get_config` described."""
        return cls(**config)
