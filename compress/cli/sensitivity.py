"""The command `sensitivity`: which layers of a model suffer from quantization."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.command import AllowImport, DataReference, Json, Quiet, Rescale, Skip, Take, command
from compress.cli.files import load_test_split


@command
def sensitivity(
    model: Annotated[str, typer.Argument(help="A .keras file, float or fake-quantized.")],
    data: DataReference = None,
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", help="How a float model is quantized, such as int8_weights; int8 by default."),
    ] = None,
    rescale: Rescale = None,
    take: Take = None,
    skip: Skip = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to compare outputs on.")] = 256,
    allow_import: AllowImport = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize each layer alone and show how far the outputs move, most sensitive layer first."""
    from compress.cli.terminal import print_json, print_table, printable, say
    from compress.errors import UsageError
    from compress.quantization.schemes import find_scheme

    if scheme is not None:
        find_scheme(scheme)
    if data is None:
        raise UsageError(
            "expected samples. Received: no --data", "Name some, such as --data npz:FILE; labels are not used."
        )
    say("loading TensorFlow ...")
    from compress.models.opening import load_model
    from compress.quantization.deployment import is_fake_quantized
    from compress.quantization.model_sensitivity import measure_sensitivity

    packages = tuple(allow_import or ())
    loaded = load_model(model, allow_imports=packages)
    if scheme is not None and is_fake_quantized(loaded):
        raise UsageError(f"expected a float model for --scheme. Received: {model}, which is fake-quantized already")
    split = load_test_split(data, rescale, take, skip, packages)
    found = measure_sensitivity(loaded, split, scheme=scheme or "int8", samples=samples)
    if json_output:
        print_json([{"layer": each.layer, "loss": _finite(each.loss)} for each in found])
        return
    total = sum(max(each.loss, 0.0) for each in found)
    rows = [
        [each.layer, f"{each.loss:.3e}", f"{max(each.loss, 0.0) / total:.1%}" if total > 0 else "-"] for each in found
    ]
    print_table(("layer", "loss", "share"), rows, title=printable(model))
    print(
        "loss: what quantizing this layer alone does to the outputs: KL divergence in nats where they are "
        "probabilities, else squared error in units of their variance"
    )


def _finite(value: float) -> float | None:
    """Return a number that JSON can hold: `None` for NaN and infinity."""
    return value if abs(value) < float("inf") else None
