"""What pruning adds to a training: `fit` with the Pruning callback against plain `fit`.

Short trainings of one model in one process, in interleaved pairs whose order alternates; mask updates are
included. Prints a table and writes benchmarks/results/pruning_step.json. Goal: at most 1.05 times plain fit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

GOAL = 1.05


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs per model (default: 15)")
    parser.add_argument("--samples", type=int, default=12800, help="training samples per epoch (default: 12800)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs per training (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, help="batch size (default: 64)")
    parser.add_argument("--sparsity", type=float, default=0.8, help="final sparsity (default: 0.8)")
    parser.add_argument("--models", nargs="+", choices=("cnn", "mlp"), default=["cnn", "mlp"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "pruning_step.json")
    return parser.parse_args()


def build_model(name: str):
    """Return a compiled classifier of 28x28 images: `cnn` is bound by computation, `mlp` by the weights."""
    import keras
    from keras import layers

    if name == "cnn":
        body = [layers.Conv2D(16, 3, activation="relu"), layers.Conv2D(32, 3, strides=2, activation="relu")]
        body += [layers.Conv2D(64, 3, strides=2, activation="relu"), layers.Flatten()]
    else:
        body = [layers.Flatten(), layers.Dense(512, activation="relu"), layers.Dense(256, activation="relu")]
    model = keras.Sequential([keras.Input((28, 28, 1)), *body, layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def measure(model, data, arguments: argparse.Namespace, pruned: bool) -> tuple[float, float]:
    """Return the wall and CPU seconds of one training, from the first step that is compiled on."""
    import keras

    from compress.pruning.callback import Pruning

    class Clock(keras.callbacks.Callback):
        """Starts after the first batch: compiling the step is a cost of once per fit, for both alike."""

        def on_train_batch_end(self, batch, logs=None):
            if not hasattr(self, "start"):
                self.start = time.perf_counter(), time.process_time()

        def on_train_end(self, logs=None):
            self.seconds = time.perf_counter() - self.start[0], time.process_time() - self.start[1]

    model.make_train_function(force=True)  # both kinds of training compile their step anew
    callbacks = [Pruning(arguments.sparsity)] if pruned else []
    clock = Clock()
    settings = {"batch_size": arguments.batch_size, "epochs": arguments.epochs, "verbose": 0}
    model.fit(*data, callbacks=[*callbacks, clock], **settings)
    return clock.seconds


def compare(name: str, arguments: argparse.Namespace) -> dict:
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    data = (
        random.random((arguments.samples, 28, 28, 1), np.float32),
        random.integers(0, 10, arguments.samples),
    )
    model = build_model(name)
    weights = model.get_weights()
    rows = []
    for pair in range(-1, arguments.pairs):  # the first pair warms up
        seconds = {}
        for pruned in (True, False) if pair % 2 else (False, True):
            model.set_weights(weights)
            seconds[pruned] = measure(model, data, arguments, pruned)
        if pair >= 0:
            rows.append({"plain": seconds[False], "pruned": seconds[True]})
    result = {"model": name, "parameters": model.count_params(), "steps": steps(arguments)}
    for index, clock in enumerate(("wall", "cpu")):
        ratios = [row["pruned"][index] / row["plain"][index] for row in rows]
        least = min(row["pruned"][index] for row in rows) / min(row["plain"][index] for row in rows)
        result[f"{clock}_ratio_median"] = round(statistics.median(ratios), 4)
        result[f"{clock}_ratio_of_minima"] = round(least, 4)
        result[f"{clock}_ratios"] = [round(ratio, 4) for ratio in ratios]
        result[f"{clock}_ms_per_step_plain"] = round(
            1000 * statistics.median(row["plain"][index] for row in rows) / steps(arguments), 4
        )
    return result


def steps(arguments: argparse.Namespace) -> int:
    return -(-arguments.samples // arguments.batch_size) * arguments.epochs


def main() -> None:
    arguments = parse_arguments()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import keras
    import tensorflow as tf

    results = [compare(name, arguments) for name in arguments.models]
    print(f"{'':20}{'plain wall':>12}{'wall ratio':>24}{'CPU ratio':>24}")
    print(f"{'model':8}{'parameters':>12}{'ms/step':>12}" + f"{'median':>12}{'of minima':>12}" * 2)
    for row in results:
        print(
            f"{row['model']:8}{row['parameters']:>12}{row['wall_ms_per_step_plain']:>12.2f}"
            f"{row['wall_ratio_median']:>12.3f}{row['wall_ratio_of_minima']:>12.3f}"
            f"{row['cpu_ratio_median']:>12.3f}{row['cpu_ratio_of_minima']:>12.3f}"
        )
    report = {
        "command": " ".join(["python", "benchmarks/pruning_step.py", *sys.argv[1:]]),
        "goal": {"cpu_ratio_median": GOAL},
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
        },
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],
        },
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
