"""Memory: how much of it quantizing a model of 100 million parameters takes, in multiples of its float weights.

A fresh process imports everything, notes its resident memory, and then opens the model, fake-quantizes, calibrates,
saves and exports it. The peak of each stage is counted from that note on, so it includes the float model itself. The
export converts in a child process, whose peak stands beside (with what TensorFlow itself takes). Linux only.

    python benchmarks/quantization_memory.py

Writes benchmarks/results/quantization_memory.json. Goal: at most 3 times until the model is quantized.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

GOAL = 3.0
MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="units of each dense layer (default: 4096)")
    parser.add_argument("--layers", type=int, default=6, help="dense layers (default: 6, 100.7 million parameters)")
    parser.add_argument("--schemes", nargs="+", default=["int8", "int8_weights"])
    parser.add_argument("--samples", type=int, default=128, help="of calibration (default: 128)")
    parser.add_argument("--quick", action="store_true", help="smoke test: 6 million parameters; results are not kept")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # the child process of one scheme
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.width = 1024
    return arguments


def write_model(path: Path, width: int, layers: int) -> int:
    """Write a stack of dense layers, and return its number of parameters."""
    import keras

    keras.utils.set_random_seed(0)
    body = [keras.layers.Dense(width, activation="relu", name=f"dense_{index}") for index in range(layers)]
    model = keras.Sequential([keras.Input((width,)), *body])
    model.save(path)
    return model.count_params()


def resident_bytes(field: str = "VmRSS") -> int:
    """Return this process's resident memory, or its peak with `VmHWM`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return what `work` returns, and the peak of resident memory while it ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here
    return work(), resident_bytes("VmHWM")


def run_stages(path: Path, scheme: str, samples: int) -> dict[str, Any]:
    """Return the peak of each stage in bytes above what the process took after its imports, or why it failed."""
    import keras
    import tensorflow as tf

    import compress
    from compress.quantization.calibration import calibrate
    from compress.quantization.fake_quantization import fake_quantize

    keras.ops.matmul(tf.ones((8, 8)), tf.ones((8, 8)))  # wakes the thread pools
    _ = compress.load_model, compress.export_models
    baseline, peaks = resident_bytes(), {}
    folder = path.parent
    model, peaks["load"] = peak_of(lambda: compress.load_model(path))
    x = np.random.default_rng(0).random((samples, *model.input_shape[1:]), np.float32)
    twin, peaks["fake_quantize"] = peak_of(lambda: fake_quantize(model, scheme))
    _, peaks["calibrate"] = peak_of(lambda: calibrate(twin, x))
    model = None  # the user's to let go of
    _, peaks["save"] = peak_of(lambda: twin.save(folder / "quantized.keras"))
    files = {suffix: folder / f"quantized.{suffix}" for suffix in ("tflite", "onnx")}
    failed = {}
    try:
        _, peaks["export"] = peak_of(lambda: compress.export_models(twin, files, samples=x[:8]))
    except compress.BmcompressError as error:  # what came before is worth reporting
        failed["export"] = str(error).splitlines()[0]
    peaks = {stage: peak - baseline for stage, peak in peaks.items()}
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return peaks | {"export, largest child": children} | failed


def _cells(peak: int | str, parameters: int) -> dict[str, Any]:
    if isinstance(peak, str):
        return {"peak_mib": f"failed: {peak}", "times_float_weights": ""}
    return {"peak_mib": round(peak / MIB, 1), "times_float_weights": round(peak / (4 * parameters), 2)}


def main() -> None:
    arguments = parse_arguments()
    if arguments.file:
        (scheme,) = arguments.schemes
        print(json.dumps(run_stages(arguments.file, scheme, arguments.samples)))
        return
    from reporting import describe_machine, write_results

    machine, rows = describe_machine(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        parameters = write_model(path, arguments.width, arguments.layers)
        for scheme in arguments.schemes:
            command = [sys.executable, __file__, "--file", str(path), "--schemes", scheme]
            child = subprocess.run(
                [*command, "--samples", str(arguments.samples)], capture_output=True, text=True, check=False
            )
            if child.returncode:
                raise SystemExit(f"{scheme}: exit {child.returncode}: {child.stderr[-2000:]}")
            peaks = json.loads(child.stdout.splitlines()[-1])
            rows += [{"scheme": scheme, "stage": stage, **_cells(peak, parameters)} for stage, peak in peaks.items()]
    settings = {key: getattr(arguments, key) for key in ("width", "layers", "samples")}
    report = {
        "goal": {"times_float_weights of fake_quantize and calibrate": GOAL},
        "settings": settings | {"parameters": parameters},
        "machine": machine,
        "rows": rows,
    }
    write_results("quantization_memory", report, write=not arguments.quick)


if __name__ == "__main__":
    main()
