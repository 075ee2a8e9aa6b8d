"""What a profile found, as data: the time of each operator of a file, and the layer that it comes from."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

from pydantic import Field

from compress.measure.results import Count, Record
from compress.measure.tables import MISSING, format_ms, format_percent


class OperatorTime(Record):
    """The time that one operator takes."""

    index: Count
    """Its place in the order of execution."""
    type: str
    """Such as `"Conv"` or `"CONV_2D"`."""
    name: str
    """What the file or the runtime calls it."""
    layer: str | None
    """The Keras layer that it comes from, where its name tells."""
    time_ms: float | None
    """Mean over the runs."""
    share: float | None
    """Of the time of all operators."""
    provider: str | None = None
    """What executes it: an execution provider of ONNX Runtime."""
    reasons: dict[str, str] = Field(default_factory=dict)


class Profile(Record):
    """The operators of a file, in the order of execution."""

    schema_: Literal["bmcompress/profile/v1"] = Field("bmcompress/profile/v1", alias="schema")
    file: str
    format: Literal["tflite", "onnx"]
    runtime: str
    threads: Count
    batch: Count
    runs: Count
    method: str
    """How the operators were timed."""
    whole_ms: float
    """Median time of the whole file without profiling."""
    operators_ms: float
    """Sum over the operators."""
    operators: list[OperatorTime]

    def rows(self, by: Literal["operator", "layer", "type"] = "operator") -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table: each operator, or sums by layer or type, the longest first."""
        if by == "operator":
            header = ["#", "type", "layer", "ms", "share", "name"]
            return header, [
                [
                    str(each.index),
                    each.type,
                    each.layer or MISSING,
                    format_ms(each.time_ms),
                    MISSING if each.share is None else format_percent(each.share, 1),
                    each.reasons.get("time_ms", each.name),
                ]
                for each in self.operators
            ]
        sums: dict[str, list[OperatorTime]] = defaultdict(list)
        for each in self.operators:
            sums[each.type if by == "type" else each.layer or MISSING].append(each)
        timed = {key: [each.time_ms for each in own if each.time_ms is not None] for key, own in sums.items()}
        total = self.operators_ms or 1.0
        rows = []
        for key in sorted(sums, key=lambda key: (-sum(timed[key]), key)):
            time = sum(timed[key]) if timed[key] else None
            share = MISSING if time is None else format_percent(time / total, 1)
            rows.append([key, str(len(sums[key])), format_ms(time), share])
        return [by, "operators", "ms", "share"], rows

    def sentences(self) -> list[str]:
        """Return what stands below the table."""
        together = f"operators together {format_ms(self.operators_ms)} ms ({self.method})"
        lines = [f"{together}; the whole file {format_ms(self.whole_ms)} ms"]
        if missing := sorted({each.type for each in self.operators if each.time_ms is None}):
            lines.append(f"not timed: {', '.join(missing)}; see --by operator")
        return lines
