"""The machine and software that a measurement was made on, and a fingerprint of what decides latency.

Absolute times may be compared only where the fingerprint is the same. It holds no host name, no user and no
path.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from compress.measure.results import Environment

PACKAGES = ("ai-edge-litert", "keras", "numpy", "onnx", "onnxruntime", "tensorflow")
"""Distributions whose versions are recorded where installed."""

RUNTIME_PACKAGES = {"tflite": "ai-edge-litert", "onnx": "onnxruntime", "keras": "keras"}
"""The distribution that runs files of each format."""

_CGROUP = Path("/sys/fs/cgroup")


def describe_environment(
    threads: Sequence[int], runtimes: dict[str, str], runtime_options: dict[str, dict]
) -> Environment:
    """Return the environment of this process, with the load before the work and none after it.

    Args:
        threads: thread counts that are measured.
        runtimes: version of each runtime that runs files, by name.
        runtime_options: what each runtime is opened with, by name.
    """
    cpu, affinity = _cpu_model(), _affinity()
    quota, limit = _container_limits(_CGROUP, _own_cgroup())
    reasons = {} if cpu else {"cpu": "the operating system does not name it"}
    return Environment(
        fingerprint_id=fingerprint(cpu, len(affinity), threads, runtimes),
        cpu=cpu,
        cores_visible=os.cpu_count() or len(affinity),
        affinity=affinity,
        memory_bytes=_memory_bytes(),
        cpu_quota_cores=quota,
        memory_limit_bytes=limit,
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        load_before=current_load(),
        load_after=None,
        packages=installed_versions(PACKAGES),
        runtime_options=runtime_options,
        reasons=reasons,
    )


def fingerprint(cpu: str | None, affinity_size: int, threads: Sequence[int], runtimes: dict[str, str]) -> str:
    """Return `fp1:` and 12 hex digits over what decides latency."""
    facts = {"affinity_size": affinity_size, "cpu": cpu, "runtimes": runtimes, "threads": sorted(threads)}
    return "fp1:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the version of each installed distribution among `names`, without importing it."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def current_load() -> float | None:
    """Return the load average over one minute, or `None` where the system has none."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_model() -> str | None:
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _own_cgroup() -> str:
    """Return this process's cgroup v2 path below the mount, such as `/docker/1a2b`."""
    found = [line[3:].strip() for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")]
    return found[0] if found else "/"


def _container_limits(root: Path, own: str) -> tuple[float | None, int | None]:
    """Return the tightest CPU (cores) and memory (bytes) limits on the way from `own` up to `root`."""
    folder, quotas, limits = root / own.lstrip("/"), [], []
    while True:
        quota, period = (*"".join(_lines(folder / "cpu.max")).split(), "", "")[:2]
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
        limit = "".join(_lines(folder / "memory.max")).strip()
        if limit.isdigit():
            limits.append(int(limit))
        if folder == root or root not in folder.parents:
            return min(quotas, default=None), min(limits, default=None)
        folder = folder.parent


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
