"""Latency of a file relative to a reference file, with a control that shows the machine's noise.

In each of a few fresh processes the reference, a second copy of it (the A/A control) and the candidate run
one after the other in random order, over and over, and each single run is timed. Load and clock changes then
hit all three alike, so their ratio holds on a busy machine where absolute times do not. The models push each
other out of the caches, so times are a little above those of one model running alone.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.deploy.runtimes import match_inputs
from compress.errors import UsageError
from compress.measure import statistics
from compress.measure.children import open_file
from compress.measure.inputs import read_inputs, take_batches
from compress.measure.results import Latency
from compress.worker import run_in_worker

CONTROL_TOLERANCE = 0.01
"""The A/A interval may miss 1 by this much before the machine counts as noisy."""
CONTROL_WIDTH = 0.10
"""The A/A interval may be this wide before the machine counts as noisy."""

_LEAST_PAIRS = 30
_MOST_PAIRS = 10_000
_DIFFERENT_BATCHES = 8
_WARM_UP_BLOCK = 5
_STEADY = 0.05


def measure_latency(
    reference: str | Path,
    candidate: str | Path,
    inputs: str | Path,
    *,
    threads: int = 1,
    batch: int = 1,
    processes: int = 3,
    pairs: int = 200,
    min_s: float = 1.0,
    max_s: float = 4.0,
    seed: int = 0,
    allow_imports: Sequence[str] = (),
    device: str = "cpu",
    advance: Callable[[], None] | None = None,
) -> Latency:
    """Return the latency of `candidate` and its ratio to `reference`; one file for both gives the control
    alone.

    Args:
        reference: file to compare with; for a fair ratio one that the same runtime runs.
        candidate: file to measure.
        inputs: folder written by `write_inputs`.
        threads: threads of the runtime.
        batch: samples per run.
        processes: fresh processes, one after the other.
        pairs: timed pairs per process at least, unless `max_s` comes first.
        min_s: seconds of timing per process at least, so that fast models get many more pairs.
        max_s: seconds after which a process stops once it has 30 pairs.
        seed: of the order of runs.
        allow_imports: packages whose classes a `.keras` file may name.
        device: what executes both; a run counts until its outputs are back in memory.
        advance: called after each process.

    Raises:
        UsageError: a count is below 1.
        SetupError: a runtime cannot use the device.
        WorkerError: a process crashed.
    """
    counts = {"threads": threads, "batch": batch, "processes": processes, "pairs": pairs}
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1. Received: {name}={value}")
    arguments = {
        "reference": str(reference),
        "candidate": str(candidate),
        "inputs": str(inputs),
        "threads": threads,
        "batch": batch,
        "pairs": pairs,
        "min_s": min_s,
        "max_s": max_s,
        "allow_imports": list(allow_imports),
        "device": device,
    }
    samples = []
    for process in range(processes):
        answer = run_in_worker("compress.measure.latency:time_in_turns", {**arguments, "seed": seed + process})
        samples.append({name: np.array(values, np.float64) / 1e6 for name, values in answer.items()})
        if advance is not None:
            advance()
    return summarize_times(samples, str(reference), threads, batch, device)


def summarize_times(
    samples: Sequence[dict[str, np.ndarray]],
    reference: str,
    threads: int,
    batch: int,
    device: str = "cpu",
) -> Latency:
    """Return the `Latency` of milliseconds per run, one dict of equally long arrays per process.

    Args:
        samples: `reference`, `control` and, unless it is the reference, `candidate`, paired by position.
        reference: name of the reference.
        threads: that the runtime used.
        batch: samples per run.
        device: what executed them.
    """
    own = "candidate" if "candidate" in samples[0] else "reference"
    times = np.concatenate([s[own] for s in samples])
    percentiles = {f"p{round(100 * p)}_ms": statistics.supported_percentile(times, p) for p in (0.5, 0.9, 0.99)}
    reasons = {
        name: f"needs {statistics.percentile_support(int(name[1:-3]) / 100)} runs, has {len(times)}"
        for name, value in percentiles.items()
        if value is None
    }
    ratio, interval = 1.0, (1.0, 1.0)
    if own == "candidate":
        ratio, interval = _ratio(samples, "candidate")
    control, control_interval = _ratio(samples, "control")
    reason = explain_noise(control_interval)
    return Latency(
        device=device,
        threads=threads,
        batch=batch,
        reference=reference,
        n=len(times),
        processes=len(samples),
        **percentiles,
        p50_ci95_ms=_median_interval([s[own] for s in samples]),
        mean_ms=times.mean(),
        min_ms=times.min(),
        stdev_ms=times.std(ddof=1) if len(times) > 1 else 0.0,
        throughput_samples_s=1000 * batch / times.mean(),
        reference_p50_ms=statistics.supported_percentile(np.concatenate([s["reference"] for s in samples]), 0.5),
        ratio=ratio,
        ratio_ci95=interval,
        control_ratio=control,
        control_ci95=control_interval,
        noisy=reason is not None,
        noise_reason=reason,
        reasons=reasons,
    )


def explain_noise(control: statistics.Interval) -> str | None:
    """Return why the A/A interval `control` shows too noisy a machine, or `None` if it does not."""
    low, high = control
    text = f"a file against a copy of itself takes {low:.3f} to {high:.3f} times as long"
    if low > 1 + CONTROL_TOLERANCE or high < 1 - CONTROL_TOLERANCE:
        return f"{text}, which excludes 1"
    if high - low > CONTROL_WIDTH:
        return f"{text}, which is wider than {CONTROL_WIDTH:g}"
    return None


def time_in_turns(
    *,
    reference: str,
    candidate: str,
    inputs: str,
    threads: int,
    batch: int,
    pairs: int,
    min_s: float,
    max_s: float,
    seed: int,
    allow_imports: Sequence[str] = (),
    device: str = "cpu",
) -> dict[str, list[int]]:
    """Return nanoseconds of each run, paired by position; runs in the child process."""
    names = ["reference", "control"]
    if Path(candidate).resolve() != Path(reference).resolve():
        names.append("candidate")
    files = {"reference": reference, "control": reference, "candidate": candidate}
    runtimes = [open_file(files[name], threads, allow_imports, device) for name in names]
    chosen = take_batches(read_inputs(inputs), batch, _DIFFERENT_BATCHES)
    batches = [[match_inputs([info.name for info in runtime.inputs], x) for runtime in runtimes] for x in chosen]
    rng = np.random.default_rng(seed)
    gc.collect()
    gc.disable()
    _warm_up(runtimes, batches, max_s / 4, rng)
    rounds: list[list[int]] = []
    start = time.perf_counter()
    while len(rounds) < _MOST_PAIRS:
        elapsed = time.perf_counter() - start
        enough = len(rounds) >= pairs and elapsed >= min_s
        if enough or (elapsed >= max_s and len(rounds) >= _LEAST_PAIRS):
            break
        rounds.append(_time_round(runtimes, batches[len(rounds) % len(batches)], rng))
    return {name: list(times) for name, times in zip(names, zip(*rounds, strict=True), strict=True)}


def _warm_up(
    runtimes: Sequence[Any], batches: list[list[list[np.ndarray]]], max_s: float, rng: np.random.Generator
) -> None:
    """Run until the median time of a block of rounds has settled for each runtime, or for `max_s`."""
    start, previous = time.perf_counter(), math.inf
    while True:
        block = []
        for _ in range(_WARM_UP_BLOCK):
            block.append(_time_round(runtimes, batches[0], rng))
            if time.perf_counter() - start > max_s:
                return
        current = np.median(block, axis=0)
        if np.all(np.abs(current - previous) <= _STEADY * current):
            return
        previous = current


def _time_round(runtimes: Sequence[Any], arrays: list[list[np.ndarray]], rng: np.random.Generator) -> list[int]:
    """Return nanoseconds of one run of each runtime on its arrays of the same inputs, in random order."""
    times = [0] * len(runtimes)
    for index in rng.permutation(len(runtimes)):
        run, inputs = runtimes[index].run, arrays[index]
        begin = time.perf_counter_ns()
        run(inputs)
        times[index] = time.perf_counter_ns() - begin
    return times


def _median_interval(times: Sequence[np.ndarray]) -> statistics.Interval | None:
    """Return the interval of the median: within processes as of one sample, between them as of a ratio."""
    pooled = statistics.median_interval(np.concatenate(times))
    _, between = statistics.ratio_interval([np.log(values) for values in times])
    return pooled and (min(pooled[0], between[0]), max(pooled[1], between[1]))


def _ratio(samples: Sequence[dict[str, np.ndarray]], name: str) -> tuple[float, statistics.Interval]:
    return statistics.ratio_interval([np.log(s[name] / s["reference"]) for s in samples])
