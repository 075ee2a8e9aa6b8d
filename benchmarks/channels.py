"""What channel pruning buys: MACs, parameters, bytes and latency of narrower nets as ratios to the original.

MobileNetV2 and ResNet50 of keras.applications with random weights (latency does not depend on them), cut by three
ratios, beside 8 bits, both together, and 80 % unstructured zeros. Latency is that of the files in LiteRT and ORT, run
on one thread, in interleaved pairs with the float file of the same runtime. Goal: the latency ratio within 1.3 of the
MAC ratio.

    python benchmarks/channels.py

Writes benchmarks/results/channels.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

GOAL = 1.3
RATIOS = (0.25, 0.5, 0.75)
NETS = ("MobileNetV2", "ResNet50")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 224], help="of images (default: 96 224)")
    parser.add_argument("--processes", type=int, default=2, help="per latency (default: 2)")
    parser.add_argument("--pairs", type=int, default=40, help="timed pairs per process (default: 40)")
    parser.add_argument("--quick", action="store_true", help="smoke test: one small net; results are not kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.nets, arguments.sizes, arguments.processes, arguments.pairs = ["MobileNetV2"], [64], 1, 10
    return arguments


def variants(model: Any, samples: np.ndarray) -> dict[str, Any]:
    """Return the models that are measured, by name."""
    import compress

    made = {"float": model}
    for ratio in RATIOS:
        made[f"channels {ratio:.0%}"] = compress.prune_channels(model, ratio).model
    for name in ("float", "channels 50%"):
        quantized = compress.calibrate(compress.fake_quantize(made[name], "int8"), samples)
        made["int8" if name == "float" else f"{name}, int8"] = quantized
    made["80 % zeros"] = compress.prune_weights(model, 0.8)
    return made


def measure(name: str, size: int, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    import keras

    import compress

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(input_shape=(size, size, 3), weights=None)
    samples = np.random.default_rng(0).uniform(-1, 1, (16, size, size, 3)).astype("float32")
    files: dict[str, dict[str, Path]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for variant, made in variants(model, samples).items():
        stem = f"{name}-{size}-{variant}".replace("%", "").replace(" ", "-").replace(",", "")
        files[variant] = {kind: folder / f"{stem}.{kind}" for kind in ("tflite", "onnx")}
        compress.export_models(made, files[variant], samples=samples)
        made.save(folder / f"{stem}.keras")
        summary = compress.inspect_model(folder / f"{stem}.keras")
        sizes[variant] = summary.macs, summary.parameters
        print(f"{stem}: written", file=sys.stderr, flush=True)
    found: dict[tuple[str, str], Any] = {}
    for kind in ("tflite", "onnx"):
        report = compress.benchmark_files(
            [own[kind] for own in files.values()],
            reference=files["float"][kind],
            processes=arguments.processes,
            pairs=arguments.pairs,
            memory=False,
        )
        found |= {(kind, variant): result for variant, result in zip(files, report.results, strict=True)}
    rows = []
    macs, parameters = sizes["float"]
    for variant in files:
        latency = {kind: found[kind, variant].latency[0] for kind in ("tflite", "onnx")}
        mac_ratio = sizes[variant][0] / macs
        rows.append(
            {
                "net": f"{name}, {size}",
                "variant": variant,
                "macs_ratio": round(mac_ratio, 3),
                "parameters_ratio": round(sizes[variant][1] / parameters, 3),
                "tflite_bytes": found["tflite", variant].size.file_bytes,
                "tflite_latency_ratio": round(latency["tflite"].ratio, 3),
                "onnx_latency_ratio": round(latency["onnx"].ratio, 3),
                "within_goal": all(each.ratio <= GOAL * mac_ratio for each in latency.values())
                if "channels" in variant and "int8" not in variant
                else "",
            }
        )
    return rows


def main() -> None:
    arguments = parse_arguments()
    from reporting import describe_machine, write_results

    machine, rows = describe_machine(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.nets:
            for size in arguments.sizes:
                rows += measure(name, size, Path(folder), arguments)
                print(rows[-1], file=sys.stderr, flush=True)
    settings = {key: getattr(arguments, key) for key in ("nets", "sizes", "processes", "pairs")}
    report = {"goal": {"latency ratio over MAC ratio": GOAL}, "settings": settings, "machine": machine, "rows": rows}
    write_results("channels", report, write=not arguments.quick)


if __name__ == "__main__":
    main()
