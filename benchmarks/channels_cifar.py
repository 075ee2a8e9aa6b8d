"""Channel pruning on CIFAR-10: what a ResNet-20 loses at half its MACs, and a quarter against training from scratch.

The net follows He et al. 2016 (arXiv:1512.03385): three stages of three blocks. Every variant of a seed starts from the
same trained weights and gets the same epochs, samples, optimizer and learning rates; accuracy is of the test images.

    python benchmarks/channels_cifar.py --data DATA --work WORK
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from quantization_nets import Arrays, Net, _conv_norm, load_arrays
from reporting import describe_machine, write_results
from scipy import stats

GOAL = "half: mean loss of `ours` <= 0.5 points and less than of `plain_l1`; quarter: `distilled` above `scratch`"
BATCH_SIZE = 128
RATE = 3e-3
COLUMNS = ("seed", "variant", "macs", "parameters", "accuracy_before_training_percent", "accuracy_percent")
VARIANTS = ("half_ours", "half_plain_l1", "quarter_distilled", "quarter_scratch")


def build_resnet20(k: Any, shape: tuple[int, ...]) -> Any:
    """Return the net for images of 32x32: 272 thousand parameters."""
    inputs = k.Input(shape)
    x = _conv_norm(k, inputs, 16, 3)
    for filters, block in itertools.product((16, 32, 64), range(3)):
        strides = 2 if filters > 16 and block == 0 else 1
        y = _conv_norm(k, x, filters, 3, strides)
        y = _conv_norm(k, y, filters, 3, relu=False)
        if strides > 1:
            x = _conv_norm(k, x, filters, 1, strides, relu=False)
        x = k.layers.ReLU()(k.layers.Add()([x, y]))
    x = k.layers.GlobalAveragePooling2D()(x)
    return k.Model(inputs, k.layers.Dense(10)(x), name="resnet20")


NET = Net("cifar_resnet20", "cifar10", build_resnet20, epochs=20, learning_rate=RATE, augment=True)


def augmented(x: np.ndarray, seed: int) -> np.ndarray:
    """Return the images, each flipped or not and shifted by up to 4 places at random."""
    generator = np.random.default_rng(seed)
    flip = generator.random(len(x)) < 0.5
    padded = np.pad(np.where(flip[:, None, None, None], x[:, :, ::-1], x), ((0, 0), (4, 4), (4, 4), (0, 0)))
    down, right = generator.integers(0, 9, (2, len(x)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, x.shape[1:3], (1, 2))
    return np.moveaxis(windows[np.arange(len(x)), down, right], 1, -1)


def fit(model: Any, arrays: Arrays, epochs: int, rate: float, seed: int, teacher: Any = None) -> None:
    """Train with labels, or by a teacher and labels: Adam along half a cosine to 0."""
    import keras

    import compress
    from compress.training.options import Training

    keras.utils.set_random_seed(seed)
    seeds = [1000 * seed + epoch for epoch in range(epochs)]
    schedule = keras.optimizers.schedules.CosineDecay(rate, -(-len(arrays.y_train) // BATCH_SIZE) * epochs)
    model.compile(keras.optimizers.Adam(schedule), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    if teacher is not None:  # all epochs as one, so that each sees other images
        x = np.empty((epochs * len(arrays.x_train), *arrays.x_train.shape[1:]), arrays.x_train.dtype)
        for place, each in enumerate(seeds):
            x[place * len(arrays.x_train) :][: len(arrays.x_train)] = augmented(arrays.x_train, each)
        training = Training(epochs=1, batch_size=BATCH_SIZE, learning_rate=rate)
        compress.distill(model, teacher, compress.as_data((x, np.tile(arrays.y_train, epochs))), training=training)
        return
    for each in seeds:
        model.fit(augmented(arrays.x_train, each), arrays.y_train, batch_size=BATCH_SIZE, verbose=0)


def accuracy(model: Any, arrays: Arrays) -> float:
    """Return the accuracy in per cent."""
    return 100 * float((model.predict(arrays.x_test, batch_size=500, verbose=0).argmax(1) == arrays.y_test).mean())


def plain_l1(weight: Any, rows: np.ndarray, gradients: Any) -> np.ndarray | None:
    """Score as Li et al. 2016 (arXiv:1608.08710) do: the filter that makes the channel, and nothing else."""
    return np.abs(rows).sum(axis=1) if weight.role == "makes" and len(weight.variable.shape) > 1 else None


def choose_options(variant: str, arguments: argparse.Namespace, arrays: Arrays) -> dict[str, Any]:
    """Return how a variant is pruned."""
    if variant == "half_plain_l1":
        # Its own ranking takes so much from the wide streams that multiples of 4 do not land near the target.
        return {"importance": plain_l1, "normalize": False, "ranking": "global", "multiple_of": 1}
    options = {
        "importance": arguments.importance,
        "ranking": arguments.ranking,
        "multiple_of": arguments.multiple_of,
    }
    if arguments.importance in ("taylor", "hessian", "activation"):
        options["data"] = (arrays.x_train[:1024], arrays.y_train[:1024])
    return options


def run_seed(seed: int, arguments: argparse.Namespace) -> None:
    """Train the net and all variants of one seed on one thread, and write their accuracies."""
    import keras
    import tensorflow as tf

    import compress
    from compress.channels.costs import CostModel
    from compress.channels.groups import find_channel_groups

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    arrays = load_arrays(NET, arguments.data)
    arrays = Arrays(arrays.x_train[: arguments.train], arrays.y_train[: arguments.train], arrays.x_test, arrays.y_test)
    keras.utils.set_random_seed(seed)
    file = arguments.work / f"resnet20-{seed}-{arguments.epochs}x{arguments.train}.keras"
    if not file.exists():
        net = build_resnet20(keras, arrays.x_train.shape[1:])
        fit(net, arrays, arguments.epochs, RATE, seed)
        net.save(file)
    net = keras.saving.load_model(file, compile=False)
    whole = CostModel(find_channel_groups(net), "macs").measure(())
    path = arguments.work / f"channels-cifar-{seed}.json"
    rows = json.loads(path.read_text()) if arguments.reuse and path.exists() else []
    done = {row["variant"] for row in rows}
    if "float" not in done:
        rows.append({"seed": seed, "variant": "float", "macs": 1.0, "accuracy_percent": accuracy(net, arrays)})

    def note(variant: str, model: Any, start: float, before: float | None) -> None:
        macs = CostModel(find_channel_groups(model), "macs").measure(()) / whole
        row = {"seed": seed, "variant": variant, "macs": round(macs, 4), "parameters": model.count_params()}
        row |= {"accuracy_before_training_percent": before, "accuracy_percent": accuracy(model, arrays)}
        rows.append(row)
        path.write_text(json.dumps(rows))
        print(f"{row} {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    for variant in VARIANTS:
        if variant in done:
            continue
        start = time.perf_counter()
        left = 0.5 if variant.startswith("half") else 0.25
        options = choose_options(variant, arguments, arrays)
        net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        narrow = compress.prune_channels(net, target={"macs": left}, **options).model
        if variant == "quarter_scratch":
            keras.utils.set_random_seed(100 + seed)
            narrow = keras.models.clone_model(narrow)
            fit(narrow, arrays, arguments.tuning_epochs, RATE, seed)
            note(variant, narrow, start, None)
            continue
        compress.reestimate_batch_norm(narrow, (arrays.x_train[:2048], arrays.y_train[:2048]))
        before = accuracy(narrow, arrays)
        teacher = net if variant == "quarter_distilled" else None
        fit(narrow, arrays, arguments.tuning_epochs, RATE, seed, teacher)
        note(variant, narrow, start, before)


def difference(rows: list[dict[str, Any]], first: str, second: str) -> dict[str, Any]:
    """Return the mean difference of accuracies over the seeds with its 95 % t interval, in points."""
    by_variant = {
        name: {row["seed"]: row["accuracy_percent"] for row in rows if row["variant"] == name}
        for name in (first, second)
    }
    values = np.array([by_variant[first][seed] - by_variant[second][seed] for seed in by_variant[first]])
    found = {"difference": f"{first} - {second}", "by_seed_pp": values.round(2).tolist()}
    found["mean_pp"] = round(float(values.mean()), 2)
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
        found["ci95_pp"] = [round(float(values.mean() - half), 2), round(float(values.mean() + half), 2)]
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10.npz")
    parser.add_argument("--work", type=Path, required=True, help="folder of trained nets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20, help="of the first training (default: 20)")
    parser.add_argument("--tuning-epochs", type=int, default=16, help="of each training after it (default: 16)")
    parser.add_argument("--train", type=int, default=20000, help="training images at most (default: 20000)")
    parser.add_argument("--importance", default="l2", help="score of our variants (default: l2)")
    parser.add_argument("--ranking", default="local", choices=["local", "global"], help="of our variants")
    parser.add_argument("--multiple-of", type=int, default=4, help="to which widths are rounded (default: 4)")
    parser.add_argument("--processes", type=int, default=2, help="seeds at the same time (default: 2)")
    parser.add_argument("--reuse", action="store_true", help="keep the rows that an earlier run left in --work")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # the child process of one seed
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.seed is not None:
        run_seed(arguments.seed, arguments)
        return

    def start(seed: int) -> None:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--seed", str(seed)], check=True)

    with ThreadPoolExecutor(arguments.processes) as pool:
        list(pool.map(start, arguments.seeds))
    rows = [
        {column: row.get(column) for column in COLUMNS}
        for seed in arguments.seeds
        for row in json.loads((arguments.work / f"channels-cifar-{seed}.json").read_text())
    ]
    seeds = " ".join(map(str, arguments.seeds))
    settings = {key: value for key, value in vars(arguments).items() if key not in ("data", "work", "seed", "reuse")}
    report = {
        "command": f"python benchmarks/channels_cifar.py --data DATA --work WORK --seeds {seeds}",
        "goal": GOAL,
        "settings": settings | {"batch_size": BATCH_SIZE, "learning_rate": RATE},
        "machine": describe_machine(),
        "differences": [
            difference(rows, "half_ours", "float"),
            difference(rows, "half_plain_l1", "float"),
            difference(rows, "half_ours", "half_plain_l1"),
            difference(rows, "quarter_distilled", "quarter_scratch"),
        ],
        "rows": rows,
    }
    write_results("channels_cifar", report)


if __name__ == "__main__":
    main()
