"""Weights and multiply-accumulates of a `.keras` file, in the terms that exported files are counted in."""

from __future__ import annotations

from pathlib import Path

from compress.measure.weights import Contents, WeightCount
from compress.models.inspection import inspect_model


def read_keras(path: str | Path) -> Contents:
    """Return weights and MACs of one sample of the `.keras` file at `path`; distinct values are not counted.

    Raises:
        ModelError: the file is missing, damaged or no `.keras` file.
    """
    summary = inspect_model(path)
    kernels = [kernel for layer in summary.layers for kernel in layer.kernels if len(kernel.shape) >= 2]
    weights = WeightCount(
        parameters=summary.parameters,
        nonzero_parameters=summary.nonzero,
        kernel_weights=sum(kernel.size for kernel in kernels),
        nonzero_kernel_weights=sum(kernel.size - kernel.zeros for kernel in kernels),
        distinct=None,
    )
    return Contents(weights, summary.macs, set(summary.macs_missing))
