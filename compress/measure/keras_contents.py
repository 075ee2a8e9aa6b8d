"""Weights and multiply-accumulates of a `.keras` file, in the terms that exported files are counted in."""

from __future__ import annotations

from pathlib import Path

from compress.measure.weights import Contents, WeightCount
from compress.models.archive import read_archive
from compress.models.inspection import UNKNOWN, inspect_model
from compress.models.kernel_counts import KernelCount


def read_keras(path: str | Path) -> Contents:
    """Return weights and MACs of one sample of the `.keras` file at `path`.

    Raises:
        ModelError: the file is missing, damaged or no `.keras` file.
    """
    summary = inspect_model(path)
    if any(layer.class_name == UNKNOWN for layer in summary.layers):
        return Contents(_count_by_rank(path), summary.macs, {UNKNOWN})
    kernels = [
        KernelCount(kernel.path, kernel.shape, kernel.zeros, kernel.distinct, kernel.distinct_in_channel, kernel.bits)
        for layer in summary.layers
        for kernel in layer.kernels
        if len(kernel.shape) >= 2
    ]
    return Contents(WeightCount(summary.parameters, summary.nonzero, kernels), summary.macs, set(summary.macs_missing))


def _count_by_rank(path: str | Path) -> WeightCount:
    """Return the counts of a model whose layers the file does not name: every weight of rank 2 and up is a kernel."""
    counts = WeightCount()
    with read_archive(path) as archive:
        for key, group in archive.weights.children.items():
            for weight in group.all_weights() if key != "optimizer" else ():
                counts.add(weight.read(), name=weight.path)
    return counts
