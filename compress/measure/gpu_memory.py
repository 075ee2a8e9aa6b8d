"""Memory that a file takes on a GPU: what the device holds after some runs, beyond what it held before.

Runtimes keep what they once took, so what is held after runs is the peak; the runtime's own context is counted in. NVML
tells of the whole device, as inside of a container it knows processes by other numbers: nothing else may start now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.deploy.runtimes import match_inputs
from compress.errors import SetupError
from compress.measure.children import open_file
from compress.measure.inputs import read_inputs, take_batches
from compress.measure.nvml import open_gpu

GPU_DEVICES = ("gpu", "tensorrt")
"""Devices whose memory NVML tells."""

_RUNS = 5


def measure(
    path: str, inputs: str, threads: int, batch: int, device: str, allow_imports: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of a `GpuMemory`; runs in the child process."""
    try:
        used = open_gpu("memory", _bytes_in_use)
        before = used()
        runtime = open_file(path, threads, allow_imports, device)
    except (SetupError, OSError) as error:
        return {"held_bytes": None, "reasons": {"held_bytes": str(error).splitlines()[0]}}
    x = match_inputs([info.name for info in runtime.inputs], take_batches(read_inputs(inputs), batch, 1)[0])
    for _ in range(_RUNS):
        runtime.run(x)
    return {"held_bytes": max(0, used() - before)}


def _bytes_in_use(nvml: Any, gpu: Any) -> int:
    return int(nvml.nvmlDeviceGetMemoryInfo(gpu).used)
