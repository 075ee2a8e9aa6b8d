"""The commands `check` and `baseline`: budgets against files, for CI."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.command import AllowImport, Json, Quiet, command
from compress.errors import BmcompressError

if TYPE_CHECKING:
    from compress.checking import CheckReport

Target = Annotated[
    str, typer.Argument(metavar="[BUDGET|RUN]", help="A budget file, or the directory of a run with budgets.")
]
BaselineFile = Annotated[
    str | None, typer.Option("--baseline", metavar="FILE", help="The baseline; by default the one the budget names.")
]

_DEFAULT = "bmcompress.budget.yaml"

baseline_app = typer.Typer(help="The committed file that `check` compares with.", no_args_is_help=True)


@command
def check(
    target: Target = _DEFAULT,
    baseline: BaselineFile = None,
    require_baseline: Annotated[
        bool, typer.Option("--require-baseline", help="Limits that need a baseline fail where there is none.")
    ] = False,
    size_only: Annotated[
        bool, typer.Option("--size-only", help="Only bytes and weights: fast, and no model is executed.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="An inconclusive line fails too, with exit code 7.")] = False,
    json_file: Annotated[str | None, typer.Option("--json-file", metavar="FILE", help="Write the JSON report.")] = None,
    junit: Annotated[str | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")] = None,
    markdown: Annotated[
        str | None, typer.Option("--markdown", metavar="FILE", help="Write a Markdown comment, under 60 kB.")
    ] = None,
    github: Annotated[
        bool | None,
        typer.Option("--github/--no-github", help="Annotate, summarize, set outputs; on in GitHub Actions."),
    ] = None,
    allow_import: AllowImport = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check exported files against budgets and a baseline; exit code 6 when a limit is broken."""
    from compress.checking import check_budgets
    from compress.cli.terminal import print_json, print_table, say
    from compress.gate.github import error_annotation
    from compress.gate.verdicts import raise_for_verdicts, verdict_rows
    from compress.text import in_github_actions

    github = in_github_actions() if github is None else github
    begin = time.monotonic()
    try:
        report = check_budgets(
            target,
            baseline=baseline,
            require_baseline=require_baseline,
            size_only=size_only,
            allow_imports=tuple(allow_import or ()),
        )
    except BmcompressError as error:
        if github:  # on stderr, which is read for commands too, so that --json stays one document
            print(error_annotation(str(error), target), file=sys.stderr)
        raise
    if json_output:
        print_json(report.to_dict())
    else:
        print_table(*verdict_rows(report.verdicts))
    if json_file:
        _write(json_file, (json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n").encode())
    if junit:
        from compress.gate.junit import junit_xml

        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        _write(junit, junit_xml(report.verdicts, time.monotonic() - begin, created))
    if markdown or github:
        _write_markdown(report, markdown, github)
    if skipped := sum(v.verdict == "skipped" for v in report.verdicts):
        say(f"note: {skipped} of {len(report.verdicts)} limits were skipped; their details say why")
    raise_for_verdicts(report.verdicts, strict=strict)


@baseline_app.command("update")
@command
def baseline_update(
    target: Target = _DEFAULT,
    baseline: BaselineFile = None,
    force: Annotated[bool, typer.Option("--force", help="Write it although a limit is broken.")] = False,
    allow_import: AllowImport = None,
    quiet: Quiet = False,
) -> None:
    """Measure the files and write the baseline, unless a limit is broken; prints what changed."""
    from compress.cli.terminal import print_table, say
    from compress.rebaselining import difference_rows, update_baseline

    path, before, after = update_baseline(
        target, baseline=baseline, force=force, allow_imports=tuple(allow_import or ())
    )
    print_table(*difference_rows(before, after))
    say(f"{path} is written; commit it")


@baseline_app.command("show")
@command
def baseline_show(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="The baseline.")] = "bmcompress.baseline.json",
    json_output: Json = False,
) -> None:
    """Show what a baseline holds."""
    from compress.cli.terminal import print_json, print_table, say
    from compress.rebaselining import baseline_rows, read_baseline

    found = read_baseline(file)
    if json_output:
        print_json(json.loads(found.to_json()))
        return
    print_table(*baseline_rows(found))
    samples = f"{found.data.samples:,} samples" if found.data else "no samples"
    say(f"written {found.created} by bmcompress {found.tool} on {found.machine.cpu or 'an unknown CPU'}, {samples}")


@baseline_app.command("diff")
@command
def baseline_diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A baseline, such as that of the main branch.")],
    new: Annotated[str, typer.Argument(metavar="[NEW]", help="Another one.")] = "bmcompress.baseline.json",
) -> None:
    """Show what changed from one baseline to another, sample by sample where they are the same samples."""
    from compress.cli.terminal import print_table
    from compress.rebaselining import difference_rows, read_baseline

    print_table(*difference_rows(read_baseline(old), read_baseline(new)))


def _write_markdown(report: CheckReport, path: str | None, github: bool) -> None:
    from compress.gate.github import annotations, write_outputs, write_summary
    from compress.gate.markdown import check_markdown

    text = check_markdown(report.verdicts, report.benchmark.warnings if report.benchmark else ())
    if path:
        _write(path, text.encode())
    if github:
        for line in annotations(report.verdicts, report.budget_file):
            print(line, file=sys.stderr)
        with suppress(OSError):  # a summary that cannot be written changes no verdict
            write_summary(text)
            write_outputs(report.verdicts, path)


def _write(path: str, content: bytes) -> None:
    from compress.files import atomic_path

    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(content)
