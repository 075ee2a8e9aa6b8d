"""What is known about an exported file: how it was made and how close its outputs are to the model's."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Format = Literal["tflite", "onnx"]
"""A file format that models are exported to."""


Io = Literal["float32", "int8", "uint8"]
"""Type of the inputs and outputs of a file that computes in integers."""

WeightType = Literal["uint8", "int8"]
"""How an ONNX file holds 8-bit weights."""


Sparse = Literal["never", "auto"]
"""Whether a TFLite file leaves out zeros of weights where that makes it smaller."""


class TensorInfo(BaseModel):
    """An input or output of a model file."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int | None, ...]
    """Each dimension, `None` where any size is taken; the first is the batch."""
    dtype: str
    """Name of the NumPy dtype, such as `"float32"`."""


class ExportRecord(BaseModel):
    """An exported file that was run in its runtime and found to agree with the Keras model."""

    model_config = ConfigDict(frozen=True)

    format: Format
    path: str
    """Name of the file, without its folder."""
    sha256: str
    size_bytes: int
    opset: int | None = None
    """ONNX operator set; `None` for TFLite."""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    batch: Literal["dynamic"] | int
    """Batch sizes that the file takes: any, or only this one."""
    samples: int
    """Number of samples that the file was run on."""
    samples_from: Literal["data", "synthetic"]
    """Whether they were the caller's data or drawn at random."""
    max_abs_diff: float
    """Largest absolute difference to the outputs of Keras."""
    max_rel_diff: float
    """The same as a fraction of the range (largest minus smallest value) of its output."""
    agreement: float | None
    """Fraction of samples with the same largest class; `None` when no output has classes."""
    tolerance: float | None
    """Largest difference that was allowed, as a fraction of max(1, largest absolute output); `None` where outputs are
    integers, which may differ by one step on average."""
    mean_steps: float | None = None
    """Mean difference to Keras in steps of the integers behind an output, the largest of all outputs that have them."""
    runtime: str
    """`"tflite"` or `"onnx"`."""
    runtime_version: str
    notes: tuple[str, ...] = ()
    """Sentences that the user should read."""
