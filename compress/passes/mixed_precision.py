"""The options with which a pass that quantizes gives each layer a number of bits of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from compress.options import Options, Share, parse_bytes, parse_fraction

if TYPE_CHECKING:
    import keras

    from compress.data.split import Split

Bits = Annotated[int, Field(ge=2, le=8)]


def _parse_size(value: Any) -> Any:
    if isinstance(value, str):
        return parse_fraction(value) if value.strip().endswith("%") else parse_bytes(value)
    return value


class MixedPrecision(Options):
    """Bits of weights layer by layer under a budget: the fewest where the model's outputs suffer least.

    Give one budget.
    """

    size: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False), BeforeValidator(_parse_size, json_schema_input_type=float | str)
    ] = None
    """The most that quantized weights and their scales may take: a share of what they take with 8 bits, such as `60%`,
    or bytes, such as `40 KiB`. Numbers up to 1 are shares."""
    bit_operations: Annotated[Share, Field(gt=0)] | None = None
    """The most bit operations (multiply-accumulates times bits of weight and activation), as a share of those with
    8-bit weights."""
    max_loss: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """The most that the layers' losses may add up to, for the smallest model: nats of Kullback-Leibler divergence where
    outputs are probabilities, else squared error in units of the output's variance."""
    bits: tuple[Bits, ...] = Field(default=(2, 3, 4, 5, 6, 8), min_length=1)
    """The widths to choose from."""
    method: Literal["ilp", "greedy"] = "ilp"
    """How widths are chosen: exactly, by integer programming, or step by step."""
    samples: int = Field(default=256, ge=1)
    """Training samples, without their labels, on which outputs are compared."""

    @model_validator(mode="after")
    def _one_budget(self) -> MixedPrecision:
        given = [name for name in ("size", "bit_operations", "max_loss") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected one of size, bit_operations and max_loss. Received: {', '.join(given) or 'none'}"
            )
        return self

    def assign(self, model: keras.Model, split: Split, **options: Any) -> dict[str, int]:
        """Return `{pattern for one layer: bits}` for a float model.

        Args:
            model: the float model; it is not changed.
            split: samples.
            options: how weights are quantized, as for `measure_widths`.
        """
        from glob import escape

        from compress.quantization.mixed_precision import assign_bit_widths

        chosen = assign_bit_widths(
            model,
            split,
            size=self.size,
            bit_operations=self.bit_operations,
            max_loss=self.max_loss,
            bits=self.bits,
            method=self.method,
            samples=self.samples,
            **options,
        )
        # A pattern for a block stands for all in it, and the last one counts: outer ones come first.
        return {escape(path): chosen[path] for path in sorted(chosen, key=lambda path: path.count("/"))}
