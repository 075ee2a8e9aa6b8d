"""Verdicts as a Markdown comment that stays under what GitHub takes, and that no name of a file can break out of."""

from __future__ import annotations

from collections.abc import Sequence

from compress.gate.verdicts import HEADER, Verdict, overall, show_number, worst_first
from compress.text import one_line

MARKER = "<!-- bmcompress:check -->"
"""First line, by which a bot finds the comment that it wrote before."""

MOST_BYTES = 60_000
"""GitHub refuses comments over 65,536 characters."""

_TITLES = {"pass": "passed", "fail": "failed", "inconclusive": "is inconclusive"}
_LONGEST = 400


def check_markdown(verdicts: Sequence[Verdict], notes: Sequence[str] = ()) -> str:
    """Return the verdicts, broken ones first, cut where they would be too long; what passed goes first.

    Args:
        verdicts: of the check.
        notes: warnings about the measurement.
    """
    counts = [f"{sum(v.verdict == name for v in verdicts)} {name}" for name in ("pass", "fail", "inconclusive")]
    counts += [
        f"{number} {name}" for name in ("warn", "skipped") if (number := sum(v.verdict == name for v in verdicts))
    ]
    head = [MARKER, f"### bmcompress check {_TITLES[overall(verdicts)]}", "", ", ".join(counts), ""]
    head += ["| " + " | ".join(HEADER) + " |", "|---|---|---:|---:|---:|---|---|"]
    tail = ["", *(f"- {escape(note)}" for note in notes)] if notes else []
    room = MOST_BYTES - _bytes(head) - 200
    if _bytes(tail) > room // 3:
        tail = ["", f"- {len(notes)} notes are in the JSON report"]
    room -= _bytes(tail)
    rows: list[str] = []
    ordered = [*worst_first(verdicts), *(v for v in verdicts if v.verdict == "pass")]
    for verdict in ordered:
        row = _row(verdict)
        if _bytes([row]) > room:
            break
        room -= _bytes([row])
        rows.append(row)
    if left := len(ordered) - len(rows):
        tail = ["", f"... and {left} more, in the JSON and JUnit reports.", *tail]
    return "\n".join([*head, *rows, *tail]) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown and HTML show as it is: no markup, links or mentions of people."""
    line = one_line(text)
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
    return "".join(c if c.isalnum() or c in " ,;%" or _is_decimal(line, i) else _entity(c) for i, c in enumerate(line))


def _entity(character: str) -> str:
    # A mention is looked for after entities are decoded; a character of no width keeps it from being one.
    return f"&#{ord(character)};" + ("&#8203;" if character == "@" else "")


def _is_decimal(line: str, index: int) -> bool:
    return line[index] == "." and line[index - 1 : index].isdigit() and line[index + 1 : index + 2].isdigit()


def _row(verdict: Verdict) -> str:
    shown = f"**{verdict.verdict}**" if verdict.verdict == "fail" else verdict.verdict
    numbers = map(show_number, (verdict.baseline, verdict.value, verdict.allowed))
    names = escape(verdict.artifact), escape(verdict.limit)
    return "| " + " | ".join([*names, *numbers, shown, escape(verdict.detail)]) + " |"


def _bytes(lines: Sequence[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)
