"""bmcompress beside TensorFlow Model Optimization: accuracy, bytes, agreement and training time, in one table.

Each net is trained once (kept in `--work`); from these weights both tools prune, cluster and train for int8 (also after
pruning, and after both), once for every seed, with equal samples, epochs, optimizer and rates. Accuracy, agreement with
the trained model and bytes are of the TFLite file in LiteRT. Step times are of short trainings in one process, in turns
whose order alternates, each as a ratio to plain `fit` of the same Keras.

    python benchmarks/versus_tfmot.py --data DATA --work WORK

Writes benchmarks/results/versus_tfmot.json and .md. A cell is won, equal or lost: accuracy by the 95 % interval of the
difference over seeds (Student's t), bytes and agreement by their means (equal within 0.5 % of bytes, 0.1 points of
agreement), steps if our overhead is at most half of tfmot's. `--reuse` goes on where an earlier run of the same options
stopped.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # tfmot takes tf.keras for tf_keras; compress uses keras
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from quantization_nets import Arrays, ensure_net, load_arrays
from quantization_peers import BATCH_SIZE
from sparsity_step import WARM_UP
from versus_tools import NETS, SETTINGS, TOOLS, Job, timed_trainings

SAME_BYTES, SAME_AGREEMENT = 0.005, 0.1
GOAL = "better or equal in every cell, our step overhead at most half of tfmot's"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with fashion_mnist.npz and cifar10.npz")
    parser.add_argument("--work", type=Path, required=True, help="folder of trained nets and files")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each cell (default: 3)")
    parser.add_argument("--epochs", type=int, default=2, help="of each training (default: 2)")
    parser.add_argument("--train", type=int, default=10000, help="training samples at most (default: 10000)")
    parser.add_argument("--rounds", type=int, default=7, help="of timed trainings (default: 7)")
    parser.add_argument("--steps", type=int, default=30, help="of one timed training (default: 30)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at the same time (default: 2)")
    parser.add_argument("--reuse", action="store_true", help="keep what an earlier run left in --work")
    parser.add_argument("--only", choices=("files", "steps"), help="measure one part, and take the other from --work")
    parser.add_argument("--quick", action="store_true", help="smoke test: few samples and steps; results are not kept")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # what a child does: a tool's files, or steps
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs, arguments.train, arguments.rounds, arguments.steps = 2, 1, 512, 2, 8
    return arguments


def folder_of(arguments: argparse.Namespace) -> Path:
    folder = arguments.work / f"versus-{arguments.epochs}x{arguments.train}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_job(name: str, seed: int, arguments: argparse.Namespace, train: int) -> Job:
    arrays = load_arrays(NETS[name], arguments.data)
    path, _ = ensure_net(NETS[name], arrays, arguments.work)
    used = Arrays(arrays.x_train[:train], arrays.y_train[:train], arrays.x_test, arrays.y_test)
    return Job(NETS[name], used, path, arguments.epochs, seed)


def use_one_thread() -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def write_files(name: str, tool: str, arguments: argparse.Namespace) -> None:
    """Let one tool write its files of one net, and a line of facts about each, in this process."""
    use_one_thread()
    from compress.deploy.runtimes import open_runtime, predict

    job = make_job(name, 0, arguments, arguments.train)
    jobs = [replace(job, seed=seed, kept={}) for seed in range(arguments.seeds)]
    for setting, seed in itertools.product(arguments.settings, range(arguments.seeds)):
        stem = folder_of(arguments) / f"{name}-{setting.replace(' ', '-').replace('%', '')}-{tool}-{seed}"
        if arguments.reuse and stem.with_suffix(".json").exists():
            continue
        start, job = time.perf_counter(), jobs[seed]
        file = stem.with_suffix(".tflite")
        answers = TOOLS[tool](job, SETTINGS[setting], file).argmax(-1)
        (outputs,) = predict(open_runtime(file), job.arrays.x_test)
        content = file.read_bytes()
        facts = {
            "accuracy_percent": 100 * float((outputs.argmax(-1) == job.arrays.y_test).mean()),
            "agreement_percent": 100 * float((outputs.argmax(-1) == answers).mean()),
            "bytes": len(content),
            "gzip_bytes": len(gzip.compress(content, 9)),
        }
        stem.with_suffix(".json").write_text(json.dumps(facts))
        print(f"{stem.name}: {time.perf_counter() - start:.0f} s {facts}", file=sys.stderr, flush=True)


def time_steps(name: str, arguments: argparse.Namespace) -> None:
    """Time short trainings of one net by both tools, and write the ratios."""
    use_one_thread()
    job = make_job(name, 0, arguments, arguments.steps * BATCH_SIZE)
    job.epochs = 1
    trainings = timed_trainings(job)
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in trainings}
    for turn in range(-1, arguments.rounds):  # the first turn warms up
        for key in list(trainings) if turn % 2 else list(trainings)[::-1]:
            found = trainings[key]()
            if turn >= 0:
                times[key].append(found)
    rows = {}
    counted = arguments.steps - WARM_UP - 1
    for (tool, setting), found in times.items():
        plain = times[tool, "plain"]
        ratios = [[own[i] / base[i] for own, base in zip(found, plain, strict=True)] for i in (0, 1)]
        rows[f"{tool} {setting}"] = {
            "wall_ratio": round(statistics.median(ratios[0]), 3),
            "cpu_ratio": round(statistics.median(ratios[1]), 3),
            "quartiles": [round(float(np.quantile(ratios[1], q)), 3) for q in (0.25, 0.75)],
            "ms": round(1000 * statistics.median(cpu for _, cpu in found) / counted, 2),
        }
    (folder_of(arguments) / f"{name}-steps.json").write_text(json.dumps(rows))


def run_children(arguments: argparse.Namespace) -> None:
    """Do the work in processes of their own; steps are timed one after the other."""

    def start(job: tuple[str, str]) -> int:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", *job]
        return subprocess.run(command, check=False).returncode

    jobs = [] if arguments.only == "steps" else list(itertools.product(arguments.nets, TOOLS))
    with ThreadPoolExecutor(arguments.processes) as pool:
        codes = list(pool.map(start, jobs))
    steps = [] if arguments.only == "files" else [(name, "steps") for name in arguments.nets]
    failed = [" ".join(job) for job, code in zip([*jobs, *steps], [*codes, *map(start, steps)], strict=True) if code]
    if failed:
        raise SystemExit(f"failed, see above: {', '.join(failed)}")


def read_rows(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per setting and tool, with what each cell is for us."""
    steps_file = folder_of(arguments) / f"{name}-steps.json"
    steps = json.loads(steps_file.read_text()) if steps_file.exists() else {}
    rows = []
    for setting in arguments.settings:
        stem = f"{name}-{setting.replace(' ', '-').replace('%', '')}"
        facts = {
            tool: [
                json.loads((folder_of(arguments) / f"{stem}-{tool}-{seed}.json").read_text())
                for seed in range(arguments.seeds)
            ]
            for tool in TOOLS
        }
        for tool, found in facts.items():
            accuracy = [each["accuracy_percent"] for each in found]
            timed = steps.get(f"{tool} {setting}", {})
            row = {
                "net": name,
                "setting": setting,
                "tool": "bmcompress" if tool == "ours" else tool,
                "accuracy_percent": round(statistics.mean(accuracy), 2),
                "accuracy_ci95": [round(value, 2) for value in interval(accuracy)],
                "agreement_percent": round(statistics.mean(each["agreement_percent"] for each in found), 2),
                **{key: round(statistics.mean(each[key] for each in found)) for key in ("bytes", "gzip_bytes")},
                "step_cpu_ratio": timed.get("cpu_ratio", ""),
                "step_quartiles": timed.get("quartiles", ""),
            }
            rows.append(row)
        judge(facts, *rows[-2:])
    return rows


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by Student's t."""
    from scipy.stats import t

    middle, half = statistics.mean(values), 0.0
    if len(values) > 1:
        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half


def judge(facts: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Put into the row `ours` what each of its cells is beside `theirs`."""
    pairs = zip(facts["ours"], facts["tfmot"], strict=True)
    differences = [a["accuracy_percent"] - b["accuracy_percent"] for a, b in pairs]
    low, high = interval(differences)
    cells = {"accuracy": "won" if low > 0 else "lost" if high < 0 else "equal"}
    for key in ("bytes", "gzip_bytes"):
        ratio = ours[key] / theirs[key]
        cells[key] = "won" if ratio < 1 - SAME_BYTES else "lost" if ratio > 1 + SAME_BYTES else "equal"
    gap = ours["agreement_percent"] - theirs["agreement_percent"]
    cells["agreement"] = "won" if gap > SAME_AGREEMENT else "lost" if gap < -SAME_AGREEMENT else "equal"
    if ours["step_cpu_ratio"] and theirs["step_cpu_ratio"]:
        # An overhead below zero is noise, or what folding batch norm saves.
        cells["step"] = "won" if ours["step_cpu_ratio"] - 1 <= max(0.0, theirs["step_cpu_ratio"] - 1) / 2 else "lost"
    ours["difference_pp"] = round(statistics.mean(differences), 2)
    ours["difference_ci95_pp"] = [round(low, 2), round(high, 2)]
    ours["cells"] = cells


def options() -> str:
    """Return the command line without the paths."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--data", "--work", "--only"):
            next(words, None)
        elif word != "--reuse":
            kept.append(word)
    return " ".join(kept)


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        name, what = arguments.child
        time_steps(name, arguments) if what == "steps" else write_files(name, what, arguments)
        return
    from importlib.metadata import version

    from reporting import FOLDER, describe_machine, write_results

    machine, nets = describe_machine(), {}
    for name in arguments.nets:
        _, nets[name] = ensure_net(NETS[name], load_arrays(NETS[name], arguments.data), arguments.work)
    run_children(arguments)
    rows = [row for name in arguments.nets for row in read_rows(name, arguments)]
    lost = [
        f"{row['net']}, {row['setting']}: {cell}"
        for row in rows
        for cell, what in row.get("cells", {}).items()
        if what == "lost"
    ]
    keys = dict.fromkeys(key for row in rows for key in row)
    report = {
        "command": f"python benchmarks/versus_tfmot.py --data DATA --work WORK {options()}".strip(),
        "goal": GOAL,
        "settings": {key: getattr(arguments, key) for key in ("epochs", "train", "rounds", "steps", "processes")},
        "seeds": list(range(arguments.seeds)),
        "machine": machine,
        "versions": {
            package: version(package)
            for package in ("tensorflow", "keras", "tf_keras", "tensorflow-model-optimization", "ai-edge-litert")
        },
        "nets": nets,
        "lost": lost,
        "rows": [{key: row.get(key, "") for key in keys} for row in rows],
    }
    write_results("versus_tfmot", report, write=not arguments.quick)
    if not arguments.quick:
        write_markdown(FOLDER / "versus_tfmot.md", report)


def write_markdown(path: Path, report: dict[str, Any]) -> None:
    """Write the rows as tables, one for each net; lost cells are marked."""
    machine = json.dumps(report["machine"])
    versions = ", ".join(f"{name} {each}" for name, each in report["versions"].items())
    lines = ["# bmcompress beside tfmot", "", f"`{report['command']}`", ""]
    lines += [f"Seeds {report['seeds']}, {report['settings']}. {versions}.", ""]
    lines += [f"Machine: `{machine}`.", ""]
    lines += [
        "Accuracy with its 95 % interval over seeds, agreement of the trained model with its file, and bytes are of "
        "the TFLite file in LiteRT. Differences are ours minus tfmot's in points. Steps are CPU time as a ratio to "
        "plain `fit` of the same Keras; the goal is half of tfmot's overhead. **Bold: lost.**",
        "",
    ]
    for name, facts in report["nets"].items():
        lines += [f"## {name}: float {facts['accuracy_percent']} %", ""]
        lines += ["| setting | tool | accuracy | difference | agreement | bytes | gzip | step |", "|---" * 8 + "|"]
        lines += [_cells(row) for row in report["rows"] if row["net"] == name]
        lines.append("")
    lines.append(f"Lost: {'; '.join(report['lost']) or 'nothing'}.")
    path.write_text("\n".join(lines) + "\n")


def _cells(row: dict[str, Any]) -> str:
    verdicts = row["cells"] or {}

    def mark(cell: str, text: str) -> str:
        return f"**{text}**" if verdicts.get(cell) == "lost" else text

    low, high = row["accuracy_ci95"]
    difference = ""
    if row["difference_ci95_pp"]:
        difference = "{:+.2f} ({:+.2f} to {:+.2f})".format(row["difference_pp"], *row["difference_ci95_pp"])
    cells = [
        row["setting"],
        row["tool"],
        mark("accuracy", f"{row['accuracy_percent']:.2f} % ({low:.2f} to {high:.2f})"),
        difference,
        mark("agreement", f"{row['agreement_percent']:.2f} %"),
        mark("bytes", f"{row['bytes']:,.0f}"),
        mark("gzip_bytes", f"{row['gzip_bytes']:,.0f}"),
        mark("step", str(row["step_cpu_ratio"])),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
