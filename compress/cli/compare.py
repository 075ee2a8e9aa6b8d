"""The command `compare`: two model files side by side, layer by layer and over a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.command import AllowImport, DataReference, Json, Quiet, Rescale, Skip, Take, command
from compress.cli.files import load_test_split

_MOST_CLASSES = 10


@command
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The file that counts as right: .keras, .tflite or .onnx.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other file, of any of these formats.")],
    data: DataReference = None,
    rescale: Rescale = None,
    take: Take = None,
    skip: Skip = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Samples for the errors of layers; decisions use all.")
    ] = 64,
    sqnr: Annotated[
        float | None,
        typer.Option(
            "--sqnr", metavar="DB", help="A layer below this has parted; 10 if a file is quantized, else 30 by default."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON here too.")
    ] = None,
    allow_import: AllowImport = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two model files: the error of each layer, the first layer where they part, and decisions that change."""
    from compress.cli.terminal import print_json, print_table, say
    from compress.measure.comparing import compare_models
    from compress.text import printable

    packages = tuple(allow_import or ())
    split = load_test_split(data, rescale, take, skip, packages)
    found = compare_models(a, b, split, samples, sqnr_db=sqnr, allow_imports=packages)
    if output:
        from compress.files import atomic_path

        with atomic_path(Path(output)) as temporary:
            temporary.write_text(found.to_json())
    for note in found.notes:
        say(f"note: {note}")
    if json_output:
        print_json(found.model_dump(mode="json", by_alias=True))
        return
    print_table(*found.layer_rows(), title=f"A: {printable(a)}\nB: {printable(b)}")
    if found.outputs:
        print()
        print_table(*found.output_rows())
    header, rows = found.class_rows()
    if rows:
        print()
        print_table(header, rows[:_MOST_CLASSES])
    print()
    for sentence in found.sentences():
        print(printable(sentence))
