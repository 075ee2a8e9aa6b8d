"""The time of each node of an `.onnx` file as ONNX Runtime executes it, after its graph optimizations."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress.deploy.onnx_runtime import OnnxRuntime
from compress.measure.children import random_inputs
from compress.measure.profiling import median_ms
from compress.measure.timing import time_runs

_WARM_UP = 10
_SUFFIX = "_kernel_time"


def profile(path: str, threads: int, batch: int, runs: int) -> dict[str, Any]:
    """Return the facts of a profile; runs in the child process."""
    with tempfile.TemporaryDirectory(prefix="bmcompress-profile-") as folder:
        plain = OnnxRuntime(Path(path), threads)
        inputs = random_inputs(plain, batch, np.random.default_rng(0))
        whole = time_runs(lambda: plain.run(inputs), runs, _WARM_UP)
        profiled = OnnxRuntime(Path(path), threads, profile_prefix=str(Path(folder) / "profile"))
        for _ in range(_WARM_UP + runs):
            profiled.run(inputs)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    names = _Names(onnx.load(path, load_external_data=False).graph)
    return {
        "runtime": f"onnxruntime {plain.version}",
        "whole_ms": median_ms(whole),
        "operators": [_describe(first, times, names) for first, times in _by_node(events, runs)],
    }


def count_by_provider(path: str, device: str, batch: int) -> dict[str, int]:
    """Return how many nodes each execution provider runs; runs in the child process."""
    with tempfile.TemporaryDirectory(prefix="bmcompress-profile-") as folder:
        runtime = OnnxRuntime(Path(path), 1, device=device, profile_prefix=str(Path(folder) / "profile"))
        runtime.run(random_inputs(runtime, batch, np.random.default_rng(0)))
        events = json.loads(Path(runtime.end_profiling()).read_text())
    nodes = {each["args"].get("node_index"): each["args"].get("provider") for each in events if _is_kernel(each)}
    return dict(Counter(nodes.values()))


def _is_run(event: dict[str, Any]) -> bool:
    return event.get("cat") == "Session" and event["name"] == "model_run"


def _is_kernel(event: dict[str, Any]) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)


def _by_node(events: list[dict[str, Any]], runs: int) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Return the first event of each node and its microseconds in each of the last `runs` runs, in order of execution.

    A loop's body has more than one event per run.
    """
    found: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
    run = -_WARM_UP
    for event in sorted(events, key=lambda each: (each.get("ts", 0) + each.get("dur", 0), _is_run(each))):
        if _is_run(event):
            run += 1
        elif _is_kernel(event) and run >= 0:
            key = f"{event['args'].get('node_index')} {event['name']}"
            found.setdefault(key, (event, np.zeros(runs)))[1][run] += event["dur"]
    return list(found.values())


def _describe(first: dict[str, Any], times_us: np.ndarray, names: _Names) -> dict[str, Any]:
    name = first["name"].removesuffix(_SUFFIX)
    kind = first["args"].get("op_name", "?")
    return {
        "type": kind,
        "name": name,
        "labels": names.labels(name, kind),
        "time_ms": _typical(times_us) / 1000,
        "provider": first["args"].get("provider"),
    }


def _typical(times: np.ndarray) -> float:
    """Return the mean of the middle half: other processes do not move it, and it is finer than the clock's steps."""
    left_out = len(times) // 4
    return float(np.sort(times)[left_out : len(times) - left_out].mean())


class _Names:
    """From the name of an executed node to those of the file's nodes that it came from."""

    def __init__(self, graph: onnx.GraphProto):
        self._by_name = {node.name: node for node in graph.node}
        self._makers = {output: node for node in graph.node for output in node.output}

    def labels(self, name: str, kind: str) -> list[str]:
        """Return names with the layer in them: of the node, and of what was merged into it before it."""
        # Merged nodes are called after the output or the name of one of them, such as `dense/MatMul/MatMulAddFusion`.
        node = self._makers.get(name.removesuffix("_nchwc"))
        node = node or self._by_name.get(name) or self._by_name.get(name.rpartition("/")[0])
        found = [name] if node is None else []
        while node is not None:
            found.append(node.name)
            if node.op_type == kind or not node.input:
                break
            node = self._makers.get(node.input[0])
        return [each for each in found if "/" in each]
