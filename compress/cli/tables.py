"""Rows of the tables that commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.deploy.records import ExportRecord
    from compress.models.inspection import ModelSummary

Rows = tuple[Sequence[str], list[list[str]]]


def export_rows(records: Sequence[ExportRecord]) -> Rows:
    """Return one row per exported and verified file."""
    header = ("file", "bytes", "batch", "opset", "largest difference", "same class", "checked on")
    rows = []
    for record in records:
        same = "-" if record.agreement is None else f"{record.agreement:.2%}"
        checked = f"{record.samples} {record.samples_from} samples, {record.runtime} {record.runtime_version}"
        opset = str(record.opset or "-")
        rows.append(
            [
                record.path,
                f"{record.size_bytes:,}",
                str(record.batch),
                opset,
                f"{record.max_abs_diff:.1e}",
                same,
                checked,
            ]
        )
    return header, rows


def inspection_rows(summary: ModelSummary) -> Rows:
    """Return one row per layer: what it is, what it holds, and what pruning would do with it."""
    header = ("layer", "type", "output", "dtype", "parameters", "zeros", "MACs", "prune", "distill")
    rows = []
    for layer in summary.layers:
        shape = (
            "?"
            if layer.output_shape is None
            else " x ".join("any" if n is None else str(n) for n in layer.output_shape)
        )
        zeros = "-" if layer.kernel_sparsity is None else f"{layer.kernel_sparsity:.1%}"
        macs = "?" if layer.macs is None else f"{layer.macs:,}"
        passes = [layer.passes.get(name, "-") for name in ("prune", "distill")]
        kind = layer.class_name if layer.calls == 1 else f"{layer.class_name} (used {layer.calls} times)"
        rows.append([layer.path, kind, shape, layer.dtype or "-", f"{layer.parameters:,}", zeros, macs, *passes])
    return header, rows


def inspection_totals(summary: ModelSummary) -> list[str]:
    """Return the sentences below the table of layers."""
    macs = f"{summary.macs:,} MACs per sample"
    if summary.macs_partial:
        macs += f" (without {', '.join(summary.macs_missing) or 'parts whose shape is not known'})"
    zeros = "" if summary.kernel_sparsity is None else f", {summary.kernel_sparsity:.2%} zeros in kernels"
    lines = [
        f"{summary.parameters:,} parameters, {summary.nonzero:,} not zero{zeros}",
        macs,
        f"{summary.size_bytes:,} bytes on disk, {summary.weight_bytes:,} of them weights; "
        f"saved by Keras {summary.keras_version}",
    ]
    for what, tensors in (("input", summary.inputs), ("output", summary.outputs)):
        lines += [f"{what} {t.name}: {t.shape} {t.dtype or ''}".rstrip() for t in tensors]
    if summary.loss:
        lines.append(f"compiled: loss {summary.loss}, metrics {summary.metrics}, optimizer {summary.optimizer}")
    if summary.custom_classes:
        lines.append(f"custom classes, which need --allow-import: {', '.join(summary.custom_classes)}")
    return lines
