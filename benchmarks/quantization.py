"""Int8 files of bmcompress beside those of its peers, from the same trained nets: accuracy, bytes and latency.

Each net is trained once (kept in `--work`), quantized by every tool in a process of its own with the same calibration
samples, and QAT gets the same samples, epochs, optimizer and rate. Then all files are measured together: accuracy on
all test samples with Wilson intervals, its paired difference to float with Agresti-Min's, latency in interleaved pairs
with the float file of the same runtime; and our files once more against each peer's directly. Goals: see `GOALS`.

    python benchmarks/quantization.py --data DATA --work WORK

Writes benchmarks/results/quantization.json and .md. `--reuse` takes the peers' files that are in `--work` already.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

from quantization_nets import NETS, Arrays, ensure_net, load_arrays
from quantization_ours import OURS
from quantization_peers import TOOLS
from quantization_report import GOALS, judge, write_markdown

FILES = {
    "float_files": ("float.tflite", "float.onnx"),
    "tuned_float": ("float_tuned.tflite", "float_tuned.onnx"),
    "tflite_converter": ("tflite_converter.tflite",),
    "tflite_dynamic": ("tflite_dynamic.tflite",),
    "ai_edge_quantizer": ("ai_edge_quantizer.tflite",),
    "onnxruntime_static": ("onnxruntime_default.onnx", "onnxruntime_u8s8.onnx", "onnxruntime_u8u8.onnx"),
    "tfmot_qat": ("tfmot_qat.tflite",),
    "ours_ptq": ("ours_ptq.tflite", "ours_ptq.onnx", "ours_ptq_s8.onnx"),
    "ours_qat": ("ours_qat.tflite", "ours_qat.onnx"),
}
RIVALS = {
    "ours_ptq.tflite": ("tflite_converter.tflite", "ai_edge_quantizer.tflite"),
    "ours_qat.tflite": ("tfmot_qat.tflite",),
    "ours_ptq.onnx": FILES["onnxruntime_static"],
    "ours_ptq_s8.onnx": FILES["onnxruntime_static"],  # fast with VNNI, and wrong on older AVX2
}
"""Our file -> files of peers that do the same kind of work."""

TASKS = ("classification",)  # probabilities of an int8 file do not sum to exactly 1, so nothing is inferred


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with fashion_mnist, cifar10 and fsdd .npz")
    parser.add_argument("--work", type=Path, required=True, help="folder of trained nets and files")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--tools", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--epochs", type=int, default=2, help="of QAT (default: 2)")
    parser.add_argument("--processes", type=int, default=5, help="per latency (default: 5)")
    parser.add_argument("--pairs", type=int, default=200, help="timed pairs per process (default: 200)")
    parser.add_argument("--threads", type=int, default=1, help="of TensorFlow and of the runtimes (default: 1)")
    parser.add_argument("--reuse", action="store_true", help="keep the peers' files of an earlier run in --work")
    parser.add_argument("--quick", action="store_true", help="smoke test: few samples, one epoch; results are not kept")
    parser.add_argument("--tool", choices=FILES, help=argparse.SUPPRESS)  # the child process of one tool
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.processes, arguments.pairs = 1, 2, 30
        arguments.work = arguments.work / "quick"
    return arguments


def load(name: str, arguments: argparse.Namespace) -> Arrays:
    """Return the samples of a net; 2,000 of training and 500 of testing in a smoke test."""
    arrays = load_arrays(NETS[name], arguments.data)
    if not arguments.quick:
        return arrays
    return Arrays(arrays.x_train[:2000], arrays.y_train[:2000], arrays.x_test[:500], arrays.y_test[:500])


def run_tool(arguments: argparse.Namespace) -> None:
    """Let one tool write its files, in this process."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    (name,) = arguments.nets
    folder = arguments.work / name
    folder.mkdir(parents=True, exist_ok=True)
    arrays = load(name, arguments)
    epochs = 1 if arguments.quick else None
    keras_file, facts = ensure_net(NETS[name], arrays, arguments.work, epochs=epochs)
    (folder / "net.json").write_text(json.dumps(facts))
    start = time.perf_counter()
    found = (TOOLS | OURS)[arguments.tool](NETS[name], arrays, keras_file, arguments.epochs, folder)
    found["seconds"] = round(time.perf_counter() - start, 1)
    (folder / f"{arguments.tool}.json").write_text(json.dumps(found))


def start_tool(name: str, tool: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a tool reports from its own process: seconds and notes, or why it failed."""
    folder = arguments.work / name
    facts = folder / f"{tool}.json"
    if arguments.reuse and tool not in OURS and facts.exists():
        return json.loads(facts.read_text()) | {"reused": True}
    for path in (facts, *(folder / file for file in FILES[tool])):
        path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--tool", tool, "--nets", name, "--data", str(arguments.data)]
    command += ["--work", str(arguments.work.parent if arguments.quick else arguments.work)]
    command += ["--epochs", str(arguments.epochs), "--threads", str(arguments.threads)]
    environment = os.environ | ({"TF_USE_LEGACY_KERAS": "1"} if tool == "tfmot_qat" else {})
    child = subprocess.run(
        [*command, *["--quick"] * arguments.quick], env=environment, capture_output=True, text=True, check=False
    )
    found = json.loads(facts.read_text()) if facts.exists() else {"failed": _reason(child)}
    print(f"{name}: {tool}: {found}", file=sys.stderr, flush=True)
    return found


def _reason(child: subprocess.CompletedProcess) -> str:
    """Return the line in which a failed child names its error, or the signal that ended it."""
    if child.returncode < 0:
        return f"the process died of {signal.Signals(-child.returncode).name}"
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return f"exit {child.returncode}: {(errors or lines or ['no message'])[-1][:300]}"


def measure_net(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of one net, and our files' differences to each peer's."""
    tools = {tool: start_tool(name, tool, arguments) for tool in FILES if tool in {"float_files", *arguments.tools}}
    folder = arguments.work / name
    if "failed" in tools["float_files"]:
        raise SystemExit(f"{name}: {tools['float_files']['failed']}")
    from compress.data.split import array_split

    arrays = load(name, arguments)
    test = array_split("test", arrays.x_test, arrays.y_test)
    files = [file for tool in tools for file in FILES[tool] if (folder / file).exists()]
    rows = measure_files(folder, files, test, arguments)
    for row in rows:
        tool = next(tool for tool in tools if row["file"] in FILES[tool])
        row |= {"net": name, "notes": tools[tool].get("notes", [])}
    pairs = [(mine, peer) for mine, peers in RIVALS.items() for peer in peers if {mine, peer} <= set(files)]
    return {
        "net": json.loads((folder / "net.json").read_text()),
        "tools": tools,
        "rows": rows,
        "against_peers": [compare(folder, *pair, test, arguments) | {"net": name} for pair in pairs],
        "against_keras": [row | {"net": name} for tool in OURS if tool in tools for row in agree(folder, tool, test)],
    }


def measure_files(folder: Path, files: list[str], test: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return accuracy, bytes and latency of each file beside the float file."""
    import compress

    report = compress.benchmark_files(
        [folder / file for file in files],
        test,
        reference=folder / "float.tflite",
        references={folder / "float.onnx": folder / "float.onnx"},
        threads=arguments.threads,
        processes=arguments.processes,
        pairs=arguments.pairs,
        memory=False,
        tasks=TASKS,
    )
    rows = []
    for result in report.results:
        accuracy, (latency,) = result.quality["accuracy"], result.latency
        drop = accuracy.drop  # absent for the float file itself
        rows.append(
            {
                "file": Path(result.file).name,
                "accuracy_percent": percent(accuracy.value),
                "accuracy_ci95": [percent(value) for value in accuracy.ci95],
                "change_pp": -percent(drop.value) + 0.0 if drop else 0.0,
                "change_ci95_pp": sorted(-percent(value) for value in drop.ci95) if drop else [0.0, 0.0],
                "bytes": result.size.file_bytes,
                "gzip_bytes": result.size.gzip_bytes,
                "latency_ratio": round(latency.ratio, 3),
                "latency_ratio_ci95": [round(value, 3) for value in latency.ratio_ci95],
                "p50_ms": round(latency.p50_ms, 4) if latency.p50_ms else None,
                "noisy": latency.noisy,
            }
        )
    return rows


def compare(folder: Path, mine: str, peer: str, test: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return our file against a peer's: accuracy on the same samples, bytes, interleaved latency."""
    import compress

    report = compress.benchmark_files(
        [folder / peer, folder / mine],
        test,
        threads=arguments.threads,
        processes=arguments.processes,
        pairs=arguments.pairs,
        memory=False,
        tasks=TASKS,
    )
    other, own = report.results
    drop, (latency,) = own.quality["accuracy"].drop, own.latency
    return {
        "file": mine,
        "peer": peer,
        "accuracy_difference_pp": -percent(drop.value) + 0.0,
        "ci95_pp": sorted(-percent(value) for value in drop.ci95),
        "bytes_ratio": round(own.size.file_bytes / other.size.file_bytes, 3),
        "latency_ratio": round(latency.ratio, 3),
        "latency_ratio_ci95": [round(value, 3) for value in latency.ratio_ci95],
        "noisy": latency.noisy,
    }


def agree(folder: Path, name: str, test: Any) -> list[dict[str, Any]]:
    """Return for how many test samples our files give the class that the fake-quantized Keras model gives."""
    import compress

    files = [folder / f"{name}.{suffix}" for suffix in ("keras", "tflite", "onnx")]
    if not all(path.exists() for path in files):
        return []
    report = compress.benchmark_files(files, test, tasks=TASKS, latency=False, memory=False)
    return [
        {"file": path.name, "agreement_percent": percent(result.quality["agreement"].value, 3)}
        for path, result in zip(files[1:], report.results[1:], strict=True)
    ]


def percent(share: float, digits: int = 2) -> float:
    """Return a share in percent."""
    return round(100 * share, digits)


def options() -> list[str]:
    """Return the words of the command line without the paths."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--data", "--work"):
            next(words, None)
        elif not word.startswith(("--data=", "--work=")):
            kept.append(word)
    return kept


def main() -> None:
    arguments = parse_arguments()
    if arguments.tool:
        run_tool(arguments)
        return
    from reporting import FOLDER, describe_machine, write_results

    machine, nets = describe_machine(), {}
    for name in arguments.nets:
        nets[name] = measure_net(name, arguments)
        print(json.dumps(nets[name]["rows"], indent=1), file=sys.stderr, flush=True)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("data", "work", "tool")}
    report = {
        "command": f"python benchmarks/quantization.py --data DATA --work WORK {' '.join(options())}".strip(),
        "goal": GOALS,
        "settings": settings,
        "machine": machine,
        "nets": {name: {key: found[key] for key in ("net", "tools")} for name, found in nets.items()},
        "rows": [row for found in nets.values() for row in found["rows"]],
        "against_peers": [row for found in nets.values() for row in found["against_peers"]],
        "against_keras": [row for found in nets.values() for row in found["against_keras"]],
    }
    report["verdicts"] = judge(report)
    write_results("quantization", report, write=not arguments.quick)
    write_markdown((arguments.work if arguments.quick else FOLDER) / "quantization.md", report)


if __name__ == "__main__":
    main()
