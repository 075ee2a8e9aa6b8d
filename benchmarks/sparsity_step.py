"""What pruning and clustering add to a training: `fit` with their callbacks against plain `fit`, beside tfmot's.

Short trainings of the same weights and data in one process per backend, in turns whose order alternates; updates of
masks and clusters are included, what compiles the step is not. tfmot wraps the equivalent tf_keras model and is held
against plain tf_keras. Goal: at most 1.05 times plain fit in CPU time.

    python benchmarks/sparsity_step.py

Writes benchmarks/results/sparsity_step.json. JAX is measured where it is installed (`pip install ".[jax]"`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # tfmot takes tf.keras for tf_keras; compress uses keras
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

GOAL = 1.05
WARM_UP = 4  # steps of each training that are not counted: compilation
MODELS = ("cnn", "mlp")
Times = tuple[float, float]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="trainings of each kind (default: 7)")
    parser.add_argument("--steps", type=int, default=200, help="of one training (default: 200)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backends", nargs="+", choices=("tensorflow", "jax"), default=["tensorflow", "jax"])
    parser.add_argument("--quick", action="store_true", help="smoke test; results are not kept")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 2, 30
    return arguments


def build_model(k: Any, name: str) -> Any:
    """Return a classifier of 28x28 images: `cnn` is bound by computation, `mlp` by the weights."""
    layers = k.layers
    if name == "cnn":
        body = [layers.Conv2D(16, 3, activation="relu"), layers.Conv2D(32, 3, strides=2, activation="relu")]
        body += [layers.Conv2D(64, 3, strides=2, activation="relu"), layers.Flatten()]
    else:
        body = [layers.Flatten(), layers.Dense(512, activation="relu"), layers.Dense(256, activation="relu")]
    return k.Sequential([k.Input((28, 28, 1)), *body, layers.Dense(10)])


def make_clock(k: Any) -> Any:
    """Return a callback that notes the seconds of a training, wall and CPU, after its first steps."""

    class Clock(k.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == WARM_UP:
                self.start = time.perf_counter(), time.process_time()

        def on_train_end(self, logs: Any = None) -> None:
            self.seconds = time.perf_counter() - self.start[0], time.process_time() - self.start[1]

    return Clock()


def train(k: Any, model: Any, data: Any, arguments: argparse.Namespace, callbacks: list[Any]) -> Times:
    clock = make_clock(k)
    model.fit(*data, batch_size=arguments.batch_size, verbose=0, callbacks=[*callbacks, clock])
    return clock.seconds


def our_kinds(name: str, data: Any, arguments: argparse.Namespace, jit: bool) -> dict[str, Callable[[], Times]]:
    """Return trainings of one Keras model: plain, pruned, clustered."""
    import keras

    from compress.clustering.callback import Clustering
    from compress.pruning.callback import Pruning

    model = build_model(keras, name)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=jit)
    weights = model.get_weights()

    def run(make_callbacks: Callable[[], list[Any]]) -> Times:
        model.set_weights(weights)
        model.make_train_function(force=True)  # all kinds of training compile their step anew
        return train(keras, model, data, arguments, make_callbacks())

    return {
        "plain": lambda: run(list),
        "prune": lambda: run(lambda: [Pruning(arguments.sparsity)]),
        "cluster": lambda: run(lambda: [Clustering(arguments.clusters)]),
    }


def tfmot_kinds(name: str, data: Any, arguments: argparse.Namespace, jit: bool) -> dict[str, Callable[[], Times]]:
    """Return the same of tf_keras and tfmot."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    sparsity, clustering = tfmot.sparsity.keras, tfmot.clustering.keras

    def prepare(wrap: Callable[[Any], Any], make_callbacks: Callable[[], list[Any]]) -> Callable[[], Times]:
        model = wrap(build_model(tf_keras, name))
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, jit_compile=jit)
        return lambda: train(tf_keras, model, data, arguments, make_callbacks())

    schedule = sparsity.PolynomialDecay(0.0, arguments.sparsity, 0, round(0.7 * arguments.steps), frequency=20)
    kinds = {"plain": prepare(lambda model: model, list)}
    kinds["prune"] = prepare(
        lambda model: sparsity.prune_low_magnitude(model, schedule), lambda: [sparsity.UpdatePruningStep()]
    )
    kinds["cluster"] = prepare(
        lambda model: clustering.cluster_weights(
            model, arguments.clusters, clustering.CentroidInitialization.KMEANS_PLUS_PLUS
        ),
        list,
    )
    return kinds


def compare(name: str, tool: str, jit: bool, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per kind and clock."""
    random, count = np.random.default_rng(0), arguments.steps * arguments.batch_size
    data = random.random((count, 28, 28, 1), np.float32), random.integers(0, 10, count)
    kinds = (our_kinds if tool == "bmcompress" else tfmot_kinds)(name, data, arguments, jit)
    times: dict[str, list[Times]] = {kind: [] for kind in kinds}
    failed: dict[str, str] = {}
    for turn in range(-1, arguments.rounds):  # the first turn warms up
        for kind in list(kinds) if turn % 2 else list(kinds)[::-1]:
            try:
                seconds = kinds[kind]() if kind not in failed else None
            except Exception as error:  # a peer that cannot do it is a result
                failed[kind] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
                continue
            if turn >= 0 and seconds:
                times[kind].append(seconds)
    head = {"tool": tool, "backend": os.environ["KERAS_BACKEND"], "model": name, "jit": jit}
    rows = []
    for kind in [each for each in kinds if each != "plain"]:
        if kind in failed:
            rows.append(head | {"kind": kind, "plain_cpu_ms": "", "cpu_ratio": f"failed: {failed[kind]}"})
            continue
        ratios = [[own[i] / plain[i] for own, plain in zip(times[kind], times["plain"], strict=True)] for i in (0, 1)]
        plain_ms = 1000 * statistics.median(cpu for _, cpu in times["plain"]) / (arguments.steps - WARM_UP - 1)
        measured = {
            "plain_cpu_ms": round(plain_ms, 3),
            "cpu_ratio": round(statistics.median(ratios[1]), 3),
            "quartiles": [round(float(np.quantile(ratios[1], q)), 3) for q in (0.25, 0.75)],
            "wall_ratio": round(statistics.median(ratios[0]), 3),
        }
        rows.append(head | {"kind": kind} | measured)
    return rows


def measure_backend(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in arguments.models:
        if os.environ["KERAS_BACKEND"] == "jax":
            rows += compare(name, "bmcompress", True, arguments)
            continue
        for jit in (False, True):
            for tool in ("bmcompress", "tfmot"):
                rows += compare(name, tool, jit, arguments)
    return rows


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measure_backend(arguments)))
        return
    from reporting import describe_machine, write_results

    machine, rows = describe_machine(), []
    for backend in arguments.backends:
        if importlib.util.find_spec(backend) is None:
            print(f"{backend} is not installed: not measured")
            continue
        child = subprocess.run(
            [sys.executable, __file__, "--child", *sys.argv[1:]],
            env=os.environ | {"KERAS_BACKEND": backend},
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise SystemExit(f"{backend}: exit {child.returncode}: {child.stderr[-2000:]}")
        rows += json.loads(child.stdout.splitlines()[-1])
    settings = {key: getattr(arguments, key) for key in ("rounds", "steps", "batch_size", "sparsity", "clusters")}
    report = {"goal": {"cpu_ratio": GOAL}, "settings": settings, "machine": machine, "rows": rows}
    write_results("sparsity_step", report, write=not arguments.quick)


if __name__ == "__main__":
    main()
