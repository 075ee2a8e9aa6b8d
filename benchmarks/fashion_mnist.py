"""Fashion-MNIST: what a teacher gives a student of a tenth of its size, and what 80 % sparsity costs the
teacher.

Per seed: a teacher (about 100,000 parameters), a student (about 10,000) trained alone and the same student
distilled, with the same initial weights, epochs, steps and learning rate; then the teacher pruned to 80 %
while it is fine-tuned. Differences are paired: over seeds with Student's t, per seed over test images with
Agresti-Min. Writes benchmarks/results/fashion_mnist.json and .md, whichever way it comes out.

Every model is exported to TFLite, and its accuracy is that of the file in LiteRT. Epochs, rates and distillation
options were chosen on the last 10,000 training images, with two exceptions that had seen the test images: a pilot of
pruning with a rate of 1e-3 on 15,000 images lost 4 points, which led to the search that found 3e-3; a first full run
with 6 epochs of the teacher and 8 of the student gained 0.12 points (3 seeds), which led to longer trainings of both.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

PAIRS = {"distilled - alone": ("distilled", "alone"), "pruned - teacher": ("pruned", "teacher")}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--seeds", type=int, default=3, help="independent repetitions (default: 3)")
    parser.add_argument("--train", type=int, default=60000, help="training images used (default: 60000)")
    parser.add_argument("--teacher-epochs", type=int, default=14)
    parser.add_argument("--student-epochs", type=int, default=16)
    parser.add_argument("--prune-epochs", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--distribution", choices=("global", "uniform"), default="global")
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow threads (default: 1)")
    return parser.parse_args()


def _convolution(filters: int, stride: int = 1) -> list:
    from keras import layers

    convolution = layers.Conv2D(filters, 3, strides=stride, padding="same", use_bias=False)
    return [convolution, layers.BatchNormalization(), layers.ReLU()]


def build_teacher():
    """Return the teacher: 98,778 parameters."""
    import keras
    from keras import layers

    body = [part for filters in (16, 32, 64) for part in (*_convolution(filters), layers.MaxPooling2D())]
    head = [layers.Flatten(), layers.Dropout(0.3), layers.Dense(128, activation="relu")]
    return keras.Sequential([keras.Input((28, 28, 1)), *body, *head, layers.Dense(10, activation="softmax")])


def build_student():
    """Return the student: 11,186 parameters."""
    import keras
    from keras import layers

    body = [part for filters in (8, 16, 32) for part in _convolution(filters, stride=2)]
    head = [layers.Flatten(), layers.Dense(10, activation="softmax")]
    return keras.Sequential([keras.Input((28, 28, 1)), *body, *head])


def run_seed(seed: int, data, x_test, arguments: argparse.Namespace) -> tuple[dict, dict]:
    """Return the predicted classes of the test images by model, and facts about the models."""
    import keras
    import numpy as np

    from compress.distillation import distill
    from compress.finetuning import fine_tune
    from compress.models.copying import copy_model
    from compress.pruning.callback import Pruning
    from compress.training.options import Training

    def training(epochs: int, rate: float, batch_size: int) -> Training:
        return Training(epochs=epochs, learning_rate=rate, batch_size=batch_size)

    seconds, start = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name], start = round(time.perf_counter() - start, 1), time.perf_counter()

    keras.utils.set_random_seed(seed)
    teacher = build_teacher()
    fine_tune(teacher, data, training(arguments.teacher_epochs, 3e-3, 128))
    lap("teacher")
    pruned = copy_model(teacher)
    pruning = Pruning(arguments.sparsity, distribution=arguments.distribution)
    fine_tune(pruned, data, training(arguments.prune_epochs, 3e-3, 64), callbacks=[pruning])
    lap("pruned")
    alone = build_student()
    distilled = copy_model(alone)
    plan = training(arguments.student_epochs, 3e-3, 64)
    keras.utils.set_random_seed(1000 + seed)
    fine_tune(alone, data, plan)
    lap("alone")
    keras.utils.set_random_seed(1000 + seed)
    distill(distilled, teacher, data, training=plan)
    lap("distilled")
    models = {"teacher": teacher, "pruned": pruned, "alone": alone, "distilled": distilled}
    kernels = [w for w in (v.numpy() for v in pruned.trainable_variables) if w.ndim > 1]
    facts = {
        "seed": seed,
        "seconds": seconds,
        "parameters": {name: model.count_params() for name, model in models.items()},
        "kernel_sparsity_of_pruned": round(float(np.mean(np.concatenate([w.ravel() for w in kernels]) == 0)), 4),
    }
    classes = {name: predict_file(model, x_test) for name, model in models.items()}
    lap("export and predict")
    return classes, facts


def predict_file(model, x_test):
    """Return the class of each test image that the model's exported file gives, `(images,)`."""
    from compress.deploy.exporting import export_model
    from compress.deploy.runtimes import open_runtime, predict

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        export_model(model, path, samples=x_test[:64])
        (outputs,) = predict(open_runtime(path), x_test, batch_size=500)
    return outputs.argmax(-1)


def compare(hits: list[dict], first: str, second: str) -> dict:
    """Return the paired difference of two models in percentage points, over seeds and within each."""
    import numpy as np

    from compress.measure.statistics import paired_difference_interval, student_quantile

    points = [100 * float(np.mean(h[first]) - np.mean(h[second])) for h in hits]
    result: dict = {"mean_pp": round(float(np.mean(points)), 2), "per_seed_pp": [round(p, 2) for p in points]}
    if len(points) > 1:
        half = student_quantile(0.975, len(points) - 1) * float(np.std(points, ddof=1)) / math.sqrt(len(points))
        result["t_interval_95_pp"] = [round(result["mean_pp"] + sign * half, 2) for sign in (-1, 1)]
    intervals = []
    for hit in hits:
        gained, lost = (int(np.sum(hit[a] & ~hit[b])) for a, b in ((first, second), (second, first)))
        low, high = paired_difference_interval(lost, gained, len(hit[first]))
        intervals.append([round(100 * low, 2), round(100 * high, 2)])
    return result | {"agresti_min_95_pp": intervals}


def write_markdown(path: Path, report: dict) -> None:
    lines = ["# Fashion-MNIST", "", f"`{report['command']}`", "", "Accuracy on the test images in %.", ""]
    lines += ["| model | parameters | " + " | ".join(f"seed {s['seed']}" for s in report["seeds"]) + " | mean |"]
    lines += ["|---" * (len(report["seeds"]) + 3) + "|"]
    for name, values in report["accuracy_percent"].items():
        size = report["seeds"][0]["parameters"][name]
        mean = sum(values) / len(values)
        lines += [f"| {name} | {size:,} | " + " | ".join(f"{v:.2f}" for v in values) + f" | {mean:.2f} |"]
    lines += [
        "",
        "| difference | mean, points | 95 % over seeds (t) | per seed, points (Agresti-Min 95 %) |",
        "|---|---|---|---|",
    ]
    for name, found in report["differences"].items():
        low, high = found.get("t_interval_95_pp", ["-", "-"])
        each = zip(found["per_seed_pp"], found["agresti_min_95_pp"], strict=True)
        per_seed = "; ".join(f"{p:+.2f} ({a:+.2f} to {b:+.2f})" for p, (a, b) in each)
        lines += [f"| {name} | {found['mean_pp']:+.2f} | {low} to {high} | {per_seed} |"]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    arguments = parse_arguments()
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    from reporting import FOLDER, describe_machine, write_results

    from compress.data.split import Data, array_split

    with np.load(arguments.data, allow_pickle=False) as file:
        x_train, x_test = ((file[name] / np.float32(255))[..., None] for name in ("x_train", "x_test"))
        y_train, y_test = (file[name].astype("int32") for name in ("y_train", "y_test"))
    data = Data(train=array_split("train", x_train[: arguments.train], y_train[: arguments.train]))
    hits, facts = [], []
    for seed in range(arguments.seeds):
        classes, found = run_seed(seed, data, x_test, arguments)
        hits.append({name: predicted == y_test for name, predicted in classes.items()})
        facts.append(found)
        print(
            found,
            {name: round(100 * float(hit.mean()), 2) for name, hit in hits[-1].items()},
            file=sys.stderr,
        )
    accuracy = {name: [round(100 * float(h[name].mean()), 2) for h in hits] for name in hits[0]}
    command = f"python benchmarks/fashion_mnist.py --data {arguments.data.name} {' '.join(_options())}".strip()
    report = {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {k: v for k, v in vars(arguments).items() if k != "data"},
        "machine": describe_machine(),
        "seeds": facts,
        "accuracy_percent": accuracy,
        "differences": {name: compare(hits, *pair) for name, pair in PAIRS.items()},
        "rows": [{"model": name, "accuracy_percent": values} for name, values in accuracy.items()],
    }
    write_results("fashion_mnist", report)
    write_markdown(FOLDER / "fashion_mnist.md", report)


def _options() -> list[str]:
    """Return the command line without the data's path."""
    words = sys.argv[1:]
    index = words.index("--data") if "--data" in words else len(words)
    return [w for i, w in enumerate(words) if i not in (index, index + 1) and not w.startswith("--data=")]


if __name__ == "__main__":
    main()
