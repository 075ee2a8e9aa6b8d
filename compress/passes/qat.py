"""The pass `qat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.passes.base import Pass
from compress.passes.engines import EngineOption
from compress.passes.quantization import QuantizationOptions
from compress.passes.training import TeacherOption, resolve_teacher, train_copy
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data


class QuantizationAwareTraining(EngineOption, Training, QuantizationOptions, Pass):
    """Train on with the rounding of the exported file in the loop (Jacob et al. 2018, arXiv:1712.05877).

    The model is quantized and calibrated first, as `ptq` does. Zeros that earlier passes made stay zero.
    """

    type: Literal["qat"] = "qat"
    epochs: int = Field(default=3, ge=0, le=1_000_000)
    """Epochs of training."""
    learning_rate: float | None = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """The rate at the start: low, as the weights are nearly right."""
    ranges: Literal["moving", "frozen", "learned"] = "moving"
    """Ranges of activations follow the batches, stay as calibrated, or are learned with the scales of weights (LSQ,
    Esser et al. 2020, arXiv:1902.08153), which helps below 8 bits."""
    teacher: TeacherOption = None
    """A model that teaches meanwhile: a `.keras` file, or `input` for the model that the recipe starts from."""

    @classmethod
    def ours_alone(cls) -> tuple[str, ...]:
        """Return the names of options that tfmot has no counterpart for."""
        return ("scheme", "bits", "mixed", "granularity", "group_size", "observer", "equalise", "ranges", "teacher")

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a fake-quantized, trained twin of `model`; a fake-quantized one is trained on as it is."""
        from compress.quantization.deployment import is_fake_quantized, snap_biases

        if self.engine == "tfmot":
            from compress.legacy.engine import quantize_with_tfmot

            found = quantize_with_tfmot(model, data, self, include=self.include, exclude=self.exclude)
            return snap_biases(found)
        teacher = resolve_teacher(self.teacher, model)
        if not is_fake_quantized(model):
            quantized = self.build(model, data, ranges=self.ranges)
            self.calibrate(quantized, data)
            model = quantized
        return snap_biases(train_copy(model, data, self, teacher=teacher))

    def check(self, model: keras.Model) -> None:
        """Raise UsageError where tfmot is to do it and cannot."""
        super().check(model)
        self.check_engine(model)

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that training reads."""
        return ("train",)
