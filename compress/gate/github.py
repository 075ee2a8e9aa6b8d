"""Verdicts where GitHub Actions shows them: annotations on lines of the budget, a summary, outputs of the step.

See "Workflow commands for GitHub Actions" in GitHub's documentation. Of more than ten annotations of a step
GitHub drops some without a word, so we choose.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from compress.gate.verdicts import Verdict, overall, tell, worst_first
from compress.text import one_line

MOST_ANNOTATIONS = 10

_KINDS = {"fail": "error", "warn": "warning", "inconclusive": "warning"}


def annotations(verdicts: Sequence[Verdict], budget_file: str) -> list[str]:
    """Return workflow commands that mark the lines of the budgets which are broken or undecided, the worst first.

    Args:
        verdicts: of the check.
        budget_file: the file whose lines they name.
    """
    shown = [v for v in worst_first(verdicts) if v.verdict in _KINDS]
    kept = shown if len(shown) <= MOST_ANNOTATIONS else shown[: MOST_ANNOTATIONS - 1]
    path = _from_workspace(budget_file)
    found = [_command(_KINDS[v.verdict], tell(v), path, v.line, f"{v.artifact}: {v.limit}") for v in kept]
    if more := len(shown) - len(kept):
        found.append(_command(_KINDS[shown[len(kept)].verdict], f"... and {more} more", path))
    return found


def error_annotation(message: str, file: str) -> str:
    """Return a workflow command that tells of a check which could not be made."""
    return _command("error", one_line(message), _from_workspace(file))


def write_summary(markdown: str) -> None:
    """Add `markdown` to the summary of the step, where there is one."""
    _append("GITHUB_STEP_SUMMARY", markdown)


def write_outputs(verdicts: Sequence[Verdict], report: str | None) -> None:
    """Set the outputs `verdict` and `report` of the step, where it can have any."""
    lines = [f"verdict={overall(verdicts)}"]
    if report is not None:
        lines.append(f"report={one_line(report)}")
    _append("GITHUB_OUTPUT", "\n".join(lines) + "\n")


def _command(kind: str, message: str, path: str, line: int | None = None, title: str = "") -> str:
    properties = {"file": path, "line": str(line) if line else "", "title": one_line(title)}
    listed = ",".join(f"{name}={_escape_property(value)}" for name, value in properties.items() if value)
    return f"::{kind} {listed}::{_escape(message)}"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape(text).replace(":", "%3A").replace(",", "%2C")


def _from_workspace(path: str) -> str:
    """Return a path as annotations need it: from the root of the repository."""
    workspace, full = Path(os.environ.get("GITHUB_WORKSPACE", ".")).resolve(), Path(path).resolve()
    return full.relative_to(workspace).as_posix() if full.is_relative_to(workspace) else path


def _append(variable: str, text: str) -> None:
    if path := os.environ.get(variable):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
