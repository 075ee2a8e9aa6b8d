"""Channel pruning on every network of keras.applications: is it right, and how long do graph and rebuild take.

Weights and batch-norm statistics are random. `difference` is between the narrow model and the original with the removed
channels silenced; half of every group goes, drawn at random. Every narrow model is saved and loaded by a process that
has no bmcompress. Seconds of `rebuild` and `clone_model` take turns.

    python benchmarks/channel_groups.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
import numpy as np
from reporting import describe_machine, write_results

import compress
from compress.channels.groups import find_channel_groups
from compress.channels.rebuild import narrow, silence
from compress.channels.selection import choose_units
from compress.models.equivalence import check_equal

GOAL = "difference <= 1e-4; groups < 2 s; rebuild of the one with most layers / clone_model <= 1.5"
NAMES = [name for name in sorted(dir(keras.applications)) if callable(getattr(keras.applications, name))]
SIZES = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}
LOADS = """
import sys
import keras, numpy as np
for path in sys.argv[1:]:
    model = keras.saving.load_model(path)
    shape = (1, *model.input_shape[1:])
    x = np.random.default_rng(1).standard_normal(shape, dtype="float32")
    np.testing.assert_allclose(model(x), np.load(path + ".npy"), rtol=1e-3, atol=1e-4)
    assert "compress" not in sys.modules
    print("loaded", path, flush=True)
"""


def build(name: str) -> keras.Model:
    """Return a network with random weights and trained-like statistics of batch normalisation."""
    size = SIZES.get(name, 64)
    options: dict[str, Any] = {"weights": None, "classes": 10, "classifier_activation": None}
    model = getattr(keras.applications, name)(input_shape=(size, size, 3), **options)
    generator = np.random.default_rng(0)
    for variable in model.variables:
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(generator.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean", "bias"):
            variable.assign(generator.normal(0, 0.3, variable.shape))
    # Statistics of the model's own activations: otherwise the signal dies on its way, and any two inputs look alike.
    compress.reestimate_batch_norm(model, generator.standard_normal((16, size, size, 3), dtype="float32"))
    return model


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def _samples(model: keras.Model) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((8, *model.input_shape[1:]), dtype="float32")


def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the row of one network."""
    model = build(name)
    groups, first = timed(lambda: find_channel_groups(model))
    seconds = [first, *(timed(lambda: find_channel_groups(model))[1] for _ in range(rounds - 1))]
    units = [unit for group in groups.groups for block in group.blocks for unit in block.units.tolist()]
    scores = dict(zip(units, np.random.default_rng(0).random(len(units)).tolist(), strict=True))
    removed = choose_units(groups.groups, scores, 0.5, together=False, multiple_of=1, minimum=1)
    rebuilds, clones = [], []
    for _ in range(rounds):
        narrowed, own = timed(lambda: narrow(groups, removed))
        rebuilds.append(own)
        clones.append(timed(lambda: keras.models.clone_model(model))[1])
    difference = check_equal(narrowed, silence(groups, removed))
    path = folder / f"{name}.keras"
    narrowed.save(path)
    x = np.random.default_rng(1).standard_normal((1, *model.input_shape[1:]), dtype="float32")
    np.save(f"{path}.npy", narrowed(x))
    return {
        "network": name,
        "layers": len(model.layers),
        "parameters_million": round(model.count_params() / 1e6, 1),
        "left": round(narrowed.count_params() / model.count_params(), 3),
        "groups": len(groups.groups),
        "frozen_layers": len(groups.frozen),
        "spread_of_outputs": float(f"{np.asarray(model(_samples(model))).std(0).mean():.1e}"),
        "difference": float(f"{difference:.1e}"),
        "groups_s": round(float(np.median(seconds)), 2),
        "rebuild_s": round(float(np.median(rebuilds)), 2),
        "clone_model_s": round(float(np.median(clones)), 2),
        "rebuild_ratio": round(float(np.median(np.divide(rebuilds, clones))), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each (default: 3)")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.networks:
        with tempfile.TemporaryDirectory() as work:
            row = measure(name, Path(work), arguments.rounds)
            files = [str(path) for path in Path(work).glob("*.keras")]
            done = subprocess.run([sys.executable, "-c", LOADS, *files], cwd=work, check=False, capture_output=True)
            row["loads_elsewhere"] = done.returncode == 0
        keras.backend.clear_session()
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    slowest = max(rows, key=lambda row: row["layers"])
    report = {
        "goal": GOAL,
        "machine": describe_machine(),
        "largest_difference": max(row["difference"] for row in rows),
        "most_layers": slowest["network"],
        "misses": [row["network"] for row in rows if row["difference"] > 1e-4 or not row["loads_elsewhere"]]
        + [row["network"] for row in rows if row["groups_s"] >= 2]
        + [slowest["network"] for _ in range(slowest["rebuild_ratio"] > 1.5)],
        "rows": rows,
    }
    write_results("channel_groups", report, write=arguments.networks == NAMES)


if __name__ == "__main__":
    main()
