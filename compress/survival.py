"""What pruning and clustering made must survive what follows: counted kernel by kernel in models and in their files.

A kernel keeps its path from pass to pass; where an export or a quantization has renamed or reshaped it, kernels of the
same size are compared as a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from compress.errors import ExportError, PassError
from compress.measure.results import FileSize
from compress.models.clusters import find_clusters, merge_values
from compress.models.kernel_counts import KernelCount, count_kernel
from compress.models.kernel_layout import find_layouts
from compress.models.walking import list_kernels
from compress.quantization.clustered import cluster_unit
from compress.quantization.layers import QuantizedLayer


@dataclass(frozen=True)
class KernelStructure:
    """What one kernel of a model holds.

    Args:
        count: its zeros and distinct values; of its integers where it is quantized.
        clusters: the most distinct values that a row of its clusters has, or `None` where it is not clustered.
        is_quantized: whether batch norm may be folded into it, so that each channel has a factor of its own.
    """

    count: KernelCount
    clusters: int | None
    is_quantized: bool = False

    @property
    def is_structured(self) -> bool:
        """Whether it has zeros or clusters to lose."""
        return self.is_pruned or self.clusters is not None

    @property
    def is_pruned(self) -> bool:
        """Whether it has zeros to lose; a kernel of zeros alone is new, not pruned."""
        return 0 < self.count.zeros < self.count.size


def read_structure(model: keras.Model) -> list[KernelStructure]:
    """Return what each kernel of a model holds."""
    quantized = {
        id(layer.weight_variable(name)): (stored, cluster_unit(layer, name))
        for layer in model.layers
        if isinstance(layer, QuantizedLayer)
        for name, stored in zip(layer.formats, layer.stored_weights(), strict=True)
    }
    kernels = list_kernels(model)
    layouts = find_layouts(model, [kernel.variable for kernel in kernels])
    found = []
    for kernel, layout in zip(kernels, layouts, strict=True):
        values = keras.ops.convert_to_numpy(keras.ops.cast(kernel.variable, "float32"))
        stored, unit = quantized.get(id(kernel.variable), (None, None))
        held, path = (values, kernel.path) if stored is None else (stored.values, stored.path)
        count = count_kernel(path, held, channel_axes=layout.outputs)
        clusters = find_clusters(values if unit is None else merge_values(values / unit), layout.outputs)
        most = None if clusters is None else max(len(np.unique(row)) for row in clusters.centroids)
        found.append(KernelStructure(count, most, stored is not None))
    return found


def require_kept(before: Sequence[KernelStructure], after: Sequence[KernelStructure], step: str) -> None:
    """Raise PassError, naming the kernel and the numbers, if a kernel has lost zeros or clusters in a pass.

    Args:
        before, after: the model before and after the pass.
        step: name of the pass, for the message.
    """
    by_path = {each.count.name: each for each in after}
    pairs, lonely = [], []
    for each in before:
        other = by_path.get(each.count.name)
        if other is not None and other.count.size == each.count.size:
            pairs.append((each, other))
        else:
            lonely.append(each)
    known = {id(other) for _, other in pairs}
    losses = [loss for each, other in pairs for loss in _losses(each, other.count, strict=not other.is_quantized)]
    losses += _losses_by_size(lonely, [each.count for each in after if id(each) not in known])
    if losses:
        raise PassError(
            f"expected {step} to keep the zeros and clusters of the passes before it. Received: {_list(losses)}",
            f"Run {step} before `prune` and `cluster`.",
        )


def require_in_file(structure: Sequence[KernelStructure], size: FileSize, file: str) -> None:
    """Raise ExportError, naming the kernel and the numbers, if a file has lost zeros or clusters of its model.

    Args:
        structure: the model.
        size: what was measured of the file.
        file: its name, for the message.
    """
    counts = [KernelCount(k.name, k.shape, k.zeros, k.distinct, k.distinct_in_channel, k.bits) for k in size.kernels]
    losses = list(_losses_by_size(structure, counts))
    if losses:
        raise ExportError(
            f"expected {file} to keep the zeros and clusters of its model. Received: {_list(losses)}",
            "Please report this with the model: exports must not change weights.",
        )


def describe_survival(structure: Sequence[KernelStructure], size: FileSize, file: str) -> str:
    """Return a sentence on the zeros and distinct values of a file beside those of its model."""
    if not size.kernels:
        return f"{file}: zeros and distinct values are not known: {size.reasons.get('sparsity', 'no kernels')}"
    zeros, weights = sum(each.count.zeros for each in structure), sum(each.count.size for each in structure)
    parts = [
        f"{sum(each.zeros for each in size.kernels):,} zeros in its kernels, {zeros:,} of {weights:,} in the model"
    ]
    if any(each.clusters is not None for each in structure):
        most = max(each.distinct for each in size.kernels)
        in_channel = max(each.distinct_in_channel for each in size.kernels)
        parts.append(f"at most {most:,} distinct values in a kernel, {in_channel:,} in one of its channels")
    return f"{file}: {'; '.join(parts)}"


def _losses(kernel: KernelStructure, after: KernelCount, strict: bool) -> Iterator[str]:
    count = kernel.count
    if kernel.is_pruned and after.zeros < count.zeros:
        yield _zeros_lost(count, after.zeros)
    values = after.distinct if strict and count.distinct <= (kernel.clusters or 0) else after.distinct_in_channel
    if kernel.clusters is not None and values > kernel.clusters:
        yield _clusters_lost(kernel, values)


def _losses_by_size(kernels: Sequence[KernelStructure], after: Sequence[KernelCount]) -> Iterator[str]:
    """Compare the kernels of each size as a group: the one with the most zeros with the one with the most, and so on.

    Sizes of which fewer are there than before say nothing: equal kernels are stored once, others are joined.
    """
    for size in dict.fromkeys(each.count.size for each in kernels):
        group = [each for each in kernels if each.count.size == size]
        others = [each for each in after if each.size == size]
        if len(others) < len(group):
            continue
        ordered = sorted((each for each in group if each.is_pruned), key=lambda each: -each.count.zeros)
        zeros = sorted((each.zeros for each in others), reverse=True)
        for each, left in zip(ordered, zeros, strict=False):
            if left < each.count.zeros:
                yield _zeros_lost(each.count, left)
        clustered = sorted((each for each in group if each.clusters is not None), key=lambda each: each.clusters)
        values = sorted(each.distinct_in_channel for each in others)
        for each, found in zip(clustered, values, strict=False):
            if found > each.clusters:
                yield _clusters_lost(each, found)


def _zeros_lost(count: KernelCount, left: int) -> str:
    return f"{count.name} had {count.zeros:,} zeros among {count.size:,} weights and has {left:,}"


def _clusters_lost(kernel: KernelStructure, values: int) -> str:
    return f"{kernel.count.name} had {kernel.clusters:,} distinct values and has {values:,}"


def _list(losses: Sequence[str]) -> str:
    more = f"; and {len(losses) - 5} more" if len(losses) > 5 else ""
    return "; ".join(losses[:5]) + more
