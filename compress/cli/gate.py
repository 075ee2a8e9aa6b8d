"""The command `check`: budgets against files, for CI."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.command import AllowImport, Json, Quiet, command


@command
def check(
    target: Annotated[
        str,
        typer.Argument(metavar="[BUDGET|RUN]", help="A budget file, or the directory of a run with budgets."),
    ] = "bmcompress.budget.yaml",
    size_only: Annotated[
        bool, typer.Option("--size-only", help="Only bytes and weights: fast, and no model is executed.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="An inconclusive line fails too, with exit code 7.")] = False,
    allow_import: AllowImport = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check exported files against budgets; exit code 6 when one is broken."""
    from compress.checking import check_budgets
    from compress.cli.terminal import print_json, print_table
    from compress.gate.verdicts import raise_for_verdicts, verdict_rows

    report = check_budgets(target, size_only=size_only, allow_imports=tuple(allow_import or ()))
    if json_output:
        print_json(report.to_dict())
    else:
        print_table(*verdict_rows(report.verdicts))
    raise_for_verdicts(report.verdicts, strict=strict)
