"""Memory that a file takes on a GPU: what the device holds after some runs, beyond what it held before.

Runtimes keep what they once took, so what is held after runs is the peak; the runtime's own context is counted in. NVML
tells of the whole device, as inside of a container it knows processes by other numbers: nothing else may start now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from compress.deploy.runtimes import match_inputs
from compress.errors import SetupError
from compress.measure.children import open_file
from compress.measure.inputs import read_inputs, take_batches

GPU_DEVICES = ("gpu", "tensorrt")
"""Devices whose memory NVML tells."""

_RUNS = 5


def measure(
    path: str, inputs: str, threads: int, batch: int, device: str, allow_imports: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of a `GpuMemory`; runs in the child process."""
    try:
        used = open_nvml_memory()
        before = used()
        runtime = open_file(path, threads, allow_imports, device)
    except (SetupError, OSError) as error:
        return {"held_bytes": None, "reasons": {"held_bytes": str(error).splitlines()[0]}}
    x = match_inputs([info.name for info in runtime.inputs], take_batches(read_inputs(inputs), batch, 1)[0])
    for _ in range(_RUNS):
        runtime.run(x)
    return {"held_bytes": max(0, used() - before)}


def open_nvml_memory() -> Callable[[], int]:
    """Return a function that tells how many bytes of the first GPU are in use.

    Raises:
        SetupError: NVML or its Python package is not there.
    """
    try:
        import pynvml
    except ImportError:
        raise SetupError("memory of a GPU needs NVML", "Run `pip install nvidia-ml-py`.") from None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        raise SetupError(f"the GPU does not tell its memory: {error}") from error
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
