"""Timing single calls in this process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def time_runs(call: Callable[[], object], runs: int, warm_up: int) -> list[int]:
    """Return nanoseconds of each of `runs` calls, after some that do not count."""
    for _ in range(warm_up):
        call()
    gc.collect()
    gc.disable()
    try:
        times = []
        for _ in range(runs):
            begin = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - begin)
        return times
    finally:
        gc.enable()
