"""The latency gate on a loaded machine: false alarms, and slowdowns that it finds, beside a naive comparison.

Two ONNX files: one of 40 equal layers, one of 44, which takes 10 % longer. Each trial judges `latency: {ratio: 1.05}`:
the first file against a copy of itself, where `fail` is a false alarm, and the second against the first, where `fail`
is right. Naive is what CI scripts do: 200 runs of one file, then 200 of the other, and the ratio of medians is above
1.05 or not. A second process keeps the cores busy meanwhile.

    python benchmarks/latency_gate.py --trials 40
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import onnx
from onnx import TensorProto, helper
from reporting import describe_machine, write_results

from compress.deploy.runtimes import open_runtime
from compress.gate.budgets import Budget, LatencyBudget
from compress.gate.judging import judge
from compress.measure.benchmarking import benchmark_files
from compress.measure.statistics import wilson_interval

GOAL = "false alarms <= 1 of 40; slowdowns of 10 % found >= 39 of 40"
LIMIT, WIDTH, LAYERS, RUNS = 1.05, 96, 40, 200


def write_net(path: Path, layers: int) -> Path:
    """Write a net of equal layers, so that time goes with their number."""
    generator = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer in range(layers):
        kernel = (generator.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype("float32")
        weights.append(helper.make_tensor(f"w{layer}", TensorProto.FLOAT, kernel.shape, kernel.ravel()))
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"h{layer}"]))
        nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32, WIDTH])
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", 32, WIDTH])
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def gate(reference: Path, candidate: Path, seed: int, processes: int) -> tuple[str, float]:
    """Return the verdict of the gate and the ratio."""
    report = benchmark_files(
        [candidate],
        reference=reference,
        references={candidate: reference},
        processes=processes,
        memory=False,
        seed=seed,
    )
    budget = Budget(artifact="onnx", latency=LatencyBudget(ratio=LIMIT))
    (verdict,) = judge([budget], {"onnx": report.results[0]})
    return verdict.verdict, float(verdict.value)


def naive(reference: Path, candidate: Path) -> tuple[str, float]:
    """Return what one file after the other says."""
    medians = []
    for path in (reference, candidate):
        runtime = open_runtime(path)
        x = [np.ones((1, 32, WIDTH), "float32")]
        for _ in range(20):
            runtime.run(x)
        times = []
        for _ in range(RUNS):
            begin = time.perf_counter()
            runtime.run(x)
            times.append(time.perf_counter() - begin)
        medians.append(np.median(times))
    ratio = float(medians[1] / medians[0])
    return ("fail" if ratio > LIMIT else "pass"), ratio


def burn(seed: int) -> None:
    """Keep a core busy in bursts of random length, as other jobs do."""
    generator = np.random.default_rng(seed)
    a = generator.standard_normal((300, 300))
    while True:
        until = time.perf_counter() + generator.exponential(0.5)
        while time.perf_counter() < until:
            a @ a
        time.sleep(generator.exponential(0.5))


def summarize(name: str, question: str, outcomes: list[tuple[str, float]]) -> dict[str, Any]:
    ratios = np.array([ratio for _, ratio in outcomes])
    count = sum(verdict == "fail" for verdict, _ in outcomes)
    low, high = wilson_interval(count, len(outcomes))
    return {
        "method": name,
        "question": question,
        "fail": count,
        "inconclusive": sum(verdict == "inconclusive" for verdict, _ in outcomes),
        "trials": len(outcomes),
        "share_ci95": [round(low, 3), round(high, 3)],
        "ratio_median": round(float(np.median(ratios)), 3),
        "ratio_range": [round(float(ratios.min()), 3), round(float(ratios.max()), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40, help="of each question (default: 40)")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes per trial of the gate (default: 3)")
    parser.add_argument("--load", type=int, default=2, help="busy processes beside it (default: 2)")
    arguments = parser.parse_args()
    load = [multiprocessing.Process(target=burn, args=(seed,), daemon=True) for seed in range(arguments.load)]
    for process in load:
        process.start()
    found: dict[tuple[str, str], list[tuple[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        same = write_net(Path(folder) / "net.onnx", LAYERS)
        copy = write_net(Path(folder) / "copy.onnx", LAYERS)
        slower = write_net(Path(folder) / "slower.onnx", LAYERS * 11 // 10)
        for trial in range(arguments.trials):
            for question, candidate in (("equal: false alarms", copy), ("10 % slower: found", slower)):
                for name, outcome in (
                    ("gate", gate(same, candidate, 1000 * trial, arguments.processes)),
                    ("naive", naive(same, candidate)),
                ):
                    found.setdefault((name, question), []).append(outcome)
            print(f"trial {trial + 1} of {arguments.trials}: {[own[-1] for own in found.values()]}", file=sys.stderr)
    for process in load:
        process.terminate()
    report = {
        "goal": GOAL,
        "settings": {"limit": LIMIT, "processes": arguments.processes, "load": arguments.load},
        "machine": describe_machine(),
        "load_average": os.getloadavg()[0],
        "rows": [summarize(name, question, outcomes) for (name, question), outcomes in found.items()],
    }
    write_results("latency_gate", report)


if __name__ == "__main__":
    main()
