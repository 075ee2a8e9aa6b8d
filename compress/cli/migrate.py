"""The command that takes models of Keras 2 along."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.command import AllowImport, Json, Quiet, command


@command
def migrate(
    model: Annotated[str, typer.Argument(metavar="OLD", help="An .h5 file, or a .keras file of Keras 2.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="NEW", help="The .keras file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    allow_import: AllowImport = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a Keras 3 model of one of Keras 2, with tfmot's wrappers taken off and masks, clusters and ranges kept."""
    from pathlib import Path

    from compress.cli.terminal import print_json, say
    from compress.errors import UsageError
    from compress.files import atomic_path

    source, target = Path(model), Path(output)
    if target.suffix != ".keras":
        raise UsageError(f"--output: expected a file that ends in .keras. Received: {output!r}")
    if target.exists():
        if source.exists() and target.samefile(source):
            raise UsageError(f"--output: expected another file than the old model. Received: {output!r}")
        if not force:
            raise UsageError(f"{output} is there already.", "Choose another name, or pass --force to replace it.")
    say("loading Keras ...")
    from compress.legacy.migrating import migrate_model

    found = migrate_model(model, allow_imports=tuple(allow_import or ()))
    with atomic_path(target) as temporary:
        found.model.save(temporary)
    if json_output:
        print_json({"model": output, **found.to_dict()})
        return
    print(f"{output}: {found.layers} layers of Keras {found.keras_version}, as Keras 3")
    for sentence in found.sentences():
        print(f"  {sentence}")
