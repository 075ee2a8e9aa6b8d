"""The command `bmcompress`: each command parses, calls one function, prints, and ends with an exit code.

Only typer is imported here; every command imports what it needs when it runs, so that `--help` stays fast.
"""

from __future__ import annotations

from typing import Annotated

import typer

from compress import __version__
from compress.cli import compare, files, gate, migrate, passes, quantization, quickstart, recipes, report, sensitivity
from compress.cli.command import separate_native_messages

app = typer.Typer(
    name="bmcompress",
    help="Compress trained Keras 3 models: distil, prune, quantize, export to TFLite and ONNX, benchmark, gate.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals may hold what nobody wants in a log
)
app.command("quickstart")(quickstart.quickstart)
app.command("run")(recipes.run)
app.command("distill")(passes.distill)
app.command("prune")(passes.prune)
app.command("prune-channels")(passes.prune_channels)
app.command("prune-blocks")(passes.prune_blocks)
app.command("factorize")(passes.factorize)
app.command("cluster")(passes.cluster)
app.command("finetune")(passes.finetune)
app.command("quantize")(quantization.quantize)
app.command("qat")(quantization.qat)
app.command("export")(files.export)
app.command("benchmark")(files.benchmark)
app.command("profile")(files.profile)
app.command("compare")(compare.compare)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("inspect")(files.inspect)
app.command("migrate")(migrate.migrate)
app.command("check")(gate.check)
app.command("report")(report.report)
app.add_typer(gate.baseline_app, name="baseline")
app.add_typer(recipes.recipe_app, name="recipe")


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Compress trained Keras 3 models: distil, prune, quantize, export to TFLite and ONNX, benchmark, gate."""
    if show:
        print(f"bmcompress {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    separate_native_messages()
    app()
