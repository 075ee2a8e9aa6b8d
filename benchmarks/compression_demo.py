"""Prune 80 %, share 32 values, 8 bits: how small a residual CIFAR-10 net gets in one recipe, and what it loses.

The net is trained once (kept in `--work`). The settings of the recipes were chosen on the last 5,000 training images
(`--validate`); the test images are looked at by the run alone. A second recipe prunes and then trains with 8 bits in
the loop (PQAT), and looks up every pruned weight in the int8 file. Goals: gzip bytes at most 1/12 of the float
TFLite's, at most 1 point lost; all pruned weights zero.

    python benchmarks/compression_demo.py --data DATA --work WORK

Writes benchmarks/results/compression_demo.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from quantization_nets import Arrays, Net, augment_images, build_resnet8, ensure_net, load_arrays

GOALS = {"gzip_ratio": 1 / 12, "change_pp": -1.0, "pruned_weights_still_zero_percent": 100.0}
HELD_OUT = 5000
SPARSITY, CLUSTERS = 0.8, 32
PRUNE = {
    "type": "prune",
    "sparsity": SPARSITY,
    "distribution": "global",
    "epochs": 5,
    "learning_rate": 2e-3,
    "teacher": "input",
}
CLUSTER = {
    "type": "cluster",
    "clusters": CLUSTERS,
    "initialisation": "linear",
    "epochs": 2,
    "learning_rate": 5e-4,
    "teacher": "input",
}
QAT = {"type": "qat", "epochs": 1, "learning_rate": 1e-4}
RECIPES = {"prune + cluster + qat": [PRUNE, CLUSTER, QAT], "prune + qat": [PRUNE, QAT]}


NET = Net("cifar_wide_resnet8", "cifar10", partial(build_resnet8, width=32, stem_strides=2), epochs=20, augment=True)
"""ResNet8 of twice the width behind a stem of stride 2: 309 thousand parameters."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10.npz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained net and of the runs")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--validate", action="store_true", help="test on held-out training images; nothing is kept")
    parser.add_argument("--quick", action="store_true", help="smoke test: few samples, one epoch; nothing is kept")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> Arrays:
    """Return the samples; the last training images are test images where settings are chosen."""
    arrays = load_arrays(NET, arguments.data)
    x, y = arrays.x_train, arrays.y_train
    if arguments.quick:
        return Arrays(x[:2000], y[:2000], arrays.x_test[:500], arrays.y_test[:500])
    if arguments.validate:
        return Arrays(x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:])
    return arrays


def run_recipe(name: str, model: Path, data: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one recipe and return what its int8 file holds beside the float one."""
    import compress

    passes = [dict(each) | ({"epochs": 1} if arguments.quick else {}) for each in RECIPES[name]]
    recipe = {
        "schema": "bmcompress/recipe/v1",
        "name": name.replace(" + ", "-"),
        "seed": 1,
        "model": {"path": str(model)},
        "data": f"npz:{data}",
        "passes": passes,
        "exports": [{"format": "tflite"}],
    }
    run = compress.run(recipe, work / f"run-{recipe['name']}")
    results = {Path(result.file).name: result for result in run.manifest.benchmark.results}
    small, plain = results["model.tflite"], results["00-input.tflite"]
    drop = small.quality["accuracy"].drop
    pruned = next(run.directory.glob("01-prune.keras"))
    return {
        "recipe": name,
        "float_accuracy_percent": round(100 * plain.quality["accuracy"].value, 2),
        "accuracy_percent": round(100 * small.quality["accuracy"].value, 2),
        "change_pp": round(-100 * drop.value, 2),
        "change_ci95_pp": sorted(round(-100 * value, 2) for value in drop.ci95),
        "float_bytes": plain.size.file_bytes,
        "bytes": small.size.file_bytes,
        "float_gzip_bytes": plain.size.gzip_bytes,
        "gzip_bytes": small.size.gzip_bytes,
        "gzip_ratio": round(small.size.gzip_bytes / plain.size.gzip_bytes, 4),
        "zstd_bytes": small.size.zstd_bytes,
        "sparsity_in_file": round(small.size.sparsity, 4),
        "distinct_in_a_kernel_at_most": max(kernel.distinct for kernel in small.size.kernels),
        "pruned_weights_still_zero_percent": zeros_kept(pruned, run.artifacts["tflite"]),
        "latency_ratio": round(small.latency[0].ratio, 3),
    }


def zeros_kept(pruned: Path, file: Path) -> float:
    """Return how many percent of the weights that pruning set to zero are zero in the int8 file, place by place."""
    import keras
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file))
    stored = []
    for details in interpreter.get_tensor_details():
        try:
            values = interpreter.get_tensor(details["index"])
        except ValueError:  # computed, not stored
            continue
        if values.dtype == np.int8 and values.ndim >= 2:
            stored.append(values)
    zeros = kept = 0
    for layer in keras.saving.load_model(pruned, compile=False).layers:
        if not hasattr(layer, "kernel"):
            continue
        kernel = np.asarray(layer.kernel)
        kernel = np.moveaxis(kernel, -1, 0)  # TFLite has the outputs first
        places = kernel == 0
        fitting = [values for values in stored if values.shape == kernel.shape]
        # Layers of one shape are told apart by their values: the right one has the same signs, or all of them turned.
        best = max(fitting, key=lambda values: abs(_signs(kernel, values)))
        zeros, kept = zeros + int(places.sum()), kept + int((best[places] == 0).sum())
    return 100 * kept / zeros


def _signs(kernel: np.ndarray, values: np.ndarray) -> float:
    """Return how well signs agree, whatever the sign of the factor that batch norm gave each output."""
    products = np.sign(kernel) * np.sign(values.astype("int32"))
    return float(np.abs(products.reshape(len(kernel), -1).sum(axis=1)).sum())


def main() -> None:
    arguments = parse_arguments()
    from reporting import describe_machine, write_results

    kept = not (arguments.quick or arguments.validate)
    work = arguments.work / ("demo" if kept else "demo-quick" if arguments.quick else "demo-validate")
    work.mkdir(parents=True, exist_ok=True)
    arrays = load(arguments)
    model, facts = ensure_net(NET, arrays, work, epochs=1 if arguments.quick else None)
    print(facts, file=sys.stderr, flush=True)
    data = work / "data.npz"
    if not data.exists():  # the images and one random variant of each
        random = np.random.default_rng(1)
        x = np.concatenate([arrays.x_train, augment_images(arrays.x_train, random)])
        y = np.tile(arrays.y_train, 2)
        np.savez(data, x_train=x, y_train=y, x_test=arrays.x_test, y_test=arrays.y_test)
    machine = describe_machine()
    rows = [run_recipe(name, model, data, work, arguments) for name in arguments.recipes]
    report = {
        "command": "python benchmarks/compression_demo.py --data DATA --work WORK",
        "goal": GOALS,
        "settings": {"prune": PRUNE, "cluster": CLUSTER, "qat": QAT},
        "net": facts,
        "machine": machine,
        "rows": rows,
    }
    write_results("compression_demo", report, write=kept)


if __name__ == "__main__":
    main()
