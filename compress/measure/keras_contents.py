"""Weights and multiply-accumulates of a `.keras` file, in the terms that exported files are counted in."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.measure.weights import Contents, WeightCount
from compress.models.archive import read_archive
from compress.models.inspection import UNKNOWN, inspect_model


def read_keras(path: str | Path) -> Contents:
    """Return weights and MACs of one sample of the `.keras` file at `path`; distinct values are not counted.

    Raises:
        ModelError: the file is missing, damaged or no `.keras` file.
    """
    summary = inspect_model(path)
    if any(layer.class_name == UNKNOWN for layer in summary.layers):
        return Contents(_count_by_rank(path), summary.macs, {UNKNOWN})
    kernels = [kernel for layer in summary.layers for kernel in layer.kernels if len(kernel.shape) >= 2]
    weights = WeightCount(
        parameters=summary.parameters,
        nonzero_parameters=summary.nonzero,
        kernel_weights=sum(kernel.size for kernel in kernels),
        nonzero_kernel_weights=sum(kernel.size - kernel.zeros for kernel in kernels),
        distinct=None,
    )
    return Contents(weights, summary.macs, set(summary.macs_missing))


def _count_by_rank(path: str | Path) -> WeightCount:
    """Return the counts of a model whose layers the file does not name: every weight of rank 2 and up is a kernel."""
    groups = (("kernel_weights", 2), ("parameters", 0))
    counts = dict.fromkeys(("parameters", "nonzero_parameters", "kernel_weights", "nonzero_kernel_weights"), 0)
    with read_archive(path) as archive:
        for key, group in archive.weights.children.items():
            for weight in group.all_weights() if key != "optimizer" else ():
                nonzero = int(np.count_nonzero(weight.read()))
                for name, least_rank in groups:
                    if len(weight.shape) >= least_rank:
                        counts[name] += weight.size
                        counts[f"nonzero_{name}"] += nonzero
    return WeightCount(**counts, distinct=None)
