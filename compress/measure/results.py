"""What a benchmark found, as data: `BenchmarkReport` and its parts, with a JSON Schema.

A number that was not measured is `None`, and `reasons` says why under the field's name; NaN and infinity
never appear. Intervals are `[low, high]` at 95 %. `BenchmarkReport.model_json_schema()` is the published
schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.measure import tables

NOT_ASKED = "not asked for"
"""The reason for what nobody wanted to know."""

Interval = tuple[float, float]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """A frozen part of a report; it refuses unknown fields and numbers that JSON cannot hold."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, populate_by_name=True
    )


class Environment(Record):
    """The machine and software; nothing that names a host, a user or a path."""

    fingerprint_id: str
    """Equal on machines whose absolute latency may be compared."""
    cpu: str | None
    cores_visible: Count
    affinity: list[int]
    """Cores that this process may run on."""
    memory_bytes: Count | None
    cpu_quota_cores: float | None
    """CPU limit of the container, or `None` for none."""
    memory_limit_bytes: Count | None
    """Memory limit of the container, or `None` for none."""
    os: str
    python: str
    load_before: float | None
    """Load average over one minute when the benchmark began."""
    load_after: float | None
    packages: dict[str, str]
    runtime_options: dict[str, dict[str, Any]]
    reasons: dict[str, str] = {}


class Change(Record):
    """The loss of quality against the reference on the same samples; positive is worse."""

    value: float
    ci95: Interval | None
    lost: Count | None = None
    """Predictions that the reference has right and this file has wrong."""
    gained: Count | None = None
    """Predictions that the reference has wrong and this file has right."""
    mcnemar_p: float | None = None
    """Exact McNemar test, where each sample is one prediction."""


class Metric(Record):
    """One quality measure over `n` samples."""

    value: float | None
    n: Count
    ci95: Interval | None
    higher_is_better: bool
    drop: Change | None = None
    reasons: dict[str, str] = {}


class KernelSize(Record):
    """What one kernel of a file holds."""

    name: str
    """Name of the tensor, as the file has it."""
    shape: tuple[Count, ...]
    zeros: Count
    distinct: Count
    """Different values, or integers where the file holds these."""
    distinct_in_channel: Count
    """The most different values in one output channel."""
    bits: Count = 32
    """That one value takes in the file."""


class FileSize(Record):
    """What the file weighs and holds. Kernels are weight tensors of rank 2 and up."""

    file_bytes: Count
    gzip_bytes: Count
    """Size after gzip at level 6, which is where pruning and clustering show."""
    zstd_bytes: Count
    """Size after Zstandard at level 19."""
    parameters: Count | None
    nonzero_parameters: Count | None
    kernel_weights: Count | None
    nonzero_kernel_weights: Count | None
    sparsity: float | None
    """Share of zeros among kernel weights."""
    distinct_weights: Count | None
    """Distinct values in each kernel, summed over kernels."""
    kernels: list[KernelSize] = []
    """Each kernel by itself; empty where the file holds weights that cannot be read."""
    macs: Count | None
    """Multiply-accumulates of one sample (1 MAC = 2 FLOPs)."""
    macs_partial: bool
    """Whether the file does work that `macs` leaves out."""
    uncounted_ops: list[str] = []
    reasons: dict[str, str] = {}


class Startup(Record):
    """A cold start in a fresh process with warm disk caches."""

    import_ms: float
    """Importing the runtime, with NumPy already there."""
    load_ms: float
    first_inference_ms: float


class Memory(Record):
    """Peak resident memory of a fresh process that loads the file and runs it once."""

    peak_rss_bytes: Count | None
    over_runtime_bytes: int | None
    """The peak minus that of a process that only imports the runtime."""
    reasons: dict[str, str] = {}


class Latency(Record):
    """Times of single runs, interleaved with those of `reference` in fresh processes."""

    device: str = "cpu"
    """What executed them: `"cpu"`, `"gpu"`, `"tensorrt"` or `"openvino"`."""
    threads: Count
    batch: Count
    reference: str
    n: Count
    processes: Count
    p50_ms: float | None
    p50_ci95_ms: Interval | None
    p90_ms: float | None
    p99_ms: float | None
    mean_ms: float
    min_ms: float
    stdev_ms: float
    throughput_samples_s: float
    reference_p50_ms: float | None
    ratio: float
    """Time of this file divided by that of `reference`; 1 where they are the same file."""
    ratio_ci95: Interval
    control_ratio: float
    """The reference against a second copy of itself: what this machine's noise makes of 1."""
    control_ci95: Interval
    noisy: bool
    noise_reason: str | None
    operators_on_cpu: Count | None = None
    """Of an ONNX file on another device: how many operators ran on the CPU all the same."""
    reasons: dict[str, str] = {}


class Energy(Record):
    """Energy of one sample, everything that the source counts while the file runs included."""

    joules: float | None
    source: str | None
    """What was read: `"RAPL"` for processor packages, `"NVML"` for a GPU."""
    reasons: dict[str, str] = {}


class GpuMemory(Record):
    """What a GPU holds for a file after some runs, beyond what it held before; the runtime's own part included."""

    held_bytes: Count | None
    reasons: dict[str, str] = {}


class FileResult(Record):
    """Everything measured of one file."""

    file: str
    format: Literal["tflite", "onnx", "keras"]
    sha256: str
    runtime: str | None
    """Name and version of what ran it."""
    size: FileSize
    quality: dict[str, Metric] | None
    startup: Startup | None
    memory: Memory | None
    latency: list[Latency] | None
    energy: Energy | None = None
    gpu_memory: GpuMemory | None = None
    """Nothing where no GPU was asked for."""
    reasons: dict[str, str] = {}


class Tool(Record):
    """What wrote the report."""

    name: Literal["bmcompress"] = "bmcompress"
    version: str


class SplitSummary(Record):
    """The samples that quality was measured on."""

    name: str
    samples: Count
    labelled: bool
    digest: str


class BenchmarkReport(Record):
    """A benchmark of one or more files."""

    schema_: Literal["bmcompress/benchmark/v1"] = Field("bmcompress/benchmark/v1", alias="schema")
    tool: Tool
    created: str
    """UTC, ISO 8601."""
    environment: Environment
    reference: str
    """The file that quality is compared with."""
    data: SplitSummary | None
    results: list[FileResult]
    warnings: list[str]
    reasons: dict[str, str] = {}

    def to_json(self) -> str:
        """Return the report as JSON text that matches the published schema."""
        return self.model_dump_json(by_alias=True, indent=2)

    def with_short_names(self) -> BenchmarkReport:
        """Return the report with files called by their names alone, where these tell them apart."""
        names = {path: Path(path).name for path in [*(r.file for r in self.results), self.reference]}
        if len(set(names.values())) < len(names):
            return self
        results = []
        for result in self.results:
            latency = result.latency and [
                each.model_copy(update={"reference": Path(each.reference).name}) for each in result.latency
            ]
            results.append(result.model_copy(update={"file": names[result.file], "latency": latency}))
        warnings = []
        for warning in self.warnings:
            for path, name in sorted(names.items(), key=lambda item: -len(item[0])):
                warning = warning.replace(path, name)  # noqa: PLW2901
            warnings.append(warning)
        update = {"results": results, "reference": names[self.reference], "warnings": warnings}
        return self.model_copy(update=update)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table, one row per file and setting; `-` is not measured."""
        return tables.HEADER, [row for result in self.results for row in tables.format_rows(result)]

    def metric_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table with every metric of every file."""
        return tables.METRIC_HEADER, [row for result in self.results for row in tables.format_metrics(result)]

    def _repr_html_(self) -> str:
        return tables.format_html(*self.rows(), self.warnings)
