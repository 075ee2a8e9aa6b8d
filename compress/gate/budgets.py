"""What exported files must keep, as options of a recipe or of a budget file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from compress.data.references import DataOptions
from compress.options import Bytes, Fraction, Options, Share

SCHEMA = "bmcompress/budget/v1"


class MetricBudget(Options):
    """Limits of one quality metric."""

    min: Fraction | None = None
    """The value must be at least this."""
    max: Fraction | None = None
    """The value must be at most this."""
    max_drop: Fraction | None = Field(default=None, ge=0)
    """The value may be worse than the reference's by at most this, such as `1 pp`; compared sample by sample."""

    @model_validator(mode="after")
    def _limits_something(self) -> MetricBudget:
        if self.min is self.max is self.max_drop is None:
            raise ValueError("give at least one of min, max, max_drop")
        return self


class LatencyBudget(Options):
    """Limits of the time of one inference."""

    ratio: float = Field(gt=0)
    """Largest ratio to the reference, measured in interleaved pairs in the same processes."""


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
    accuracy: MetricBudget | None = None
    """Limits of the accuracy on the test split."""
    agreement: MetricBudget | None = None
    """Limits of the share of samples that get the reference's answer."""
    mae: MetricBudget | None = None
    """Limits of the mean absolute error, for regression."""
    mse: MetricBudget | None = None
    """Limits of the mean squared error, for regression."""
    latency: LatencyBudget | None = None
    """Limits of the time of one inference."""
    confidence: Share = 0.95
    """Confidence of the intervals that decide about quality."""

    def metrics(self) -> dict[str, MetricBudget]:
        """Return the limits by metric."""
        named = {"accuracy": self.accuracy, "agreement": self.agreement, "mae": self.mae, "mse": self.mse}
        return {name: budget for name, budget in named.items() if budget is not None}


class BudgetFile(Options):
    """A file for `bmcompress check`: artifacts, what they are compared with, and their budgets."""

    schema_: Literal["bmcompress/budget/v1"] = Field(default=SCHEMA, alias="schema")
    """Version of the file's format."""
    artifacts: dict[str, str] = Field(min_length=1)
    """Files by name; relative paths count from this file's folder."""
    reference: str | None = None
    """The file that quality and latency are compared with."""
    references: dict[str, str] = Field(default_factory=dict)
    """The file that an artifact's latency is compared with, where it is another one: the same runtime tells most."""
    data: DataOptions = DataOptions()
    """Where the test split comes from."""
    budgets: tuple[Budget, ...] = Field(min_length=1)
    """The limits."""

    @model_validator(mode="after")
    def _known_artifacts(self) -> BudgetFile:
        for name in (*(b.artifact for b in self.budgets), *self.references):
            if name not in self.artifacts:
                raise ValueError(f"no artifact is called `{name}`; artifacts: {', '.join(self.artifacts)}")
        return self

    def resolve(self, folder: Path) -> BudgetFile:
        """Return the same file with absolute paths, counted from `folder`."""

        def absolute(path: str) -> str:
            return str((folder / Path(path).expanduser()).resolve())

        return self.model_copy(
            update={
                "artifacts": {name: absolute(path) for name, path in self.artifacts.items()},
                "reference": absolute(self.reference) if self.reference else None,
                "references": {name: absolute(path) for name, path in self.references.items()},
                "data": self.data.resolve(folder),
            }
        )
