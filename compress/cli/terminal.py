"""What the terminal shows: results on stdout, progress and everything said on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from compress.errors import BmcompressError
from compress.text import in_github_actions, printable, without_commands


def say(text: str) -> None:
    """Print one line on stderr, without control characters that a model file may have smuggled in."""
    print(_for_log(printable(text)), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print `value` as one JSON document on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_error(error: BmcompressError, as_json: bool) -> None:
    """Print an expected error: as JSON on stdout when that was asked for, as text on stderr otherwise."""
    if as_json:
        details = {"type": type(error).__name__, "message": error.message, "help": error.help}
        print_json({"error": {**details, "exit_code": error.exit_code}})
    for line in error.message.splitlines():
        say(f"error: {line}")
    if error.help:
        say(f"  help: {error.help}")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table on stdout: drawn in a terminal, plain aligned columns in a pipe."""
    rows = [[printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
        for name, numbers in zip(header, _number_columns(rows) or [False] * len(header), strict=True):
            table.add_column(name, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    if title:
        print(title)
    widths = [max(len(str(line[i])) for line in [header, *rows]) for i in range(len(header))]
    numbers = _number_columns(rows) or [False] * len(header)
    for line in [header, *rows]:
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numbers, strict=True)]
        print(_for_log("  ".join(cells).rstrip()))


def _for_log(text: str) -> str:
    return without_commands(text) if in_github_actions() else text


def _number_columns(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Return, by column, whether its cells are numbers, which read best aligned to the right."""
    return [all(cell[:1] in "-+0123456789?" for cell in column) for column in zip(*rows, strict=True)]


class PlainProgress:
    """Progress as one line each tenth of the work or each 30 seconds, for logs and pipes."""

    _SECONDS = 30.0

    def start(self, description: str, total: int | None) -> dict[str, Any]:
        now = time.monotonic()
        return {"description": description, "total": total, "done": 0, "began": now, "said": now, "tenth": 0}

    def advance(self, task: Any, amount: int, note: str) -> None:
        task["done"] += amount
        now, total = time.monotonic(), task["total"]
        tenth = 10 * task["done"] // total if total else 0
        if (tenth <= task["tenth"] or now - task["said"] < 2) and now - task["said"] < self._SECONDS:
            return
        task["said"], task["tenth"] = now, tenth
        spent = now - task["began"]
        share = f"{100 * task['done'] // total} %" if total else f"{task['done']} steps"
        left = (
            f", about {_duration(spent * (total - task['done']) / task['done'])} left" if total and task["done"] else ""
        )
        say(f"{task['description']}: {share} in {_duration(spent)}{left}{', ' + note if note else ''}")

    def finish(self, task: Any) -> None:
        say(f"{task['description']}: done in {_duration(time.monotonic() - task['began'])}")


class LiveProgress:
    """Progress as live bars with the time left, for a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
        ]
        self._progress = Progress(
            *columns,
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._open = 0

    def start(self, description: str, total: int | None) -> Any:
        if self._open == 0:
            self._progress.start()
        self._open += 1
        return self._progress.add_task(description, total=total, note="")

    def advance(self, task: Any, amount: int, note: str) -> None:
        self._progress.update(task, advance=amount, note=printable(note))

    def finish(self, task: Any) -> None:
        self._progress.remove_task(task)
        self._open -= 1
        if self._open == 0:
            self._progress.stop()


def make_progress() -> PlainProgress | LiveProgress:
    """Return live bars where stderr is a terminal that can draw them, plain lines otherwise."""
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
    return LiveProgress() if live else PlainProgress()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
