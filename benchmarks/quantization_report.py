"""What the results of benchmarks/quantization.py say: goals held or missed, and a Markdown file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GOALS = {
    "resnet8: ours_ptq: change_pp": -0.1,
    "mobilenet: ours_ptq: change_pp": -0.5,
    "mobilenet: ours_qat: change_pp": -0.2,
    "bytes_ratio": 1.02,
    "latency_ratio": 1.02,
    "agreement_percent": 99.9,
    "mobilenet: agreement_percent": 99.5,
}
"""At least for changes and agreement, at most for ratios to the best peer."""


def judge(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per goal and file: what was found, and whether the goal holds."""
    verdicts = [_verdict(row, goal, row["change_pp"]) for row in report["rows"] if (goal := _drop_goal(row))]
    best: dict[tuple[str, str, str], float] = {}
    for row in report["against_peers"]:
        for measure in ("bytes_ratio", "latency_ratio"):  # the best peer is the one that we compare worst with
            key = row["net"], row["file"], measure
            best[key] = max(best.get(key, 0.0), row[measure])
        low, high = row["ci95_pp"]
        text = f"{row['accuracy_difference_pp']:+.2f} ({low:+.2f} to {high:+.2f})"
        verdicts.append(_row(row, f"not worse than {row['peer']}", text, high >= 0))
    for (net, file, measure), value in best.items():
        goal = f"{measure} to the best peer at most {GOALS[measure]}"
        verdicts.append(_row({"net": net, "file": file}, goal, value, value <= GOALS[measure]))
    for row in report["against_keras"]:
        least = GOALS["mobilenet: agreement_percent" if "mobilenet" in row["net"] else "agreement_percent"]
        value = row["agreement_percent"]
        verdicts.append(_row(row, f"agreement with Keras at least {least} %", value, value >= least))
    return verdicts


def _drop_goal(row: dict[str, Any]) -> str | None:
    for goal in GOALS:
        kind, _, tool = goal.removesuffix(": change_pp").partition(": ")
        if goal.endswith(": change_pp") and kind in row["net"] and row["file"].startswith(f"{tool}."):
            return goal
    return None


def _verdict(row: dict[str, Any], goal: str, value: float) -> dict[str, Any]:
    return _row(row, f"change to float at least {GOALS[goal]} points", value, value >= GOALS[goal])


def _row(row: dict[str, Any], goal: str, value: Any, holds: bool) -> dict[str, Any]:
    return {"net": row["net"], "file": row["file"], "goal": goal, "found": value, "holds": holds}


def write_markdown(path: Path, report: dict[str, Any]) -> None:
    """Write tables of all files, of ours against each peer, and of the goals."""
    machine = report["machine"]
    lines = ["# Int8 files beside those of peers", "", f"`{report['command']}`, {machine['cpu']}", ""]
    lines += ["Ratios are times of one sample against the float file in the same runtime; intervals are 95 %.", ""]
    for name, found in report["nets"].items():
        net = found["net"]
        lines += [f"## {name}", "", f"{net['parameters']:,} parameters, float {net['accuracy_percent']} %", ""]
        lines += _table(
            ("file", "accuracy %", "change, points", "bytes", "latency ratio"),
            [_file_cells(row) for row in report["rows"] if row["net"] == name],
        )
        for tool, facts in found["tools"].items():
            lines += [f"- {tool}: {text}" for text in [*facts.get("notes", []), facts.get("failed")] if text]
        lines += [""]
    if report["against_peers"]:
        lines += ["## Ours against each peer", ""]
        lines += _table(
            ("net", "ours", "peer", "accuracy, points", "bytes ratio", "latency ratio"),
            [_peer_cells(row) for row in report["against_peers"]],
        )
    if report["verdicts"]:
        lines += ["", "## Goals", ""]
        cells = [[*list(row.values())[:-1], "yes" if row["holds"] else "**no**"] for row in report["verdicts"]]
        lines += _table(("net", "file", "goal", "found", "holds"), cells)
    path.write_text("\n".join(lines).rstrip() + "\n")


def _file_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["change_ci95_pp"]
    return [
        row["file"],
        f"{row['accuracy_percent']:.2f} ({_span(row['accuracy_ci95'], 2)})",
        f"{row['change_pp']:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{row['bytes']:,}",
        f"{row['latency_ratio']:.3f} ({_span(row['latency_ratio_ci95'], 3)}){' noisy' * row['noisy']}",
    ]


def _peer_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["ci95_pp"]
    return [
        row["net"],
        row["file"],
        row["peer"],
        f"{row['accuracy_difference_pp']:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{row['bytes_ratio']:.3f}",
        f"{row['latency_ratio']:.3f} ({_span(row['latency_ratio_ci95'], 3)}){' noisy' * row['noisy']}",
    ]


def _span(interval: list[float], digits: int) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _table(header: tuple[str, ...], rows: list[list[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
