"""`bmcompress check`: a known-worse file fails each line, an equal one none; how much of its time is the runtime's.

Verdicts: a net that is 2 points less accurate, takes 20 % longer and is one byte over its limit, and a copy of the good
one, each judged by the command itself. Overhead: the wall time of `check` on a 1 MB ResNet20 with 10,000 samples,
against a bare script that imports the runtime, opens the file and runs the same samples in the same batches, in turn.

    python benchmarks/check.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "gate"))

import numpy as np
from gate_nets import write_net, write_samples
from reporting import describe_machine, write_results

GOAL = "each line of the worse file fails at its line, the equal one passes with ratio 1; at least 80 % in the runtime"

VERDICTS = """\
artifacts: {net: net.onnx}
references: {net: good.onnx}
data: {test: {type: npz, path: data.npz, x: x_test, y: y_test}}
budgets:
  - artifact: net
    file: BYTES
    accuracy:
      max_drop: 1 pp
    latency:
      ratio: 1.1
    max_flips: 1%
"""

OVERHEAD = """\
artifacts: {net: FILE}
data: {test: {type: npz, path: data.npz, x: x_test, y: y_test}}
budgets:
  - {artifact: net, file: 2 MiB, accuracy: {min: 0, max_drop: 1 pp}, max_growth: {file: 0, macs: 0}, max_flips: 1%}
"""

BARE = {
    "onnx": """
import numpy as np, onnxruntime, sys
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options)
x = np.load("data.npz")["x_test"]
for i in range(0, len(x), 64):
    session.run(None, {session.get_inputs()[0].name: x[i:i + 64]})
""",
    "tflite": """
import numpy as np, sys
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(sys.argv[1], num_threads=1)
x = np.load("data.npz")["x_test"]
index = interpreter.get_input_details()[0]["index"]
for i in range(0, len(x), 64):
    batch = x[i:i + 64]
    interpreter.resize_tensor_input(index, batch.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, batch)
    interpreter.invoke()
    interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
""",
}

CHECK = [sys.executable, "-c", "from compress.cli import main; main()", "check"]


def judge(folder: Path, case: str) -> list[dict[str, Any]]:
    """Return a row for each verdict of the command."""
    done = subprocess.run([*CHECK, "--json"], cwd=folder, capture_output=True, text=True, check=False)
    lines = (folder / "bmcompress.budget.yaml").read_text().splitlines()
    return [
        {
            "file": case,
            "limit": verdict["limit"],
            "measured": round(verdict["value"], 4),
            "allowed": verdict["allowed"],
            "verdict": verdict["verdict"],
            "line": f"{verdict['line']}: {lines[verdict['line'] - 1].strip()}",
            "exit code": done.returncode,
        }
        for verdict in json.loads(done.stdout)["verdicts"]
    ]


def measure_verdicts(folder: Path) -> list[dict[str, Any]]:
    """Return the verdicts on an equal and on a worse file."""
    good = write_net(folder / "good.onnx", 0, 20, width=512)
    worse = write_net(folder / "worse.onnx", 1, 24, width=512)
    write_samples(folder / "data.npz", 10_000, (1000, 1200))
    budget = folder / "bmcompress.budget.yaml"
    shutil.copy(good, folder / "net.onnx")
    budget.write_text(VERDICTS.replace("BYTES", str(good.stat().st_size)))
    subprocess.run([*CHECK[:-1], "baseline", "update"], cwd=folder, check=True, capture_output=True)
    rows = judge(folder, "equal")
    shutil.copy(worse, folder / "net.onnx")
    budget.write_text(VERDICTS.replace("BYTES", str(worse.stat().st_size - 1)))
    return rows + judge(folder, "worse")


def write_resnet20(folder: Path) -> None:
    """Write ResNet20 for CIFAR-10 (He et al. 2016, arXiv:1512.03385) with random weights, and samples."""
    import keras

    from compress import export_models

    def block(x: Any, filters: int, strides: int) -> Any:
        y = keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        y = keras.layers.ReLU()(keras.layers.BatchNormalization()(y))
        y = keras.layers.BatchNormalization()(keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(y))
        if strides > 1:
            x = keras.layers.Conv2D(filters, 1, strides, use_bias=False)(x)
        return keras.layers.ReLU()(keras.layers.Add()([x, y]))

    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((32, 32, 3))
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(16, 3, padding="same")(x)))
    for filters in (16, 32, 64):
        for index in range(3):
            x = block(x, filters, 2 if index == 0 and filters > 16 else 1)
    x = keras.layers.Dense(10, activation="softmax")(keras.layers.GlobalAveragePooling2D()(x))
    export_models(keras.Model(inputs, x), {kind: folder / f"resnet20.{kind}" for kind in BARE})
    random = np.random.default_rng(0)
    x_test = random.standard_normal((10_000, 32, 32, 3)).astype("float32")
    np.savez(folder / "data.npz", x_test=x_test, y_test=random.integers(0, 10, 10_000))


def seconds(command: list[str], folder: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - begin


def measure_overhead(folder: Path, runs: int) -> list[dict[str, Any]]:
    """Return, by runtime, how much of the time of `check` a bare script takes for the same samples."""
    write_resnet20(folder)
    rows = []
    for kind, script in BARE.items():
        file = f"resnet20.{kind}"
        (folder / "bmcompress.budget.yaml").write_text(OVERHEAD.replace("FILE", file))
        (folder / "bmcompress.baseline.json").unlink(missing_ok=True)
        seconds([*CHECK[:-1], "baseline", "update"], folder)
        pairs = [
            (seconds([sys.executable, "-c", script, file], folder), seconds([*CHECK, "--quiet"], folder))
            for _ in range(runs)
        ]
        shares = [bare / check for bare, check in pairs]
        rows.append(
            {
                "file": file,
                "bytes": (folder / file).stat().st_size,
                "bare s": round(statistics.median(bare for bare, _ in pairs), 2),
                "check s": round(statistics.median(check for _, check in pairs), 2),
                "share of the runtime": round(statistics.median(shares), 3),
                "range": [round(min(shares), 3), round(max(shares), 3)],
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="pairs for the overhead (default: 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        verdicts, overhead = measure_verdicts(Path(first)), measure_overhead(Path(second), arguments.runs)
    common = {"goal": GOAL, "machine": describe_machine()}
    write_results("check", common | {"rows": verdicts, "overhead": overhead})
    for row in overhead:
        print(row)


if __name__ == "__main__":
    main()
