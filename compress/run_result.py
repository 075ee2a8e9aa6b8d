"""What a run leaves: its directory and its manifest, shown as a table in a terminal or a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.gate.verdicts import verdict_rows
from compress.manifest import Manifest
from compress.measure.tables import format_html
from compress.plan import FINAL_MODEL


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        directory: the run directory.
        manifest: what was done and measured.
    """

    directory: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The final `.keras` file."""
        return self.directory / FINAL_MODEL

    @property
    def artifacts(self) -> dict[str, Path]:
        """The exported files by format."""
        return {r.format: self.directory / r.path for r in self.manifest.exports if Path(r.path).stem == "model"}

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of the result table: one row per file."""
        return self.manifest.benchmark.rows()

    def verdict_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of the table of budgets."""
        return verdict_rows(self.manifest.verdicts)

    def summary(self) -> list[str]:
        """Return the sentences that end a run: what each pass did, and what to know about the numbers."""
        lines = []
        statistics, metrics = self.manifest.input_statistics, self.manifest.input_metrics
        for step in self.manifest.steps:
            changes = [
                f"{name} {metrics[name]:.4f} -> {value:.4f}" for name, value in step.metrics.items() if name in metrics
            ]
            before, after = statistics["sparsity"], step.statistics["sparsity"]
            if before != after:
                changes.append(f"sparsity {before:.2%} -> {after:.2%}")
            values = [each.get("distinct_weights") for each in (statistics, step.statistics)]
            if None not in values and values[0] != values[1]:
                changes.append(f"distinct weights {values[0]:,} -> {values[1]:,}")
            lines.append(f"{step.id}: {', '.join(changes) or 'no change'} ({step.seconds:.1f} s)")
            statistics, metrics = step.statistics, step.metrics
        if statistics.get("sparsity", 0) > 0.3:
            lines.append("zeros make the compressed file smaller; these runtimes do not run faster because of them")
        lines += [f"note: {warning}" for warning in self.manifest.benchmark.warnings]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest and the directory as plain values."""
        return {"directory": str(self.directory), **self.manifest.model_dump(mode="json", by_alias=True)}

    def _repr_html_(self) -> str:
        title = f"<p><b>{html.escape(self.manifest.name)}</b>: {html.escape(str(self.directory))}</p>"
        budgets = format_html(*self.verdict_rows(), []) if self.manifest.verdicts else ""
        return title + format_html(*self.rows(), self.summary()) + budgets
