"""What a run did and measured, as one file: `manifest.json`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.deploy.records import ExportRecord
from compress.files import atomic_path
from compress.gate.verdicts import Verdict
from compress.measure.comparison import LayerError
from compress.measure.results import BenchmarkReport

SCHEMA = "bmcompress/manifest/v1"
FILE_NAME = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", validate_assignment=True)


class FileDigest(_Record):
    """A file of the run and what its bytes and its content are."""

    path: str
    """Name inside the run directory."""
    sha256: str
    """Digest of the bytes."""
    content: str | None = None
    """Digest of a model's configuration and weights: equal for equal models, whatever their time stamps."""
    size_bytes: int


class StepRecord(_Record):
    """One pass that was run."""

    id: str
    type: str
    options: dict[str, Any]
    key: str
    """Digest of everything that decides the step's result; an equal key means that the step need not run again."""
    file: FileDigest
    seconds: float
    statistics: dict[str, Any]
    """Parameters, non-zero weights, sparsity, distinct weights, MACs and kernels of the model after the step."""
    metrics: dict[str, float]
    """Quality of the model after the step on the test split, in Keras."""
    reverted: bool = False
    """Whether the step broke its `max_drop` and the model before it was kept."""
    notes: list[str] = []
    record: dict[str, Any] = {}
    """What the pass tells of what it did, such as the channels that were kept."""


class Manifest(_Record):
    """Everything that one run did and measured."""

    schema_: Literal["bmcompress/manifest/v1"] = Field(default=SCHEMA, alias="schema")
    status: Literal["running", "failed", "done"] = "running"
    created: str = Field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    name: str
    seed: int
    recipe_digest: str
    backend: str = ""
    """What computed under Keras, with its version, such as `jax 0.10.2`."""
    versions: dict[str, str] = {}
    data: dict[str, str] = {}
    """Digest of each split that was used."""
    notes: list[str] = []
    """What was chosen for the user, such as the loss."""
    input: FileDigest | None = None
    input_statistics: dict[str, Any] = {}
    input_metrics: dict[str, float] = {}
    steps: list[StepRecord] = []
    exports_key: str = ""
    exports: list[ExportRecord] = []
    benchmark: BenchmarkReport | None = None
    verdicts: list[Verdict] = []
    layer_errors: dict[str, list[LayerError]] = {}
    """Of quantized files: how far each layer is from the input model's."""
    error: str | None = None
    """What ended a failed run."""

    model_config = ConfigDict(extra="ignore", validate_assignment=True, populate_by_name=True)

    def save(self, directory: Path) -> None:
        """Write `manifest.json`; the old file stays until the new one is whole."""
        with atomic_path(directory / FILE_NAME) as temporary:
            temporary.write_text(self.model_dump_json(by_alias=True, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Manifest | None:
        """Return the manifest of a run directory, or `None` when there is none that can be read."""
        try:
            return cls.model_validate_json((directory / FILE_NAME).read_text())
        except (OSError, ValueError):
            return None
