"""Which numbers of a run become curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def pass_curves(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the quality after a pass; the number of the pass is the step, and 0 the input."""
    return {f"passes/{name}": value for name, value in metrics.items()}


def file_curves(result: Any) -> dict[str, float | None]:
    """Return the numbers of a measured file (a `compress.measure.results.FileResult`), which have no history."""
    numbers: dict[str, float | None] = {
        "file_bytes": result.size.file_bytes,
        "gzip_bytes": result.size.gzip_bytes,
        "p50_ms": result.latency[0].p50_ms if result.latency else None,
        **{name: metric.value for name, metric in (result.quality or {}).items()},
    }
    return {f"files/{Path(result.file).name}/{name}": number for name, number in numbers.items()}
