"""Pruned and clustered nets of bmcompress beside tfmot's: accuracy and bytes of the TFLite files.

Each net is trained once (kept in `--work`); then both tools prune it to several sparsities and cluster it, with equal
samples, epochs, optimizer and rate, each tool in a process of its own. Accuracy is that of the files in LiteRT on
all test images, with Wilson intervals; the difference is paired, with Agresti-Min's interval. Distinct values are
counted in the file, where batch norm has given each channel a factor. Goal: nowhere below tfmot beyond the interval.

    python benchmarks/sparsity.py --data DATA --work WORK

Writes benchmarks/results/sparsity.json and .md. `--reuse` takes files of the same `--epochs` and `--train` that are in
`--work` already. One training per row: the intervals tell how far test images may mislead, not how trainings differ.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

import sparsity_tools
from quantization_nets import NETS, Arrays, ensure_net, load_arrays
from quantization_peers import BATCH_SIZE
from sparsity_tools import CLUSTERING_RATE, FREQUENCY, GROWING, PRUNING_RATE, SETTINGS, TOOLS

CHOSEN = ("fashion_resnet8", "cifar_resnet8")
NOTE = (
    "Differences are bmcompress minus tfmot in points, paired on the same images; all intervals are 95 % and cover the "
    "choice of test images, not how two trainings of the same tool differ. Accuracies are of the samples in DATA, "
    "which may be a part or another split of the official data set: compare them with nothing but each other."
)
GOAL = "upper end of difference_ci95_pp >= 0"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with fashion_mnist.npz and cifar10.npz")
    parser.add_argument("--work", type=Path, required=True, help="folder of trained nets and files")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(CHOSEN))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--epochs", type=int, default=3, help="of each training (default: 3)")
    parser.add_argument("--train", type=int, default=30000, help="training samples at most (default: 30000)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at the same time (default: 2)")
    parser.add_argument(
        "--tfmot-frequency", type=int, help="other steps between tfmot's mask updates than ours; results kept apart"
    )
    parser.add_argument("--reuse", action="store_true", help="keep the files of an earlier run in --work")
    parser.add_argument("--quick", action="store_true", help="smoke test: few samples, one epoch; results are not kept")
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)  # the child process of one tool
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.train = 1, 2000
    return arguments


def load(name: str, arguments: argparse.Namespace) -> Arrays:
    arrays = load_arrays(NETS[name], arguments.data)
    return Arrays(arrays.x_train[: arguments.train], arrays.y_train[: arguments.train], arrays.x_test, arrays.y_test)


def file_of(name: str, setting: str, tool: str, arguments: argparse.Namespace) -> Path:
    kind = "sparsity-quick" if arguments.quick else f"sparsity-{arguments.epochs}x{arguments.train}"
    folder = arguments.work / kind / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{setting.replace('%', '').replace(':', '-').replace(' ', '-')}-{tool}.tflite"


def run_tool(arguments: argparse.Namespace) -> None:
    """Let one tool write its files of one net, on one thread, in this process."""
    import tensorflow as tf

    sparsity_tools.tfmot_frequency = arguments.tfmot_frequency or sparsity_tools.FREQUENCY
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    (name,) = arguments.nets
    arrays = load(name, arguments)
    path, _ = ensure_net(NETS[name], load_arrays(NETS[name], arguments.data), arguments.work)
    for setting in arguments.settings:
        file = file_of(name, setting, arguments.tool, arguments)
        if arguments.reuse and file.exists():
            continue
        start = time.perf_counter()
        TOOLS[arguments.tool](NETS[name], arrays, path, SETTINGS[setting], arguments.epochs, file)
        print(f"{name}: {setting}: {arguments.tool}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def write_files(arguments: argparse.Namespace) -> None:
    """Let both tools write their files of all nets."""

    def start(job: tuple[str, str]) -> int:
        name, tool = job
        command = [sys.executable, __file__, *sys.argv[1:], "--nets", name, "--tool", tool]
        environment = os.environ | ({"TF_USE_LEGACY_KERAS": "1"} if tool == "tfmot" else {})
        return subprocess.run(command, env=environment, check=False).returncode

    jobs = list(itertools.product(arguments.nets, TOOLS))
    with ThreadPoolExecutor(arguments.processes) as pool:
        codes = list(pool.map(start, jobs))
    failed = [" ".join(job) for job, code in zip(jobs, codes, strict=True) if code]
    if failed:
        raise SystemExit(f"failed, see above: {', '.join(failed)}")


def measure(name: str, setting: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each tool."""
    import compress
    from compress.data.split import array_split

    arrays = load(name, arguments)
    files = {tool: file_of(name, setting, tool, arguments) for tool in TOOLS}
    report = compress.benchmark_files(
        [files["tfmot"], files["ours"]],
        array_split("test", arrays.x_test, arrays.y_test),
        latency=False,
        memory=False,
        tasks=("classification",),
    )
    rows = []
    for result in reversed(report.results):
        accuracy = result.quality["accuracy"]
        ours = Path(result.file) == files["ours"]
        rows.append(
            {
                "net": name,
                "setting": setting,
                "tool": "bmcompress" if ours else "tfmot",
                "accuracy_percent": percent(accuracy.value),
                "accuracy_ci95": [percent(value) for value in accuracy.ci95],
                "difference_pp": -percent(accuracy.drop.value) + 0.0 if ours else "",
                "difference_ci95_pp": sorted(-percent(value) for value in accuracy.drop.ci95) if ours else "",
                "sparsity_percent": percent(result.size.sparsity),
                "distinct_at_most": max(kernel.distinct for kernel in result.size.kernels),
                "bytes": result.size.file_bytes,
                "gzip_bytes": result.size.gzip_bytes,
            }
        )
    return rows


def options() -> str:
    """Return the command line without the paths."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--data", "--work"):
            next(words, None)
        elif not word.startswith(("--data=", "--work=")):
            kept.append(word)
    return " ".join(kept)


def percent(share: float) -> float:
    return round(100 * share, 2)


def main() -> None:
    arguments = parse_arguments()
    if arguments.tool:
        run_tool(arguments)
        return
    from reporting import FOLDER, describe_machine, write_results

    machine, rows, nets = describe_machine(), [], {}
    for name in arguments.nets:
        _, facts = ensure_net(NETS[name], load_arrays(NETS[name], arguments.data), arguments.work)
        used = load(name, arguments)
        nets[name] = facts | {"train_samples": len(used.y_train), "test_samples": len(used.y_test)}
    write_files(arguments)
    for name, setting in itertools.product(arguments.nets, arguments.settings):
        rows += measure(name, setting, arguments)
    report = {
        "command": f"python benchmarks/sparsity.py --data DATA --work WORK {options()}".strip(),
        "goal": GOAL,
        "settings": {
            **{key: getattr(arguments, key) for key in ("epochs", "train", "processes", "reuse")},
            "batch_size": BATCH_SIZE,
            "pruning_rate": PRUNING_RATE,
            "clustering_rate": CLUSTERING_RATE,
            "sparsity_grows_until": GROWING,
            "steps_between_mask_updates": {"ours": FREQUENCY, "tfmot": arguments.tfmot_frequency or FREQUENCY},
        },
        "machine": machine,
        "nets": nets,
        "below_tfmot": [
            f"{row['net']}, {row['setting']}"
            for row in rows
            if row["difference_ci95_pp"] and row["difference_ci95_pp"][1] < 0
        ],
        "rows": rows,
    }
    name = "sparsity_other_updates" if arguments.tfmot_frequency else "sparsity"
    write_results(name, report, write=not arguments.quick)
    if not arguments.quick:
        write_markdown(FOLDER / f"{name}.md", report)


def write_markdown(path: Path, report: dict[str, Any]) -> None:
    """Write the rows as tables, one for each net."""
    lines = ["# Pruning and clustering beside tfmot", "", f"`{report['command']}`: {report['settings']}", "", NOTE, ""]
    for name, facts in report["nets"].items():
        samples = f"{facts['train_samples']:,} training and {facts['test_samples']:,} test images"
        lines += [f"## {name}: float {facts['accuracy_percent']} %, {samples}", ""]
        lines += ["| setting | tool | accuracy | difference | zeros | distinct | bytes | gzip |", "|---" * 8 + "|"]
        for row in report["rows"]:
            if row["net"] != name:
                continue
            low, high = row["accuracy_ci95"]
            difference = ""
            if row["difference_ci95_pp"]:
                difference = "{:+.2f} pp ({:+.2f} to {:+.2f})".format(row["difference_pp"], *row["difference_ci95_pp"])
            cells = [
                row["setting"],
                row["tool"],
                f"{row['accuracy_percent']:.2f} % ({low:.2f} to {high:.2f})",
                difference,
                f"{row['sparsity_percent']:.2f} %",
                f"{row['distinct_at_most']:,}",
                f"{row['bytes']:,}",
                f"{row['gzip_bytes']:,}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines.append(f"Below tfmot beyond the interval: {', '.join(report['below_tfmot']) or 'nowhere'}.")
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
