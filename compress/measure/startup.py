"""Cold start and peak memory of one file, in a fresh process of its own and apart from all timing of runs.

The peak is `VmHWM` of the process. `ru_maxrss` would not do: a child inherits that of the process it was
started from.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.measure.results import Memory, Startup
from compress.worker import run_in_worker

RUNTIME_MODULES = {"tflite": "ai_edge_litert.interpreter", "onnx": "onnxruntime", "keras": "keras"}
"""The module that is imported to run files of each format."""

_NO_PEAK = "the operating system does not report VmHWM"


def measure_startup(
    path: str | Path,
    inputs: str | Path,
    runtime_peak_bytes: int | None,
    *,
    threads: int = 1,
    batch: int = 1,
    allow_imports: Sequence[str] = (),
) -> tuple[Startup, Memory]:
    """Return start-up times and peak memory of `path`.

    Args:
        path: file to measure.
        inputs: folder written by `write_inputs`.
        runtime_peak_bytes: what `measure_runtime_peak` found for the format of this file.
        threads: threads of the runtime.
        batch: samples of the one run.
        allow_imports: packages whose classes a `.keras` file may name.
    """
    arguments = {
        "path": str(path),
        "inputs": str(inputs),
        "threads": threads,
        "batch": batch,
        "allow_imports": list(allow_imports),
    }
    answer = run_in_worker("compress.measure.startup:start_cold", arguments)
    peak = answer.pop("peak_rss_bytes")
    over = None if peak is None or runtime_peak_bytes is None else peak - runtime_peak_bytes
    reasons = {
        name: _NO_PEAK for name, value in (("peak_rss_bytes", peak), ("over_runtime_bytes", over)) if value is None
    }
    return Startup(**answer), Memory(peak_rss_bytes=peak, over_runtime_bytes=over, reasons=reasons)


def measure_runtime_peak(file_format: str) -> int | None:
    """Return peak memory in bytes of a fresh process that imports a format's runtime and nothing more."""
    return run_in_worker("compress.measure.startup:import_runtime", {"file_format": file_format})["peak_rss_bytes"]


def import_runtime(file_format: str) -> dict[str, Any]:
    """Import the runtime of a format; runs in the child process."""
    importlib.import_module("compress.measure.children")  # NumPy and what opens files: no part of the runtime
    begin = time.perf_counter()
    importlib.import_module(RUNTIME_MODULES[file_format])
    import_ms = 1000 * (time.perf_counter() - begin)
    return {"import_ms": import_ms, "peak_rss_bytes": peak_rss_bytes()}


def start_cold(path: str, inputs: str, threads: int, batch: int, allow_imports: Sequence[str]) -> dict[str, Any]:
    """Import, load and run once; runs in the child process."""
    from compress.deploy.runtimes import detect_format, match_inputs
    from compress.measure.children import open_file
    from compress.measure.inputs import read_inputs, take_batches

    import_ms = import_runtime(detect_format(Path(path)))["import_ms"]
    x = take_batches(read_inputs(inputs), batch, 1)[0]
    begin = time.perf_counter()
    runtime = open_file(path, threads=threads, allow_imports=allow_imports)
    loaded = time.perf_counter()
    runtime.run(match_inputs([info.name for info in runtime.inputs], x))
    done = time.perf_counter()
    return {
        "import_ms": import_ms,
        "load_ms": 1000 * (loaded - begin),
        "first_inference_ms": 1000 * (done - loaded),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes(status: str = "/proc/self/status") -> int | None:
    """Return the peak resident memory of this process so far, or `None` where it is not reported."""
    try:
        lines = Path(status).read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None
