"""The command `report`: one HTML file about runs, for a browser, a CI artifact or an e-mail."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.command import Quiet, command


@command
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The HTML file.")] = "report.html",
    quiet: Quiet = False,
) -> None:
    """Write one self-contained HTML file about one or more runs."""
    from compress.report.page import write_report
    from compress.text import printable

    path = write_report(runs, output)
    print(printable(f"{path}: {path.stat().st_size:,} bytes"))
