"""What a report shows, read from run directories: files with accuracy, size and latency, passes, verdicts, kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import UsageError
from compress.manifest import FILE_NAME, Manifest
from compress.measure.results import FileResult, Metric

MAIN_METRICS = ("accuracy", "mse", "mae")
"""Metrics that a chart may show, the first that a run has."""


@dataclass(frozen=True)
class Point:
    """One file of a run.

    Args:
        run: name of the run.
        result: what was measured of it.
        metric: name of the main metric, or nothing.
    """

    run: str
    result: FileResult
    metric: str

    @property
    def quality(self) -> Metric | None:
        """The main metric."""
        return (self.result.quality or {}).get(self.metric)

    @property
    def latency_ms(self) -> float | None:
        """Median time of the first setting."""
        return self.result.latency[0].p50_ms if self.result.latency else None


@dataclass(frozen=True)
class Run:
    """A run directory.

    Args:
        name: what the report calls it.
        manifest: what it did and measured.
        recipe: text of its resolved recipe.
    """

    name: str
    manifest: Manifest
    recipe: str

    @property
    def metric(self) -> str:
        """Name of the main metric, or nothing where no file has one."""
        results = self.manifest.benchmark.results if self.manifest.benchmark else []
        names = [name for result in results for name in result.quality or {}]
        for kind in MAIN_METRICS:
            if found := next((name for name in names if name.rpartition(".")[2] == kind), None):
                return found
        return ""

    @property
    def points(self) -> list[Point]:
        """Its files."""
        results = self.manifest.benchmark.results if self.manifest.benchmark else []
        return [Point(self.name, result, self.metric) for result in results]


def read_runs(directories: Sequence[str | Path]) -> list[Run]:
    """Return the runs in these directories, called by the names of the directories where these differ.

    Raises:
        UsageError: none is given, or one of them holds no run.
    """
    if not directories:
        raise UsageError("expected at least one run directory. Received: none")
    paths = [Path(directory) for directory in directories]
    labels = [path.resolve().name for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    return [_read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def _read_run(path: Path, label: str) -> Run:
    manifest = Manifest.load(path)
    if manifest is None:
        reason = "cannot be read" if (path / FILE_NAME).exists() else "is not there"
        raise UsageError(
            f"expected the directory of a run. Received: {path}, whose {FILE_NAME} {reason}",
            "Give the directory that `bmcompress run -o` wrote.",
        )
    try:
        recipe = (path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        recipe = ""
    return Run(label, manifest, recipe)


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Return which points no other one beats, from the least cost on.

    Args:
        points: cost, of which less is better, and quality of each.
        higher_is_better: whether more quality is.
    """
    sign = 1 if higher_is_better else -1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1]))
    found: list[int] = []
    for index in order:
        if not found or sign * points[index][1] > sign * points[found[-1]][1]:
            found.append(index)
    return found
