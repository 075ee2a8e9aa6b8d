"""The baseline: what was measured when it was last agreed, in one file that is committed.

It holds sizes, results sample by sample and the machine's fingerprint. It is read strictly: a file that is damaged,
of another schema or left over from a merge is an error and never "no baseline", which would let everything pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from compress import __version__
from compress.errors import RecipeError
from compress.files import atomic_path
from compress.gate.per_sample import PackedValues, pack_values
from compress.measure.results import BenchmarkReport, Count, FileResult, Interval, Metric, Record, SplitSummary

if TYPE_CHECKING:
    from compress.measure.quality import Quality

SCHEMA = "bmcompress/baseline/v1"

_MOST_BYTES = 64 * 2**20
_MARKERS = ("<<<<<<<", "|||||||", ">>>>>>>")
_AGAIN = "Restore it from version control, or write it anew: delete it, then `bmcompress baseline update`."

SIZES = {
    "file": "file_bytes",
    "gzip": "gzip_bytes",
    "parameters": "parameters",
    "nonzero": "nonzero_kernel_weights",
    "macs": "macs",
}
"""Name of each exact number in budgets and baselines, and its field in `FileSize`."""


class BaselineMetric(Record):
    """One quality measure, as a whole and sample by sample."""

    value: float | None
    n: Count
    ci95: Interval | None
    higher_is_better: bool
    per_sample: PackedValues | None = None
    """The value of each sample, or nothing where that would be too large."""
    reasons: dict[str, str]

    @model_validator(mode="after")
    def _agrees_with_its_samples(self) -> BaselineMetric:
        kept = self.per_sample
        if kept is None:
            return self
        if kept.count != self.n:
            raise ValueError(f"expected {self.n} per-sample results. Received: {kept.count}")
        if kept.encoding == "bits" and self.value is not None and abs(kept.ones() - self.value * self.n) > 1e-3:
            raise ValueError(f"the value {self.value:g} is not the mean of its per-sample results")
        return self


class BaselineLatency(Record):
    """The time of one inference on the machine that wrote the baseline."""

    device: str
    threads: Count
    batch: Count
    n: Count
    p50_ms: float


class BaselineArtifact(Record):
    """What was measured of one artifact; a number that was not is `None`."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    file: Count
    gzip: Count
    parameters: Count | None
    nonzero: Count | None
    """Weights of kernels that are not zero."""
    macs: Count | None
    metrics: dict[str, BaselineMetric]
    decisions: dict[str, PackedValues]
    """What each sample was taken for, by output."""
    latency: list[BaselineLatency]
    reasons: dict[str, str]


class Machine(Record):
    """Where it was measured: equal fingerprints make milliseconds comparable."""

    fingerprint_id: str
    cpu: str | None
    cores: Count


class Baseline(Record):
    """A committed baseline."""

    schema_: Literal["bmcompress/baseline/v1"] = Field(SCHEMA, alias="schema")
    created: str
    """UTC, ISO 8601."""
    tool: str
    """Version of bmcompress that wrote it."""
    machine: Machine
    data: SplitSummary | None
    """The samples that quality was measured on."""
    artifacts: dict[str, BaselineArtifact]

    def to_json(self) -> str:
        """Return the text of the file; the order of its keys is fixed, so that diffs are small."""
        value = self.model_dump(mode="json", by_alias=True)
        value["artifacts"] = dict(sorted(value["artifacts"].items()))
        return json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the file; the old one stays until the new one is whole."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.to_json())


def default_path(budget: Path) -> Path:
    """Return where the baseline of a budget file is unless it says: `x.baseline.json` beside `x.budget.yaml`."""
    return budget.with_name(f"{budget.stem.removesuffix('.budget')}.baseline.json")


def load_baseline(path: str | Path) -> Baseline | None:
    """Return the baseline in the file `path`, or `None` only where no such file exists.

    Raises:
        RecipeError: there is something at `path` that is not a baseline as it was written.
    """
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return None
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: the baseline cannot be read: {error.strerror}") from None
    return parse_baseline(raw, str(path))


def parse_baseline(raw: bytes, source: str) -> Baseline:
    """Return the baseline that the bytes of a file hold, or raise RecipeError."""
    if len(raw) > _MOST_BYTES:
        raise RecipeError(f"{source}: larger than {_MOST_BYTES} bytes, which no baseline is")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not UTF-8 text (byte {error.start})", _AGAIN) from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(_MARKERS):
            raise RecipeError(
                f"{source}:{number}: the baseline holds the marks of an unfinished merge. Received: {line[:40]!r}",
                "Take one side of the merge, then run `bmcompress baseline update`.",
            )
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError:
        raise RecipeError(f"{source}: nested too deeply for a baseline", _AGAIN) from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{source}:{error.lineno}: the baseline is not JSON: {error.msg}", _AGAIN) from None
    except ValueError as error:
        raise RecipeError(f"{source}: the baseline is damaged: {error}", _AGAIN) from None
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != SCHEMA:
        raise RecipeError(f"{source}: expected a baseline with schema {SCHEMA}. Received: {found!r:.100}", _AGAIN)
    try:
        # From JSON again: there a list is a tuple and "1" is no number.
        return Baseline.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{source}: the baseline is damaged at {place:.200}: {reason}", _AGAIN) from None


def make_baseline(
    results: Mapping[str, FileResult], report: BenchmarkReport, qualities: Mapping[str, Quality]
) -> Baseline:
    """Return the baseline of what was measured.

    Args:
        results: by artifact.
        report: the benchmark that they come from.
        qualities: quality sample by sample, by artifact.
    """
    about = report.environment
    return Baseline(
        created=report.created,
        tool=__version__,
        machine=Machine(fingerprint_id=about.fingerprint_id, cpu=about.cpu, cores=len(about.affinity)),
        data=report.data,
        artifacts={name: make_artifact(result, qualities.get(name)) for name, result in results.items()},
    )


def make_artifact(result: FileResult, quality: Quality | None) -> BaselineArtifact:
    decisions, reasons = {}, {}
    for name, values in (quality.decisions if quality else {}).items():
        packed = pack_values(values)
        if isinstance(packed, str):
            reasons[name] = packed
        else:
            decisions[name] = packed
    return BaselineArtifact(
        sha256=result.sha256,
        **{name: getattr(result.size, field) for name, field in SIZES.items()},
        metrics={
            name: _metric(metric, quality.per_sample.get(name) if quality else None)
            for name, metric in (result.quality or {}).items()
        },
        decisions=decisions,
        latency=[
            BaselineLatency(device=t.device, threads=t.threads, batch=t.batch, n=t.n, p50_ms=t.p50_ms)
            for t in result.latency or ()
            if t.p50_ms is not None
        ],
        reasons={**{name: result.size.reasons[f] for name, f in SIZES.items() if f in result.size.reasons}, **reasons},
    )


def _metric(metric: Metric, values: Any) -> BaselineMetric:
    packed = pack_values(values) if metric.value is not None and values is not None else None
    reasons = dict(metric.reasons)
    if isinstance(packed, str):
        reasons["per_sample"], packed = packed, None
    return BaselineMetric(
        value=metric.value,
        n=metric.n,
        ci95=metric.ci95,
        higher_is_better=metric.higher_is_better,
        per_sample=packed,
        reasons=reasons,
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r:.100} stands twice")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")
