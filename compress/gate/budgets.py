"""What exported files must keep, as options of a recipe or of a budget file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from compress.data.references import DataOptions
from compress.gate.units import ByteGrowth, CountGrowth, Milliseconds
from compress.options import Bytes, Fraction, Options, Share

SCHEMA = "bmcompress/budget/v1"

METRICS = (
    "accuracy", "top_5", "precision", "recall", "f1", "roc_auc", "iou", "mae", "mse", "agreement", "kl", "max_abs_diff",
)  # fmt: skip
"""Metrics that a budget may limit by name."""

SIZE_LIMITS = ("file", "gzip", "zstd", "nonzero", "parameters", "macs")
"""Limits on exact numbers of the file."""

_WITHOUT_LABELS = {"agreement", "kl", "max_abs_diff"}

Level = Literal["error", "warn"]
"""Whether a broken limit fails the check or only warns."""


class MetricBudget(Options):
    """Limits of one quality metric."""

    min: Fraction | None = None
    """The value must be at least this."""
    max: Fraction | None = None
    """The value must be at most this."""
    max_drop: Fraction | None = Field(default=None, ge=0)
    """The value may be worse by at most this, such as `1 pp`, than that of what the file is compared with: the
    reference, the baseline, or each of both. Compared sample by sample."""
    level: Level = "error"
    """`warn` lets a broken limit pass with a warning."""

    @model_validator(mode="after")
    def _limits_something(self) -> MetricBudget:
        if self.min is self.max is self.max_drop is None:
            raise ValueError("give at least one of min, max, max_drop")
        return self


class LatencyBudget(Options):
    """Limits of the time of one inference."""

    ratio: float | None = Field(default=None, gt=0)
    """Largest ratio to the reference, measured in interleaved pairs in the same processes."""
    p50: Milliseconds | None = None
    """Largest median, such as `4 ms`; it counts only on the machine that wrote the baseline."""
    level: Level = "error"
    """`warn` lets a broken limit pass with a warning."""

    @model_validator(mode="after")
    def _limits_something(self) -> LatencyBudget:
        if self.ratio is self.p50 is None:
            raise ValueError("give at least one of ratio, p50")
        return self


class GrowthBudget(Options):
    """How much larger than in the baseline something may be: a number, or a share such as `2%`; 0 for no growth."""

    file: ByteGrowth | None = None
    """Of the file, such as `1 KiB` or `2%`."""
    gzip: ByteGrowth | None = None
    """Of the file compressed by gzip at level 6."""
    parameters: CountGrowth | None = None
    """Of the number of parameters."""
    nonzero: CountGrowth | None = None
    """Of the number of weights that are not zero."""
    macs: CountGrowth | None = None
    """Of the multiply-accumulates of one sample."""

    def limits(self) -> dict[str, int | str]:
        """Return the limits that are set, by what they limit."""
        return {name: limit for name, limit in self if limit is not None}


class Budget(Options):
    """The limits of one artifact."""

    artifact: str
    """`tflite`, `onnx` or `keras` in a recipe; a name under `artifacts:` in a budget file."""
    file: Bytes | None = None
    """Largest size of the file, such as `110 KiB`."""
    gzip: Bytes | None = None
    """Largest size of the file compressed by gzip at level 6."""
    zstd: Bytes | None = None
    """Largest size of the file compressed by Zstandard at level 19."""
    nonzero: int | None = Field(default=None, ge=0)
    """Largest number of weights that are not zero, counted in the file."""
    parameters: int | None = Field(default=None, ge=0)
    """Largest number of parameters, counted in the file."""
    macs: int | None = Field(default=None, ge=0)
    """Largest number of multiply-accumulates of one sample, counted in the file."""
    accuracy: MetricBudget | None = None
    """Limits of the accuracy on the test split."""
    top_5: MetricBudget | None = None
    """Limits of the share of samples whose class is among the five best."""
    precision: MetricBudget | None = None
    """Limits of the precision, the mean over classes."""
    recall: MetricBudget | None = None
    """Limits of the recall, the mean over classes."""
    f1: MetricBudget | None = None
    """Limits of the F1 score, the mean over classes."""
    roc_auc: MetricBudget | None = None
    """Limits of the area under the ROC curve."""
    iou: MetricBudget | None = None
    """Limits of the intersection over union, for segmentation."""
    mae: MetricBudget | None = None
    """Limits of the mean absolute error, for regression."""
    mse: MetricBudget | None = None
    """Limits of the mean squared error, for regression."""
    agreement: MetricBudget | None = None
    """Limits of the share of samples that get the reference's answer."""
    kl: MetricBudget | None = None
    """Limits of the Kullback-Leibler divergence from the reference, in nats."""
    max_abs_diff: MetricBudget | None = None
    """Limits of the largest difference between an output and the reference's."""
    metrics: dict[str, MetricBudget] = Field(default_factory=dict)
    """Limits of metrics of your own, by their names under `metrics:` of the budget file."""
    latency: LatencyBudget | None = None
    """Limits of the time of one inference."""
    max_growth: GrowthBudget | None = None
    """How much the file may grow since the baseline."""
    max_flips: Share | None = None
    """Largest share of samples that get another answer than in the baseline."""
    level: Level = "error"
    """`warn` lets every limit of this entry pass with a warning when it is broken."""
    confidence: Share = 0.95
    """Confidence of the intervals that decide about quality."""

    def quality_limits(self) -> dict[str, MetricBudget]:
        """Return the limits of quality by metric."""
        named = {name: getattr(self, name) for name in METRICS}
        return {name: limits for name, limits in named.items() if limits is not None} | self.metrics

    def places(self) -> list[tuple[str, ...]]:
        """Return where the limits stand in this entry, such as `("accuracy", "min")`, in the order of a check."""
        sizes = [(name,) for name in SIZE_LIMITS if getattr(self, name) is not None]
        growth = [("max_growth", name) for name in (self.max_growth.limits() if self.max_growth else ())]
        quality = [
            (*(("metrics",) if name in self.metrics else ()), name, kind)
            for name, limits in self.quality_limits().items()
            for kind in ("min", "max", "max_drop")
            if getattr(limits, kind) is not None
        ]
        flips = [("max_flips",)] if self.max_flips is not None else []
        latency = [("latency", kind) for kind in ("ratio", "p50") if getattr(self.latency, kind, None) is not None]
        return [*sizes, *growth, *quality, *flips, *latency]

    def needs_execution(self, place: Sequence[str]) -> bool:
        """Return whether the limit at `place` can be judged only by running the file."""
        return place[0] not in (*SIZE_LIMITS, "max_growth")

    def level_of(self, place: Sequence[str]) -> Level:
        """Return the level of the limit at `place`, such as `("latency", "p50")`."""
        levels, inner = {self.level}, self
        for key in place:
            inner = inner.get(key) if isinstance(inner, dict) else getattr(inner, key, None)
            levels.add(getattr(inner, "level", None))
        return "warn" if "warn" in levels else "error"

    @property
    def needs_labels(self) -> bool:
        """Whether a limit can be judged only where the answers are known."""
        return bool(self.quality_limits().keys() - _WITHOUT_LABELS)

    @property
    def needs_outputs(self) -> bool:
        """Whether the artifact must be run on samples."""
        return bool(self.quality_limits()) or self.max_flips is not None


class BudgetFile(Options):
    """A file for `bmcompress check`: artifacts, what they are compared with, and their budgets."""

    schema_: Literal["bmcompress/budget/v1"] = Field(default=SCHEMA, alias="schema")
    """Version of the file's format."""
    artifacts: dict[str, str] = Field(min_length=1)
    """Files by name; relative paths count from this file's folder."""
    reference: str | None = None
    """The file that quality and latency are compared with; without it quality is compared with the baseline alone."""
    baseline: str | None = None
    """The committed file that `bmcompress baseline update` writes, with what was measured when it was last agreed;
    `x.baseline.json` beside `x.budget.yaml` by default."""
    references: dict[str, str] = Field(default_factory=dict)
    """The file that an artifact's latency is compared with, where it is another one: the same runtime tells most."""
    data: DataOptions = DataOptions()
    """Where the test split comes from."""
    metrics: dict[str, str] = Field(default_factory=dict)
    """Metrics of your own by name, as `module:function`; the package must be allowed by `--allow-import`."""
    budgets: tuple[Budget, ...] = Field(min_length=1)
    """The limits."""

    @model_validator(mode="after")
    def _known_artifacts(self) -> BudgetFile:
        for name in (*(b.artifact for b in self.budgets), *self.references):
            if name not in self.artifacts:
                raise ValueError(f"no artifact is called `{name}`; artifacts: {', '.join(self.artifacts)}")
        for name in (name for budget in self.budgets for name in budget.metrics):
            if name not in self.metrics:
                raise ValueError(f"no metric of your own is called `{name}`; give its function under `metrics:`")
        return self

    def resolve(self, folder: Path) -> BudgetFile:
        """Return the same file with absolute paths, counted from `folder`."""

        def absolute(path: str) -> str:
            return str((folder / Path(path).expanduser()).resolve())

        return self.model_copy(
            update={
                "artifacts": {name: absolute(path) for name, path in self.artifacts.items()},
                "reference": absolute(self.reference) if self.reference else None,
                "baseline": absolute(self.baseline) if self.baseline else None,
                "references": {name: absolute(path) for name, path in self.references.items()},
                "data": self.data.resolve(folder),
            }
        )
