"""The command `quickstart`: the main job on a data set that ships with a dependency."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.command import Json, Quiet, command


@command
def quickstart(
    folder: Annotated[str, typer.Argument(help="Where models, recipe and results go.")] = "quickstart",
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a teacher and a student on digits, distil, prune, export, benchmark and check budgets."""
    from pathlib import Path

    from compress.cli.recipes import run_and_show
    from compress.cli.terminal import say

    say("loading TensorFlow ...")
    from compress.quickstart import prepare_quickstart

    recipe = prepare_quickstart(Path(folder))
    run_and_show(recipe, str(Path(folder) / "run"), None, fresh=False, json_output=json_output)
    say(f"next: bmcompress run {folder}/quickstart.yaml --set passes.prune.sparsity=0.8")
