"""What a comparison of two model files found, as data: `Comparison` and its parts, with a JSON Schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compress.measure.results import Count, Metric, Record, SplitSummary, Tool
from compress.measure.tables import MISSING, format_percent


class ComparedFile(Record):
    """One of the two files."""

    file: str
    format: Literal["tflite", "onnx", "keras"]
    sha256: str
    file_bytes: Count
    quantized: bool
    """Whether it holds integers as weights or activations, or simulates that."""


class LayerError(Record):
    """How far the output of one layer is from its counterpart."""

    layer: str
    """Path of the layer in a `.keras` file, name of the tensor in others."""
    kind: str
    """What computes it, such as `Conv2D` or `CONV_2D`."""
    counterpart: str | None
    """Its name in the second file, or `None` where the file has no such tensor."""
    shape: tuple[int, ...]
    """Of one batch."""
    mse: float | None
    sqnr_db: float | None
    """Signal-to-quantization-noise ratio: power of the first file's values over that of the differences."""
    cosine: float | None
    drop_db: float | None
    """How much `sqnr_db` is below the lowest of the layer's inputs."""
    reasons: dict[str, str] = Field(default_factory=dict)


class Parting(Record):
    """A layer at which the files part."""

    layer: str
    sqnr_db: float | None
    """`None` where no signal or no finite number is left."""
    drop_db: float
    suspects: list[str] = Field(default_factory=list)
    """Layers before it that have no counterpart and may be the cause."""


class ClassFlips(Record):
    """Flips of one class: the true one where there are labels, else the one that the first file says."""

    label: int
    decisions: Count
    flips: Count
    right_to_wrong: Count | None
    wrong_to_right: Count | None


class OutputComparison(Record):
    """What both files say through one output."""

    output: str
    kind: str
    """`classification`, `binary`, `multilabel` or `regression`."""
    metrics_a: dict[str, Metric]
    metrics_b: dict[str, Metric]
    """Those of the second file, with `agreement`, distances and drops against the first."""
    decisions: Count | None
    flips: Count | None
    """Decisions that differ; one that is not finite agrees with nothing."""
    right_to_wrong: Count | None
    wrong_to_right: Count | None
    by_class: list[ClassFlips]
    examples: list[int]
    """Numbers of the first samples that flip, from 0."""
    reasons: dict[str, str] = Field(default_factory=dict)


class Comparison(Record):
    """Two model files side by side, layer by layer and over a data set."""

    schema_: Literal["bmcompress/compare/v1"] = Field("bmcompress/compare/v1", alias="schema")
    tool: Tool
    a: ComparedFile
    b: ComparedFile
    data: SplitSummary | None
    layer_samples: Count
    """Samples that the errors of layers are measured on."""
    sqnr_threshold_db: float
    """Layers below it count as parted."""
    layers: list[LayerError]
    """In the order of execution of the first file."""
    first_parting: Parting | None
    """The first layer below the threshold."""
    largest_drop: Parting | None
    """The layer that loses most against its own inputs."""
    outputs: list[OutputComparison]
    notes: list[str]
    reasons: dict[str, str] = Field(default_factory=dict)

    def to_json(self) -> str:
        """Return the comparison as JSON text that matches the published schema."""
        return self.model_dump_json(by_alias=True, indent=2)

    def layer_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table with one row per layer of the first file."""
        header = ["layer", "type", "MSE", "SQNR dB", "drop dB", "cosine", "counterpart"]
        return header, [_layer_row(layer) for layer in self.layers]

    def output_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table with one row per output."""
        header = [
            "output",
            "kind",
            "agreement",
            "flips",
            "right to wrong",
            "wrong to right",
            "accuracy A",
            "accuracy B",
        ]
        return header, [_output_row(output) for output in self.outputs]

    def class_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table with one row per class that has flips, most flips first."""
        header = ["output", "class", "decisions", "flips", "right to wrong", "wrong to right"]
        found = [(output.output, each) for output in self.outputs for each in output.by_class if each.flips]
        found.sort(key=lambda pair: -pair[1].flips)
        counts = ("label", "decisions", "flips", "right_to_wrong", "wrong_to_right")
        return header, [[name, *(_count(getattr(each, key)) for key in counts)] for name, each in found]

    def sentences(self) -> list[str]:
        """Return the verdict in words."""
        lines = []
        if self.first_parting:
            suspects = self.first_parting.suspects
            before = f"; before it, {', '.join(suspects)} cannot be compared" if suspects else ""
            lines.append(f"first layer where they part: {_describe(self.first_parting)}{before}")
        elif any(layer.counterpart for layer in self.layers):
            lines.append(f"no layer is below {self.sqnr_threshold_db:g} dB")
        if self.largest_drop:
            lines.append(f"largest loss in one layer: {_describe(self.largest_drop)}")
        missing = sum(layer.counterpart is None for layer in self.layers)
        if missing:
            lines.append(f"{missing} of {len(self.layers)} layers have no counterpart: fused, folded or left out")
        for output in self.outputs:
            if output.examples:
                lines.append(f"{output.output}: samples that flip: {', '.join(map(str, output.examples))}")
        return lines


def _describe(parting: Parting) -> str:
    level = "no signal left" if parting.sqnr_db is None else f"{parting.sqnr_db:.1f} dB"
    return f"{parting.layer} ({level}, {parting.drop_db:.1f} dB below its inputs)"


def _layer_row(layer: LayerError) -> list[str]:
    if layer.counterpart is None:
        return [layer.layer, layer.kind, *[MISSING] * 4, f"({layer.reasons['counterpart']})"]
    sqnr = "equal" if layer.mse == 0 else MISSING if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
    mse = MISSING if layer.mse is None else f"{layer.mse:.2e}"
    drop = MISSING if layer.drop_db is None else f"{layer.drop_db:.1f}"
    cosine = MISSING if layer.cosine is None else f"{layer.cosine:.5f}"
    return [layer.layer, layer.kind, mse, sqnr, drop, cosine, layer.counterpart]


def _output_row(output: OutputComparison) -> list[str]:
    def share(metrics: dict[str, Metric], name: str) -> str:
        found: Any = metrics.get(name)
        return MISSING if found is None or found.value is None else format_percent(found.value)

    counts = [_count(n) for n in (output.flips, output.right_to_wrong, output.wrong_to_right)]
    accuracies = [share(output.metrics_a, "accuracy"), share(output.metrics_b, "accuracy")]
    return [output.output, output.kind, share(output.metrics_b, "agreement"), *counts, *accuracies]


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"
