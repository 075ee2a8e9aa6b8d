"""The pass `ptq`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from compress.passes.base import Pass
from compress.passes.quantization import QuantizationOptions, calibration_split

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data
    from compress.quantization.refinement import RoundedLayer

_STEPS = 500


class PostTrainingQuantization(QuantizationOptions, Pass):
    """Quantize a trained model with a few hundred samples and no training (Krishnamoorthi 2018, arXiv:1806.08342)."""

    type: Literal["ptq"] = "ptq"
    rounding: Literal["nearest", "adaround", "gptq"] = "nearest"
    """How weights are rounded: to `nearest`; learned from samples layer by layer (`adaround`, Nagel et al. 2020,
    arXiv:2004.10568), the slowest and best for few bits; or so that weights of dense and convolution layers make up
    for each other's errors (`gptq`, Frantar et al. 2022, arXiv:2210.17323)."""
    rounding_steps: int = Field(default=_STEPS, ge=1)
    """Training steps for each layer with `rounding: adaround`."""
    correct_biases: bool | None = None
    """Take the mean error of each layer's outputs out of its bias (Nagel et al. 2019, arXiv:1906.04721); by default
    where samples are read anyway, but not after `adaround`, which has fitted the outputs behind each activation."""
    activation_aware: bool = False
    """Make the grid finer for weights that meet large activations (AWQ, Lin et al. 2023, arXiv:2306.00978); only for
    `int8_weights` and `int4_weights`."""

    @model_validator(mode="after")
    def _check_combination(self) -> PostTrainingQuantization:
        if self.scheme in ("float16", "bfloat16") and (self.rounding != "nearest" or self.correct_biases):
            raise ValueError(
                f"rounding and correct_biases need a scheme with integer weights. Received: scheme={self.scheme}"
            )
        if self.activation_aware and self.scheme not in ("int8_weights", "int4_weights"):
            raise ValueError(
                f"activation_aware needs the scheme int8_weights or int4_weights. Received: scheme={self.scheme}"
            )
        if self.rounding_steps != _STEPS and self.rounding != "adaround":
            raise ValueError(f"rounding_steps needs rounding: adaround. Received: rounding={self.rounding}")
        return self

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a fake-quantized, calibrated twin of `model`."""
        from compress.quantization.correction import correct_biases
        from compress.quantization.deployment import snap_biases
        from compress.quantization.restoration import quantized_layers, restore_layers
        from compress.quantization.stepwise import take_samples

        quantized = self.build(model, data)
        self._require_layers(quantized)
        self.calibrate(quantized, data)
        corrects = self._corrects_biases(quantized)
        reference = restore_layers(quantized, quantized_layers(quantized)) if corrects else None
        self._round(quantized, data)
        if reference is not None:
            correct_biases(reference, quantized, take_samples(calibration_split(data), self.samples))
        return snap_biases(quantized)

    def without(self, paths: tuple[str, ...], quantized: keras.Model, source: keras.Model, data: Data) -> keras.Model:
        """Return `source` quantized anew without the layers `paths`: biases make up for what is quantized."""
        from compress.quantization.restoration import quantized_layers, restore_layers

        if set(paths) == set(quantized_layers(quantized)):
            return restore_layers(self.build(source, data), paths)
        exact = tuple(re.sub(r"([*?[])", r"[\1]", path) for path in paths)  # paths are patterns that fit themselves
        return self.model_copy(update={"exclude": (*self.exclude, *exact)}).apply(source, data)

    def notes(self, model: keras.Model) -> list[str]:
        """Return which layers `rounding` and `activation_aware` left out, and why."""
        from compress.errors import UsageError

        notes = []
        for method, plan in self._plans():
            try:
                *_, skipped = plan(model)
            except UsageError:  # `max_drop` took all layers that it could change back to float
                continue
            if skipped:
                listed = "; ".join(f"{each.path} {each.reason}" for each in skipped)
                notes.append(f"{method} left layers as rounding to nearest makes them: {listed}")
        return notes

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that calibration and rounding read."""
        return ("train",) if self._reads_samples else ()

    @property
    def _reads_samples(self) -> bool:
        return bool(self.needs_samples or self.rounding != "nearest" or self.correct_biases or self.activation_aware)

    def _require_layers(self, quantized: keras.Model) -> None:
        """Raise UsageError, before any work is done, if an option has no layer that it could change."""
        for _, plan in self._plans():
            plan(quantized)

    def _plans(self) -> list[tuple[str, Callable[[keras.Model], tuple]]]:
        """Return the name of each method that was asked for, with what says which layers it can change."""
        from compress.quantization.model_awq import plan_awq
        from compress.quantization.model_gptq import plan_gptq
        from compress.quantization.model_rounding import plan_adaround

        plans = {"adaround": [("AdaRound", plan_adaround)], "gptq": [("GPTQ", plan_gptq)]}.get(self.rounding, [])
        return [*plans, ("AWQ", plan_awq)] if self.activation_aware else plans

    def _corrects_biases(self, quantized: keras.Model) -> bool:
        from compress.quantization.correction import has_biases

        if self.correct_biases is not None:
            return self.correct_biases
        return self._reads_samples and self.rounding != "adaround" and has_biases(quantized)

    def _round(self, quantized: keras.Model, data: Data) -> None:
        """Put the weights on their grid in the way that was asked for; with few bits on one with searched scales."""
        from compress.quantization.model_awq import apply_awq
        from compress.quantization.model_gptq import apply_gptq
        from compress.quantization.model_rounding import learn_roundings
        from compress.quantization.scale_search import search_scales

        rounded: list[RoundedLayer] = []
        if self.activation_aware:
            apply_awq(quantized, calibration_split(data), samples=self.samples)
        if self.rounding == "adaround":
            split = calibration_split(data)
            rounded, _ = learn_roundings(quantized, split, samples=self.samples, steps=self.rounding_steps)
        if self.rounding == "gptq":
            rounded, _ = apply_gptq(quantized, calibration_split(data), samples=self.samples)
        search_scales(quantized, exclude=[each.path for each in rounded])
