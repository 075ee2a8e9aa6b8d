"""Benchmarking model files side by side: quality on the same samples, size, start-up, memory and latency.

Everything is measured on the file, in the runtime that executes it, in fresh child processes. The process
that calls `benchmark_files` opens no model and imports no framework.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress import __version__
from compress.data.split import Split
from compress.deploy.devices import PROVIDERS, require_device
from compress.deploy.runtimes import detect_format, plain_name
from compress.errors import SetupError, UsageError
from compress.measure import environment
from compress.measure.children import read_outputs
from compress.measure.gpu_memory import GPU_DEVICES
from compress.measure.inputs import write_inputs
from compress.measure.latency import measure_latency
from compress.measure.own_metrics import MetricFunction, evaluate_function
from compress.measure.quality import Quality, as_output_kind, evaluate_outputs
from compress.measure.results import (
    NOT_ASKED,
    BenchmarkReport,
    Energy,
    FileResult,
    FileSize,
    GpuMemory,
    Latency,
    Memory,
    Metric,
    SplitSummary,
    Startup,
    Tool,
)
from compress.measure.size import measure_size
from compress.measure.startup import measure_runtime_peak, measure_startup
from compress.models.fit_check import pair_labels
from compress.models.task import infer_output_tasks
from compress.progress import track
from compress.worker import run_in_worker

PathLike = str | Path

_BATCH_SIZE = 64
_RANDOM_SAMPLES = 64


def benchmark_files(
    paths: Sequence[PathLike],
    data: Split | None = None,
    *,
    reference: PathLike | None = None,
    references: Mapping[PathLike, PathLike] | None = None,
    tasks: Sequence[Any] | Literal["infer"] | None = "infer",
    threads: int | Sequence[int] = 1,
    batch: int | Sequence[int] = 1,
    devices: Sequence[str] = ("cpu",),
    processes: int = 3,
    pairs: int = 200,
    latency: bool = True,
    memory: bool = True,
    energy: bool = False,
    metrics: Mapping[str, MetricFunction] | None = None,
    untimed: Collection[PathLike] = (),
    seed: int = 0,
    allow_imports: Sequence[str] = (),
    on_quality: Callable[[str, Quality], None] | None = None,
) -> BenchmarkReport:
    """Return a report on the model files `paths`, each `.tflite`, `.onnx` or `.keras`.

    Args:
        paths: files to measure.
        data: samples, all of which quality is measured on; without labels there is no accuracy, and without
            data there is no quality and latency is measured on random inputs.
        reference: the file that quality is compared with; the first of `paths` by default.
        references: the file that the latency of a file is compared with; by default the first that the same runtime
            runs, and for that one `reference`.
        tasks: one per output: `"classification"`, `"binary"`, `"multilabel"`, `"regression"`, or an object
            with a `kind` such as that of `compress.models.task`; `"infer"` tells from the outputs of the
            reference and the labels, and `None` leaves only the distances to the reference.
        threads: threads of the runtimes; several are measured one by one.
        batch: samples per timed run; several are measured one by one.
        devices: what executes the timed runs, one by one; a file whose runtime cannot use one gets the reason in the
            place of numbers.
        processes: fresh processes per latency.
        pairs: timed pairs per process, at least.
        latency: whether latency is measured.
        memory: whether start-up and memory are measured.
        energy: whether energy is measured, where the machine tells.
        metrics: functions of your own by name: `function(labels, outputs)` gets one array for each output, in lists,
            and returns a number, or one for each sample, such as a mean average precision.
        untimed: files for which neither is, such as a `.keras` file whose exports are what counts; each start of
            TensorFlow takes seconds.
        seed: of random inputs and of the order of runs.
        allow_imports: packages whose classes a `.keras` file may name.
        on_quality: called with each file and its quality sample by sample, which the report leaves out.

    Raises:
        UsageError: no files, a key of `references` that is none of them, or not one task per output.
        ModelError: a file is missing, damaged, unsafe or of no known format.
        DataError: samples or labels do not fit a file.
        WorkerError: a file crashed its runtime.
    """
    files = list(dict.fromkeys(str(path) for path in paths))
    if not files:
        raise UsageError("there must be at least one file to benchmark. Received: none")
    if strangers := sorted({str(file) for file in references or {}} - set(files)):
        raise UsageError(f"references must name files that are measured. Received: {', '.join(strangers)}")
    base = str(reference) if reference is not None else files[0]
    if data is not None and not data.in_memory:  # read once: a stream may shuffle each time
        x, y = data.all()
        data = Split(data.name, x, y, digest=data.digest)
    formats = {file: detect_format(Path(file)) for file in dict.fromkeys([base, *files])}
    with tempfile.TemporaryDirectory(prefix="bmcompress-benchmark-") as folder:
        bench = _Bench(
            base=base,
            formats=formats,
            references={str(file): str(other) for file, other in (references or {}).items()},
            folder=folder,
            tasks=tasks,
            threads=[threads] if isinstance(threads, int) else list(threads),
            batches=[batch] if isinstance(batch, int) else list(batch),
            devices=[require_device(device) for device in dict.fromkeys(devices)],
            processes=processes,
            pairs=pairs,
            latency=latency,
            memory=memory,
            energy=energy,
            metrics=dict(metrics or {}),
            untimed={str(file) for file in untimed},
            seed=seed,
            allow_imports=list(allow_imports),
            on_quality=on_quality,
        )
        return bench.measure(files, data)


@dataclass(frozen=True)
class _Bench:
    """The settings of one benchmark, and the steps that measure under them."""

    base: str
    formats: dict[str, str]
    references: dict[str, str]
    folder: str
    tasks: Sequence[Any] | Literal["infer"] | None
    threads: list[int]
    batches: list[int]
    devices: list[str]
    processes: int
    pairs: int
    latency: bool
    memory: bool
    energy: bool
    metrics: dict[str, MetricFunction]
    untimed: set[str]
    seed: int
    allow_imports: list[str]
    on_quality: Callable[[str, Quality], None] | None

    def measure(self, files: list[str], data: Split | None) -> BenchmarkReport:
        machine = self._describe_machine(files)
        settings = len(self.threads) * len(self.batches) * len(self.devices)
        timed = [file for file in files if file not in self.untimed]
        formats = {self.formats[file] for file in timed}
        total = len(files) + len(timed) * (self.memory + self.latency * settings * self.processes)
        total += (len({self.base, *files}) if data is not None else 0) + self.memory * len(formats)
        with track("benchmark", total=total) as advance:
            with _measuring_sizes(files) as pending:
                warnings = self._write_inputs(data)
                quality = self._measure_quality(files, data, advance) if data is not None else dict.fromkeys(files)
                sizes = {file: size.result() for file, size in pending.items()}  # before anything is timed
            advance(len(files), note="sizes")
            peaks = self._measure_runtimes(timed, advance)
            results = [self._measure_file(file, *sizes[file], quality[file], peaks, advance) for file in files]
        machine = machine.model_copy(update={"load_after": environment.current_load()})
        return BenchmarkReport(
            tool=Tool(version=__version__),
            created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            environment=machine,
            reference=self.base,
            data=None if data is None else _summarize(data),
            results=results,
            warnings=[*warnings, *_find_warnings(machine, results)],
            reasons={} if data is not None else {"data": "none was given"},
        )

    def _describe_machine(self, files: list[str]) -> environment.Environment:
        used = sorted({self.formats[file] for file in files})
        packages = [environment.RUNTIME_PACKAGES[name] for name in used]
        asked = {
            "tflite": {"delegate": "default (XNNPACK)"},
            "onnx": {"providers": [PROVIDERS[device] for device in self.devices]},
            "keras": {"devices": self.devices},
        }
        options = {name: {"threads": self.threads, **asked[name]} for name in used}
        return environment.describe_environment(self.threads, environment.installed_versions(packages), options)

    def _write_inputs(self, data: Split | None) -> list[str]:
        """Write the inputs that everything runs on, and return what had to be chosen for them."""
        if data is not None:
            write_inputs(self._inputs, data.all()[0])
            return []
        if not (self.latency or self.memory):
            return []
        arguments = {"path": self.base, "folder": self._inputs, "samples": _RANDOM_SAMPLES, "seed": self.seed}
        return self._in_child("write_random_inputs", arguments)

    @property
    def _inputs(self) -> str:
        return str(Path(self.folder) / "inputs")

    def _in_child(self, function: str, arguments: dict[str, Any]) -> Any:
        return self._in_child_of(f"compress.measure.children:{function}", arguments)

    def _in_child_of(self, function: str, arguments: dict[str, Any]) -> Any:
        return run_in_worker(function, {**arguments, "allow_imports": self.allow_imports})

    def _predict(self, files: list[str], advance: Callable[..., None]) -> dict[str, tuple[list[str], str]]:
        """Return, by file, the names of its outputs on all samples and the file they are in.

        `.keras` files share a process, as each start of TensorFlow takes seconds; other runtimes may crash and do not.
        """
        keras_files = [file for file in files if self.formats[file] == "keras"]
        groups = [[file] for file in files if self.formats[file] != "keras"] + [keras_files] * bool(keras_files)
        found = {}
        for group in groups:
            paths = {file: str(Path(self.folder) / f"outputs-{files.index(file)}.npz") for file in group}
            arguments = {"files": paths, "inputs": self._inputs, "batch_size": _BATCH_SIZE}
            names = self._in_child("predict_files", arguments)
            found |= {file: (names[file], paths[file]) for file in group}
            advance(len(group), note=f"{Path(group[-1]).name}: outputs")
        return found

    def _measure_quality(
        self, files: list[str], data: Split, advance: Callable[..., None]
    ) -> dict[str, dict[str, Metric]]:
        predicted = self._predict(list(dict.fromkeys([self.base, *files])), advance)
        names, expected = predicted[self.base][0], read_outputs(predicted[self.base][1])
        y = data.all()[1] if data.has_labels else None
        tasks = infer_output_tasks(names, expected, y) if self.tasks == "infer" else self.tasks
        kinds = [as_output_kind(task) for task in tasks or ()]
        if kinds and len(kinds) == len(names) and all(kind.name for kind in kinds):
            order = [kind.name for kind in kinds]
            expected = _in_order(order, names, expected)
            names = order
        labels = None
        if kinds and y is not None:
            labels = list(pair_labels(names, y).values())
        quality = {}
        for file in files:
            outputs, other = expected, None
            if file != self.base:
                own_names, path = predicted[file]
                outputs, other = _in_order(names, own_names, read_outputs(path)), expected
            found = evaluate_outputs(outputs, labels, kinds or None, other)
            quality[file] = dict(found.metrics)
            for name, function in self.metrics.items():
                truth = y if labels is None else labels
                quality[file][name] = evaluate_function(name, function, truth, outputs, other)
            if self.on_quality:
                self.on_quality(file, found)
        return quality

    def _measure_runtimes(self, files: list[str], advance: Callable[..., None]) -> dict[str, int | None]:
        """Return the peak memory of each format's runtime alone."""
        peaks = {}
        for name in sorted({self.formats[file] for file in files}) if self.memory else ():
            peaks[name] = measure_runtime_peak(name)
            advance(note=f"{name}: runtime")
        return peaks

    def _measure_file(
        self,
        file: str,
        size: FileSize,
        sha256: str,
        quality: dict[str, Metric] | None,
        peaks: dict[str, int | None],
        advance: Callable[..., None],
    ) -> FileResult:
        memory_asked, latency_asked = (asked and file not in self.untimed for asked in (self.memory, self.latency))
        startup, memory = self._measure_startup(file, peaks, advance) if memory_asked else (None, None)
        times, missing = self._measure_latency(file, advance) if latency_asked else (None, {})
        package = environment.RUNTIME_PACKAGES[self.formats[file]]
        version = environment.installed_versions([package]).get(package)
        reasons = {
            "quality": None if quality is not None else "there are no data",
            "startup": None if memory_asked else NOT_ASKED,
            "memory": None if memory_asked else NOT_ASKED,
            "latency": None if latency_asked else NOT_ASKED,
            "energy": None if self.energy else NOT_ASKED,
            **{f"latency.{device}": reason for device, reason in missing.items()},
        }
        return FileResult(
            file=file,
            format=self.formats[file],
            sha256=sha256,
            runtime=f"{package} {version}" if version else None,
            size=size,
            quality=quality,
            startup=startup,
            memory=memory,
            latency=times,
            energy=self._measure_energy(file) if self.energy and file not in self.untimed else None,
            gpu_memory=self._measure_gpu_memory(file, missing),
            reasons={name: reason for name, reason in reasons.items() if reason},
        )

    def _measure_startup(
        self, file: str, peaks: dict[str, int | None], advance: Callable[..., None]
    ) -> tuple[Startup, Memory]:
        found = measure_startup(
            file,
            self._inputs,
            peaks[self.formats[file]],
            threads=self.threads[0],
            batch=self.batches[0],
            allow_imports=self.allow_imports,
        )
        advance(note=f"{Path(file).name}: start-up")
        return found

    def _measure_latency(self, file: str, advance: Callable[..., None]) -> tuple[list[Latency], dict[str, str]]:
        """Return the times for each setting, and why there are none by device."""
        found, missing = [], {}
        for device, threads, batch in product(self.devices, self.threads, self.batches):
            if device in missing:
                continue
            try:
                times = measure_latency(
                    self._latency_reference(file, device),
                    file,
                    self._inputs,
                    threads=threads,
                    batch=batch,
                    processes=self.processes,
                    pairs=self.pairs,
                    seed=self.seed,
                    allow_imports=self.allow_imports,
                    device=device,
                    advance=lambda: advance(note=f"{Path(file).name}: latency"),
                )
            except SetupError as error:
                if device == "cpu":
                    raise
                missing[device] = error.message
                continue
            if device != "cpu" and self.formats[file] == "onnx":
                arguments = {"path": file, "device": device, "batch": batch}
                counts = run_in_worker("compress.measure.onnx_profile:count_by_provider", arguments)
                times = times.model_copy(update={"operators_on_cpu": counts.get(PROVIDERS["cpu"], 0)})
            found.append(times)
        return found, missing

    def _measure_gpu_memory(self, file: str, missing: Mapping[str, str]) -> GpuMemory | None:
        """Return what the first GPU that was asked for holds, or nothing where none was."""
        device = next((device for device in self.devices if device in GPU_DEVICES), None)
        if device is None or not self.memory or file in self.untimed:
            return None
        if device in missing:
            return GpuMemory(held_bytes=None, reasons={"held_bytes": missing[device]})
        arguments = {"path": file, "inputs": self._inputs, "threads": self.threads[0], "batch": self.batches[0]}
        answer = self._in_child_of("compress.measure.gpu_memory:measure", {**arguments, "device": device})
        return GpuMemory.model_validate(answer)

    def _measure_energy(self, file: str) -> Energy:
        arguments = {"path": file, "inputs": self._inputs, "threads": self.threads[0], "batch": self.batches[0]}
        answer = self._in_child_of("compress.measure.energy:measure", {**arguments, "device": self.devices[0]})
        return Energy.model_validate(answer)

    def _latency_reference(self, file: str, device: str) -> str:
        """Return what `file` is timed against; the same runtime, where there is a choice, tells of the file alone."""
        if device != "cpu":  # which another runtime may not know
            return next(other for other in self.formats if self.formats[other] == self.formats[file])
        if file in self.references:
            return self.references[file]
        same = next(other for other in self.formats if self.formats[other] == self.formats[file])
        return self.base if same == file else same


@contextmanager
def _measuring_sizes(files: Sequence[str]) -> Iterator[dict[str, Future[tuple[FileSize, str]]]]:
    """Measure sizes on another core while something else is done; what is not begun at the end is dropped."""
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        yield {file: pool.submit(measure_size, file) for file in files}
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(wanted: list[str], names: list[str], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Return `arrays` in the order of the outputs `wanted` where the names say so, else in their own."""
    plain = [plain_name(name) for name in wanted]
    by_name = {plain_name(name): array for name, array in zip(names, arrays, strict=True)}
    return [by_name[name] for name in plain] if set(plain) == set(by_name) and len(by_name) == len(arrays) else arrays


def _summarize(data: Split) -> SplitSummary:
    return SplitSummary(name=data.name, samples=len(data), labelled=data.has_labels, digest=data.digest)


def _find_warnings(machine: environment.Environment, results: list[FileResult]) -> list[str]:
    """Return what a reader should know before believing the numbers."""
    warnings = []
    cores = len(machine.affinity)
    if machine.load_before is not None and machine.load_before > cores:
        warnings.append(
            f"the load average was {machine.load_before:g} on {cores} cores: "
            "absolute times are unreliable, ratios hold better"
        )
    for result in results:
        for name, reason in result.reasons.items():
            if name.startswith("latency."):
                warnings.append(f"{result.file}: no latency on {name.removeprefix('latency.')}: {reason}")
        for name, metric in (result.quality or {}).items():
            if metric.value is None and not name.endswith("roc_auc"):  # which many data have none of
                warnings.append(f"{result.file}: {name}: {metric.reasons.get('value', 'not measured')}")
        for times in result.latency or ():
            if times.operators_on_cpu:
                warnings.append(f"{result.file}: {times.operators_on_cpu} operators ran on the CPU, not {times.device}")
            if times.noisy:
                warnings.append(f"{result.file}: the machine is too noisy for small ratios: {times.noise_reason}")
            if times.ratio_ci95[0] > 1:
                warnings.append(f"{result.file} is slower than {times.reference}: {times.ratio:.3g} times its time")
    return warnings
