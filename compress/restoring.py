"""A quantization pass keeps its `max_drop` on the exported files: layers go back to float until it holds.

Layers are restored in the order in which they suffer, and every answer is measured on files in their runtimes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras

from compress.data.split import Split
from compress.measure.benchmarking import benchmark_files
from compress.models.task import Task
from compress.quantization.restoration import quantized_layers
from compress.quantization.sensitivity import layers_to_restore

logger = logging.getLogger(__name__)

Export = Callable[[keras.Model, Path], list[Path]]
"""Writes a model's files into a folder and returns them."""


@dataclass(frozen=True)
class Held:
    """A model whose files keep what was promised.

    Args:
        model: the fake-quantized model.
        drop: how far the metric falls on the worst of its files.
        layers: paths of the layers that went back to float, most sensitive first.
    """

    model: keras.Model
    drop: float
    layers: tuple[str, ...]


def restore_until_held(
    model: keras.Model,
    *,
    metric: str,
    before: float,
    max_drop: float,
    order: Callable[[], Sequence[str]],
    without: Callable[[tuple[str, ...]], keras.Model],
    keep: Collection[str] = (),
    export: Export,
    test: Split,
    task: Task,
) -> Held:
    """Return `model` with as few layers in float as it takes for its files to fall by at most `max_drop`.

    Args:
        model: a fake-quantized model; it is not changed.
        metric: name of the metric, of which more is better.
        before: its value before quantization.
        max_drop: the most that it may fall.
        order: returns the paths of the quantized layers, most sensitive first; called where the drop does not hold.
        without: returns the model with some layers in float.
        keep: layers that stay quantized.
        export: writes the files to measure.
        test: samples with labels.
        task: what the outputs are for.

    Raises:
        PassError: not even the float model's files keep the promise.
    """

    def measure(candidate: keras.Model) -> float:
        with tempfile.TemporaryDirectory(prefix="bmcompress-restore-") as name:
            files = export(candidate, Path(name))
            report = benchmark_files(files, test, tasks=task.outputs, latency=False, memory=False)
        values = [result.quality[metric].value for result in report.results if result.quality]
        return before - min(values)

    held = unchanged = Held(model, measure(model), ())
    if unchanged.drop <= max_drop:
        return unchanged
    logger.warning(
        "%s falls by %.2f pp, allowed are %g pp: looking for layers to restore",
        metric,
        100 * unchanged.drop,
        100 * max_drop,
    )

    def evaluate(paths: tuple[str, ...]) -> float:
        nonlocal held
        if not paths:
            return unchanged.drop
        candidate = without(paths)
        found = Held(candidate, measure(candidate), paths)
        if found.drop <= max_drop:
            held = found  # the search ends with the last one that holds
        return found.drop

    ordered = [*order(), *quantized_layers(model)]  # a layer that was not measured comes last
    layers_to_restore([path for path in dict.fromkeys(ordered) if path not in keep], evaluate, max_drop)
    return held
