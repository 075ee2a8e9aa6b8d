"""What the passes that quantize have in common: options, and the steps from a float model to calibrated ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from compress.options import Options
from compress.passes.mixed_precision import Bits, MixedPrecision

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data, Split


class QuantizationOptions(Options):
    """How a model is quantized."""

    scheme: Literal["int8", "int16x8", "int8_dynamic", "int8_weights", "int4_weights", "float16", "bfloat16"] = "int8"
    """What is quantized: weights and activations (`int8`, `int16x8`), weights, with activations quantized while the
    file runs (`int8_dynamic`), or weights alone."""
    bits: Bits | dict[str, Bits] | None = None
    """Bits of integer weights, for all layers or by pattern over layer paths; by default what the scheme says."""
    mixed: MixedPrecision | None = None
    """Bits of each layer's weights under a budget for the model, instead of `bits`."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over layer paths; only these layers are quantized."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over layer paths; these layers stay float."""
    granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    """Whether each output channel of a weight has a scale of its own."""
    group_size: int | None = Field(default=None, ge=1)
    """Weights along the input axis of dense layers that share a scale; only for schemes that store weights alone."""
    observer: Literal["min-max", "moving", "percentile", "entropy", "mse"] = "mse"
    """How the range of an activation comes from what calibration shows."""
    samples: int = Field(default=512, ge=1)
    """Training samples, without their labels, that calibration reads."""
    equalise: bool = False
    """Balance the channels of neighbouring layers first (Nagel et al. 2019, arXiv:1906.04721)."""

    on_fail: Literal["restore", "stop", "revert", "warn"] = "restore"
    """What happens when `max_drop` is broken: layers go back to float, the most sensitive first, until it holds on the
    exported files; or as for other passes."""

    @model_validator(mode="after")
    def _bits_once(self) -> Self:
        if self.mixed and self.bits is not None:
            raise ValueError(f"expected bits or mixed, not both. Received: bits={self.bits}, mixed={self.mixed}")
        if self.mixed and self.scheme in ("float16", "bfloat16"):
            raise ValueError(f"expected a scheme with integer weights for mixed. Received: scheme={self.scheme}")
        return self

    @property
    def needs_samples(self) -> bool:
        """Whether data is needed: activations have ranges, or layers get bits by what the outputs suffer."""
        return self.scheme in ("int8", "int16x8") or self.mixed is not None

    def build(
        self, model: keras.Model, data: Data, *, ranges: Literal["moving", "frozen", "learned"] = "frozen"
    ) -> keras.Model:
        """Return the fake-quantized twin of `model`, not calibrated, compiled as `model` is."""
        from compress.models.copying import copy_compile_settings
        from compress.quantization.fake_quantization import fake_quantize

        options = {
            "scheme": self.scheme,
            "include": self.include,
            "exclude": self.exclude,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "equalised": self.equalise,
        }
        bits = self.mixed.assign(model, calibration_split(data), **options) if self.mixed else self.bits
        quantized = fake_quantize(model, bits=bits, ranges=ranges, **options)
        copy_compile_settings(model, quantized)
        return quantized

    def calibrate(self, quantized: keras.Model, data: Data) -> None:
        """Set the ranges of a fake-quantized model from training samples."""
        from compress.quantization.calibration import calibrate

        if self.needs_samples:
            calibrate(quantized, calibration_split(data), samples=self.samples, observer=self.observer)

    def without(self, paths: tuple[str, ...], quantized: keras.Model, source: keras.Model, data: Data) -> keras.Model:
        """Return `quantized`, which this pass made of `source`, with the layers `paths` in float again."""
        from compress.quantization.deployment import snap_biases
        from compress.quantization.restoration import restore_layers

        return snap_biases(restore_layers(quantized, paths))

    def sensitive_layers(self, quantized: keras.Model, data: Data) -> list[str]:
        """Return the paths of the quantized layers of a model that this pass made, most sensitive first."""
        from compress.quantization.model_sensitivity import order_by_sensitivity

        return order_by_sensitivity(quantized, calibration_split(data), samples=min(self.samples, 256))


def calibration_split(data: Data) -> Split:
    """Return the samples to calibrate on: those of training, or unlabelled ones where there are no others."""
    return data.train or data.unlabelled or data.require("train", "calibration")
