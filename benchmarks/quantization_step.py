"""What quantization costs in time: a QAT training step, calibration, and export, each against its plain counterpart.

- A step of `fit` of the fake-quantized model, with ranges that follow batches and with learned ones, against one of the
  float model, with and without jit, and the same for tfmot in tf_keras: all in one process, a few steps of each in
  turn, in changing order. Goal: 1.15 times in CPU time, for learned ranges too.
- `calibrate` on 512 samples against `predict` over them, each on a fresh model (what a user waits for once) and once
  more on the same model. Goal: 3 times.
- Export of the fake-quantized model to both formats against the bare converters on the float one (SavedModel,
  TFLiteConverter, tf2onnx): as one fresh process each, from the `.keras` file on, and as a call in a process that is
  warm. CPU time includes child processes. Goal: 1.3 times.

    python benchmarks/quantization_step.py

Weights are random: they do not change the work. Writes benchmarks/results/quantization_step.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # tfmot takes tf.keras for tf_keras; Keras 3 is imported by its name
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from quantization_nets import build_conv1d, build_mobilenet, build_resnet8, build_transformer
from quantization_peers import annotate_known, write_saved_model


def build_cnn(k: Any, shape: tuple[int, ...]) -> Any:
    """Return three convolutions without batch norm, so that folding it cannot make up for the cost of rounding."""
    inputs = x = k.Input(shape)
    for filters in (32, 64, 64):
        x = k.layers.MaxPooling2D()(k.layers.Conv2D(filters, 3, padding="same", activation="relu")(x))
    x = k.layers.Dense(64, activation="relu")(k.layers.Flatten()(x))
    return k.Model(inputs, k.layers.Dense(10, activation="softmax")(x))


NETS = {
    "resnet8": (build_resnet8, (32, 32, 3)),
    "mobilenet": (build_mobilenet, (32, 32, 3)),
    "transformer": (build_transformer, (28, 28, 1)),
    "conv1d": (build_conv1d, (61, 40)),
    "cnn": (build_cnn, (32, 32, 3)),
}
RANGES = ("moving", "learned")
GOALS = {"step": 1.15, "calibration": 3.0, "export": 1.3}
CALIBRATION_SAMPLES = 512
Times = tuple[float, float]
"""Wall and CPU seconds."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--work", nargs="+", choices=GOALS, default=list(GOALS), help="what is measured")
    parser.add_argument("--tools", nargs="+", choices=("bmcompress", "tfmot"), default=["bmcompress", "tfmot"])
    parser.add_argument("--ranges", nargs="+", choices=RANGES, default=list(RANGES), help="of QAT steps")
    parser.add_argument("--rounds", type=int, default=15, help="of steps (default: 15)")
    parser.add_argument("--steps", type=int, default=8, help="per round and kind (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="of calibration and export (default: 5)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow threads (default: 1)")
    parser.add_argument("--quick", action="store_true", help="smoke test: one net, few rounds, not written to results")
    parser.add_argument("--export", nargs=2, help=argparse.SUPPRESS)  # the child process of one export
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.nets, arguments.rounds, arguments.steps, arguments.repeats = arguments.nets[:1], 2, 3, 1
    return arguments


def now() -> Times:
    """Return wall and CPU seconds so far, the CPU time of finished child processes included."""
    used = os.times()  # counts in hundredths, which is enough for child processes only
    return time.perf_counter(), time.process_time() + used.children_user + used.children_system


def measure(work: Callable[[], Any]) -> Times:
    start = now()
    work()
    end = now()
    return end[0] - start[0], end[1] - start[1]


def quantized(model: Any, x: np.ndarray, ranges: str = "moving") -> Any:
    """Return the fake-quantized twin of `model`, calibrated on `x`."""
    from compress.quantization.calibration import calibrate
    from compress.quantization.fake_quantization import fake_quantize

    return calibrate(fake_quantize(model, "int8", ranges=ranges), x)


def quantized_by_tfmot(model: Any) -> Any:
    """Return tfmot's twin of a tf_keras model; where it refuses the model, only layers that it knows are quantized."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    try:
        return tfmot.quantization.keras.quantize_model(model)
    except Exception:  # it refuses whole models for one layer, with several error types
        return annotate_known(tfmot, tf_keras, model)


def random_data(shape: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.random((count, *shape), np.float32), random.integers(0, 10, count)


def measure_steps(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per tool, kind of ranges, jit and clock."""
    import keras
    import tf_keras

    build, shape = NETS[name]
    x, y = random_data(shape, arguments.batch_size * arguments.steps)

    def prepare(model: Any, k: Any, jit: bool) -> Callable[[], Times]:
        model.compile(k.optimizers.Adam(1e-4), "sparse_categorical_crossentropy", jit_compile=jit)
        fit = lambda: model.fit(x, y, batch_size=arguments.batch_size, verbose=0)  # noqa: E731
        fit()  # compiles
        return lambda: measure(fit)

    rows = []
    for jit in (False, True):
        kinds = {}
        for tool, k in (("bmcompress", keras), ("tfmot", tf_keras)):
            if tool not in arguments.tools:
                continue
            k.utils.set_random_seed(0)
            model = build(k, shape)
            if k is keras:
                twins = {ranges: quantized(model, x[:64], ranges) for ranges in arguments.ranges}
            else:
                twins = {"moving": quantized_by_tfmot(model)}
            for kind, each in {"plain": model, **twins}.items():
                kinds[tool, kind] = prepare(each, k, jit)
        times: dict[Any, list[Times]] = {kind: [] for kind in kinds}
        for number in range(-1, arguments.rounds):  # the first round warms up
            for kind in list(kinds) if number % 2 else list(kinds)[::-1]:
                found = kinds[kind]()
                if number >= 0:
                    times[kind].append(found)
        for tool, ranges in kinds:
            if ranges != "plain":
                head = {"what": "step", "net": name, "tool": tool, "ranges": ranges, "jit": jit}
                rows += _rows(head, times[tool, ranges], times[tool, "plain"])
    return [row | {name: round(row[name] / arguments.steps, 3) for name in ("ms", "plain_ms")} for row in rows]


def measure_calibration(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows of `calibrate` against `predict`, for the first call on a model and for the next."""
    import keras

    from compress.quantization.calibration import calibrate
    from compress.quantization.fake_quantization import fake_quantize

    build, shape = NETS[name]
    x, _ = random_data(shape, CALIBRATION_SAMPLES)
    times: dict[str, list[Times]] = {key: [] for key in ("first", "first plain", "again", "again plain")}
    for number in range(-1, arguments.repeats):  # the first round warms up
        model = build(keras, shape)
        twin = fake_quantize(model, "int8")
        work = {"": lambda twin=twin: calibrate(twin, x), " plain": lambda m=model: m.predict(x, verbose=0)}
        for call in ("first", "again"):
            for kind in list(work) if number % 2 else list(work)[::-1]:
                found = measure(work[kind])
                if number >= 0:
                    times[f"{call}{kind}"].append(found)
    return [
        row
        for call in ("first", "again")
        for row in _rows({"what": "calibration", "net": name, "call": call}, times[call], times[f"{call} plain"])
    ]


def measure_export(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows of the export of the fake-quantized model to both formats against the bare converters."""
    import keras

    build, shape = NETS[name]
    keras.utils.set_random_seed(0)
    x, _ = random_data(shape, CALIBRATION_SAMPLES)
    model = build(keras, shape)
    twin = quantized(model, x)
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        model.save(folder / "bare.keras")
        twin.save(folder / "ours.keras")
        work = {
            "ours": lambda: convert_ours(twin, folder, x[:64]),
            "bare": lambda: convert_bare(model, folder),
            "ours fresh": lambda: run_export("ours", folder),
            "bare fresh": lambda: run_export("bare", folder),
        }
        times: dict[str, list[Times]] = {kind: [] for kind in work}
        for number in range(-1, arguments.repeats):  # the first round warms up
            for kind in list(work) if number % 2 else list(work)[::-1]:
                found = measure(work[kind])
                if number >= 0:
                    times[kind].append(found)
    return [
        row
        for call in ("", " fresh")
        for row in _rows(
            {"what": "export", "net": name, "call": "fresh process" if call else "warm process"},
            times[f"ours{call}"],
            times[f"bare{call}"],
        )
    ]


def run_export(kind: str, folder: Path) -> None:
    """Open `KIND.keras` in a fresh process and export it there."""
    subprocess.run([sys.executable, __file__, "--export", kind, str(folder)], check=True, capture_output=True)


def export_file(kind: str, folder: Path) -> None:
    """Do in this process what `run_export` times."""
    if kind == "bare":
        import keras

        convert_bare(keras.saving.load_model(folder / "bare.keras"), folder)
    else:
        import compress

        model = compress.load_model(folder / "ours.keras")
        convert_ours(model, folder, random_data(model.input_shape[1:], 64)[0])


def convert_ours(twin: Any, folder: Path, samples: np.ndarray) -> None:
    import compress

    paths = {suffix: folder / f"ours.{suffix}" for suffix in ("tflite", "onnx")}
    compress.export_models(twin, paths, samples=samples)


def convert_bare(model: Any, folder: Path) -> None:
    """Convert the float model with the two converters as their guides do, and check nothing."""
    import keras
    import tensorflow as tf
    import tf2onnx

    shape, saved = model.input_shape[1:], str(folder / "saved_model")
    write_saved_model(keras, model, shape, None, saved)
    (folder / "bare.tflite").write_bytes(tf.lite.TFLiteConverter.from_saved_model(saved).convert())
    function = tf.function(lambda x: model(x, training=False))
    tf2onnx.convert.from_function(
        function, [tf.TensorSpec((None, *shape), tf.float32)], opset=17, output_path=str(folder / "bare.onnx")
    )


def _rows(head: dict[str, Any], times: list[Times], plain: list[Times]) -> list[dict[str, Any]]:
    """Return a row per clock: medians, and ratios of each round."""
    rows = []
    for index, clock in enumerate(("wall", "cpu")):
        ours, theirs = ([entry[index] for entry in each] for each in (times, plain))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            {
                **head,
                "clock": clock,
                "plain_ms": round(1e3 * statistics.median(theirs), 3),
                "ms": round(1e3 * statistics.median(ours), 3),
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_of_minima": round(min(ours) / min(theirs), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
            }
        )
    return rows


def main() -> None:
    arguments = parse_arguments()
    if arguments.export:
        export_file(arguments.export[0], Path(arguments.export[1]))
        return
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    from reporting import describe_machine, write_results

    machine, rows = describe_machine(), []
    work = {"step": measure_steps, "calibration": measure_calibration, "export": measure_export}
    for what in arguments.work:
        for name in arguments.nets:
            rows += work[what](name, arguments)
            print(rows[-2:], file=sys.stderr, flush=True)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("quick", "export")}
    keys = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key, "") for key in keys} for row in rows]
    report = {"goal": {f"{key}: ratio_median of cpu": value for key, value in GOALS.items()}, "settings": settings}
    write_results("quantization_step", report | {"machine": machine, "rows": rows}, write=not arguments.quick)


if __name__ == "__main__":
    main()
