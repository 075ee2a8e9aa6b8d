"""What distillation costs: one of its steps against a plain student step plus the teacher's forward pass.

`arrays` is data in memory, where the teacher runs once before training; `stream` is a dataset that is read
as it comes, where the teacher runs in each step. Trainings of one process, interleaved in changing order;
medians. Prints a table and writes benchmarks/results/distillation_step.json. Goal: at most 1.1 times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

GOAL = 1.1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (default: 11)")
    parser.add_argument("--samples", type=int, default=6400, help="samples per training (default: 6400)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples per step (default: 64)")
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow threads (default: 1)")
    return parser.parse_args()


def build_model(*filters: int):
    """Return a classifier of 28x28 images with a softmax head."""
    import keras
    from keras import layers

    body = []
    for count in filters:
        body += [layers.Conv2D(count, 3, strides=2, padding="same", use_bias=False)]
        body += [layers.BatchNormalization(), layers.ReLU()]
    head = [layers.Flatten(), layers.Dense(10, activation="softmax")]
    return keras.Sequential([keras.Input((28, 28, 1)), *body, *head])


def make_clock():
    """Return a callback that times the steps after the first, which compiles."""
    import keras

    class Clock(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.start, self.steps = None, 0

        def on_train_batch_end(self, batch, logs=None):
            if self.start is None:
                self.start = time.perf_counter(), time.process_time()
            else:
                self.steps += 1
                self.end = time.perf_counter(), time.process_time()

        def step_ms(self) -> tuple[float, float]:
            """Return wall and CPU milliseconds per step."""
            return tuple(1e3 * (b - a) / self.steps for a, b in zip(self.start, self.end, strict=True))

    return Clock()


def teacher_step_ms(teacher, x, batch_size: int) -> tuple[float, float]:
    """Return wall and CPU milliseconds of the teacher's forward pass over one batch."""
    teacher.predict_on_batch(x[:batch_size])
    batches = [x[start : start + batch_size] for start in range(0, len(x), batch_size)]
    start = time.perf_counter(), time.process_time()
    for batch in batches:
        teacher.predict_on_batch(batch)
    end = time.perf_counter(), time.process_time()
    return tuple(1e3 * (b - a) / len(batches) for a, b in zip(start, end, strict=True))


def run_rounds(arguments: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Return wall and CPU milliseconds per step of each kind of work, one entry per round."""
    import keras
    import numpy as np
    import tensorflow as tf

    from compress.data.split import Data, Split, array_split
    from compress.distillation import distill
    from compress.finetuning import fine_tune
    from compress.training.options import Training

    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = random.random((arguments.samples, 28, 28, 1), np.float32)
    y = random.integers(0, 10, arguments.samples)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(arguments.batch_size).prefetch(2)
    data = {
        "arrays": Data(train=array_split("train", x, y)),
        "stream": Data(train=Split("train", stream=dataset)),
    }
    teacher, student = build_model(32, 64, 128), build_model(16, 24, 32)
    training = Training(epochs=2, batch_size=arguments.batch_size)

    def train(kind: str, distilled: bool) -> tuple[float, float]:
        clock = make_clock()
        if distilled:
            distill(student, teacher, data[kind], training=training, callbacks=[clock])
        else:
            fine_tune(student, data[kind], training, callbacks=[clock])
        return clock.step_ms()

    work = {"teacher": lambda: teacher_step_ms(teacher, x, arguments.batch_size)}
    for kind in data:
        work[f"{kind}: student"] = lambda kind=kind: train(kind, False)
        work[f"{kind}: distilled"] = lambda kind=kind: train(kind, True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for number in range(-1, arguments.rounds):  # the first round warms up
        order = list(work) if number % 2 else list(work)[::-1]
        for name in order:
            found = work[name]()
            if number >= 0:
                times[name].append(found)
    return times


def main() -> None:
    arguments = parse_arguments()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    from reporting import describe_machine, write_results

    times = run_rounds(arguments)
    rows = []
    for kind in ("arrays", "stream"):
        for index, clock in enumerate(("wall", "cpu")):
            columns = [
                [entry[index] for entry in times[name]]
                for name in ("teacher", f"{kind}: student", f"{kind}: distilled")
            ]
            ratios = [distilled / (teacher + student) for teacher, student, distilled in zip(*columns, strict=True)]
            teacher_ms, student_ms, distilled_ms = (round(statistics.median(column), 3) for column in columns)
            rows.append(
                {
                    "data": kind,
                    "clock": clock,
                    "student_ms": student_ms,
                    "teacher_ms": teacher_ms,
                    "distilled_ms": distilled_ms,
                    "ratio_median": round(statistics.median(ratios), 3),
                    "ratio_min": round(min(ratios), 3),
                    "ratio_max": round(max(ratios), 3),
                }
            )
    settings = {name: getattr(arguments, name) for name in ("rounds", "samples", "batch_size", "threads")}
    write_results(
        "distillation_step",
        {"goal": {"ratio_median": GOAL}, "settings": settings, "machine": describe_machine(), "rows": rows},
    )


if __name__ == "__main__":
    main()
