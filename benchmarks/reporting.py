"""What the benchmarks share: where results go and what machine they came from."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, load and versions; nothing that names a host or a path."""
    from compress.measure.environment import describe_environment

    packages = {name: version(name) for name in ("tensorflow", "keras", "numpy", "typer")}
    return describe_environment((1,), packages, {}).model_dump(mode="json") | {"architecture": platform.machine()}


def write_results(name: str, result: dict[str, Any], *, write: bool = True) -> None:
    """Write `results/NAME.json` with the command and date, and print the rows as a Markdown table.

    A smoke test only prints: `write=False`.
    """
    if write:
        FOLDER.mkdir(exist_ok=True)
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        stamp = {"command": command, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        (FOLDER / f"{name}.json").write_text(json.dumps(stamp | result, indent=2) + "\n")
    rows = result["rows"]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
