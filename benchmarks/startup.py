"""Start-up: CPU time of `bmcompress --help`, `inspect` and `check --size-only` against a bare typer program, in turn.

    python benchmarks/startup.py

Each command is a fresh process; its user and system time, and those of its children, are what the operating system
counts. Goal: at most 1.5 times the bare program, which has one command that prints a word. The same program importing
h5py, which reads the weights of a `.keras` file, shows what is left for `inspect` itself. `check` judges bytes and MACs
of an ONNX file against a baseline, as in CI.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from reporting import describe_machine, write_results

BARE = """
import typer
app = typer.Typer()

@app.command()
def hello(name: str):
    print("hello", name)

app()
"""

HDF5 = BARE.replace('print("hello"', 'import h5py\n    print("hello"')

BUDGET = """
artifacts: {net: mobilenet.onnx}
budgets:
  - {artifact: net, file: 64 MiB, max_growth: {file: 0, macs: 0}}
"""

OURS = "from compress.cli import main; main()"


def cpu_seconds(command: list[str], folder: Path) -> float:
    """Return user plus system time of one run of `command`."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{command} failed: {process.stderr.read().decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def save_models(folder: Path) -> None:
    """Write what is inspected and checked: a dense layer, and MobileNetV2 at 96 x 96 with 2.3 million parameters."""
    script = """
import keras, compress
keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)]).save("small.keras")
net = keras.applications.MobileNetV2((96, 96, 3), weights=None, classes=10)
net.save("mobilenet.keras")
compress.export_model(net, "mobilenet.onnx")
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=21)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bare.py").write_text(BARE)
        (folder / "hdf5.py").write_text(HDF5)
        save_models(folder)
        (folder / "bmcompress.budget.yaml").write_text(BUDGET)
        cpu_seconds([sys.executable, "-c", OURS, "baseline", "update"], folder)
        commands = {
            "bare typer --help": [sys.executable, "bare.py", "--help"],
            "bare typer, its command": [sys.executable, "bare.py", "you"],
            "bare typer, importing h5py": [sys.executable, "hdf5.py", "you"],
            "bmcompress --help": [sys.executable, "-c", OURS, "--help"],
            "bmcompress inspect (small)": [sys.executable, "-c", OURS, "inspect", "small.keras"],
            "bmcompress inspect (MobileNetV2)": [sys.executable, "-c", OURS, "inspect", "mobilenet.keras"],
            "bmcompress check --size-only (MobileNetV2)": [sys.executable, "-c", OURS, "check", "--size-only"],
        }
        times: dict[str, list[float]] = {label: [] for label in commands}
        for run in range(arguments.runs + 1):
            for label, command in commands.items():
                seconds = cpu_seconds(command, folder)
                if run:  # the first round warms the disk cache
                    times[label].append(seconds)
    rows = []
    for label, values in times.items():
        base = "bare typer --help" if "--help" in label else "bare typer, its command"
        ratios = sorted(a / b for a, b in zip(values, times[base], strict=True))
        rows.append(
            {
                "command": label,
                "cpu_ms_min": round(1000 * min(values), 1),
                "cpu_ms_median": round(1000 * sorted(values)[len(values) // 2], 1),
                "against": base,
                "ratio_median": round(ratios[len(ratios) // 2], 3),
                "ratio_of_minima": round(min(values) / min(times[base]), 3),
            }
        )
    write_results(
        "startup",
        {"goal": "at most 1.5", "runs": arguments.runs, "rows": rows, "machine": describe_machine()},
    )


if __name__ == "__main__":
    main()
