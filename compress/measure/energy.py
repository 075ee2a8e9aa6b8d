"""Energy of one sample: what the machine's own counters add while a file runs over and over in a fresh process.

Intel and AMD processors count the energy of each package (RAPL), which Linux shows as files that often only root may
read; NVIDIA GPUs count through NVML. What else runs on the machine is counted too, so compare files on an idle one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.deploy.runtimes import match_inputs
from compress.errors import SetupError
from compress.measure.children import open_file
from compress.measure.inputs import read_inputs, take_batches
from compress.measure.nvml import open_gpu

_SECONDS = 2.0
_WARM_UP = 5
_RAPL = Path("/sys/class/powercap")

Meter = Callable[[], float]
"""Returns joules since some point in the past."""


def measure(
    path: str, inputs: str, threads: int, batch: int, device: str, allow_imports: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of an `Energy`; runs in the child process."""
    source = "NVML" if device in ("gpu", "tensorrt") else "RAPL"
    try:
        meter = open_gpu("energy", _joules_of_gpu) if source == "NVML" else open_rapl()
        runtime = open_file(path, threads, allow_imports, device)
    except (SetupError, OSError) as error:
        return {"joules": None, "source": None, "reasons": {"joules": str(error).splitlines()[0]}}
    x = match_inputs([info.name for info in runtime.inputs], take_batches(read_inputs(inputs), batch, 1)[0])
    return {"joules": per_run(lambda: runtime.run(x), meter) / batch, "source": source}


def per_run(run: Callable[[], object], meter: Meter, seconds: float = _SECONDS) -> float:
    """Return the joules of one call of `run`, from calls over at least `seconds`."""
    for _ in range(_WARM_UP):
        run()
    begin, before, runs = time.perf_counter(), meter(), 0
    while time.perf_counter() - begin < seconds:
        run()
        runs += 1
    return (meter() - before) / runs


def open_rapl(root: Path = _RAPL) -> Meter:
    """Return a meter of all processor packages.

    Raises:
        SetupError: the machine shows no such counter, or not to this user.
    """
    packages = [folder for folder in sorted(root.glob("intel-rapl:*")) if folder.name.count(":") == 1]
    if not packages:
        raise SetupError("this machine shows no energy counter of its processor (RAPL)")
    try:
        ranges = [int((folder / "max_energy_range_uj").read_text()) for folder in packages]
        last = [int((folder / "energy_uj").read_text()) for folder in packages]
    except OSError as error:
        raise SetupError(f"the energy counter of the processor cannot be read: {error.strerror}") from error
    turns = [0] * len(packages)

    def read() -> float:
        for index, folder in enumerate(packages):
            now = int((folder / "energy_uj").read_text())
            turns[index] += now < last[index]  # the counter has started again from 0
            last[index] = now
        return sum(own + turn * size for own, turn, size in zip(last, turns, ranges, strict=True)) / 1e6

    return read


def _joules_of_gpu(nvml: Any, gpu: Any) -> float:
    return nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000
