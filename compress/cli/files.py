"""Commands about single files: inspect, export, benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.command import AllowImport, DataReference, Json, Quiet, Rescale, Skip, Take, command
from compress.cli.passes import Exclude, Formats, Include

if TYPE_CHECKING:
    from compress.data.split import Split


@command
def inspect(
    model: Annotated[str, typer.Argument(help="A .keras file.")],
    include: Include = None,
    exclude: Exclude = None,
    xnnpack: Annotated[
        bool, typer.Option("--xnnpack", help="Show which layers LiteRT's sparse kernels would accept; loads the model.")
    ] = False,
    groups: Annotated[
        bool, typer.Option("--groups", help="Show which channels go together, and which stay and why; loads the model.")
    ] = False,
    allow_import: AllowImport = None,
    json_output: Json = False,
) -> None:
    """Show layers, shapes, parameters, sparsity, MACs and what each pass would touch, without loading the model."""
    if xnnpack:
        _show_xnnpack(model, tuple(allow_import or ()), json_output)
        return
    if groups:
        _show_groups(model, tuple(allow_import or ()), json_output)
        return
    from compress.cli.tables import inspection_rows, inspection_totals
    from compress.cli.terminal import print_json, print_table
    from compress.models.inspection import inspect_model
    from compress.text import printable

    summary = inspect_model(model, include=tuple(include or ("*",)), exclude=tuple(exclude or ()))
    if json_output:
        print_json(summary.to_dict())
        return
    print_table(*inspection_rows(summary), title=printable(model))
    for line in inspection_totals(summary):
        print(printable(line))


def _show_xnnpack(path: str, packages: tuple[str, ...], json_output: bool) -> None:
    from dataclasses import asdict

    from compress.cli.terminal import print_json, print_table, say
    from compress.text import printable

    say("loading TensorFlow ...")
    from compress.models.opening import load_model
    from compress.pruning.xnnpack import EXPECTATION, lint_xnnpack

    verdicts = lint_xnnpack(load_model(path, allow_imports=packages))
    if json_output:
        print_json({"layers": [asdict(verdict) for verdict in verdicts], "expectation": EXPECTATION})
        return
    rows = [[printable(each.path), "yes" if each.qualifies else "no", printable(each.reason)] for each in verdicts]
    print_table(["layer", "qualifies", "why not"], rows, title=printable(path))
    print(EXPECTATION)


def _show_groups(path: str, packages: tuple[str, ...], json_output: bool) -> None:
    from compress.cli.terminal import print_json, print_table, say
    from compress.text import printable

    say("loading TensorFlow ...")
    from compress.channels.groups import find_channel_groups
    from compress.models.opening import load_model

    rows = find_channel_groups(load_model(path, allow_imports=packages)).describe()
    if json_output:
        print_json(rows)
        return
    header = ["channels", "made by", "read by", "frozen"]
    cells = [
        [f"{row['channels'] or ''}", ", ".join(row["layers"]), ", ".join(row["read_by"]), row["frozen"] or ""]
        for row in rows
    ]
    print_table(header, [[printable(cell) for cell in each] for each in cells], title=printable(path))


@command
def export(
    model: Annotated[str, typer.Argument(help="A trained .keras file.")],
    to: Formats = "tflite,onnx",
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the files; the model's own by default."),
    ] = None,
    data: DataReference = None,
    rescale: Rescale = None,
    take: Take = None,
    skip: Skip = None,
    opset: Annotated[int, typer.Option("--opset", min=13, max=18, help="ONNX operator set.")] = 17,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Largest relative difference to the model.")
    ] = None,
    sparse: Annotated[
        bool,
        typer.Option("--sparse", help="Leave zeros of pruned weights out of the TFLite file where it gets smaller."),
    ] = False,
    allow_import: AllowImport = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a model to TFLite and ONNX and verify each file in its runtime against the model."""
    from compress.cli.passes import parse_formats
    from compress.cli.tables import export_rows
    from compress.cli.terminal import print_json, print_table, say

    formats = parse_formats(to)
    say("loading TensorFlow ...")
    from compress.deploy.exporting import export_models
    from compress.models.opening import load_model

    packages = tuple(allow_import or ())
    loaded = load_model(model, allow_imports=packages)
    samples = load_test_split(data, rescale, take, skip, packages)
    folder = Path(output) if output else Path(model).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{Path(model).stem}.{name}" for name in formats}
    records = export_models(
        loaded, paths, samples=samples, opset=opset, tolerance=tolerance, sparse="auto" if sparse else "never"
    )
    if json_output:
        print_json([record.model_dump(mode="json") for record in records])
    else:
        print_table(*export_rows(records), title=str(folder))


def load_test_split(
    reference: str | None, rescale: str | None, take: int | None, skip: int | None, packages: tuple[str, ...]
) -> Split | None:
    """Return the test split of a data reference, with what was chosen said on stderr; `None` without a reference."""
    if reference is None:
        return None
    from compress.cli.terminal import say
    from compress.data.loading import load_data
    from compress.data.references import parse_reference

    options = parse_reference(reference, rescale=rescale, take=take, skip=skip)
    loaded = load_data(options, allow_imports=packages, needs=("test",))
    for note in loaded.notes:
        say(note)
    return loaded.require("test", "measuring")


@command
def benchmark(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help=".keras, .tflite and .onnx files.")],
    data: DataReference = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="The file that others are compared with; the first by default."),
    ] = None,
    rescale: Rescale = None,
    take: Take = None,
    skip: Skip = None,
    threads: Annotated[
        str, typer.Option("--threads", metavar="N[,N...]", help="Threads of the runtime; several are swept.")
    ] = "1",
    batch: Annotated[
        str, typer.Option("--batch", metavar="N[,N...]", help="Samples per inference; several are swept.")
    ] = "1",
    device: Annotated[
        str,
        typer.Option("--device", metavar="NAME[,NAME...]", help="cpu, gpu, tensorrt or openvino; several are swept."),
    ] = "cpu",
    energy: Annotated[bool, typer.Option("--energy", help="Energy too, where the machine counts it.")] = False,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="A second table with every metric and its interval.")
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="MODULE:FUNCTION", help="A metric of your own: function(labels, outputs). Repeatable."
        ),
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Fresh processes per file.")] = 3,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON here too.")
    ] = None,
    allow_import: AllowImport = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure accuracy, agreement, size, memory and latency of files in the runtimes that execute them."""
    from compress.cli.terminal import print_json, print_table, say
    from compress.measure.benchmarking import benchmark_files
    from compress.measure.own_metrics import find_metrics

    packages = tuple(allow_import or ())
    report = benchmark_files(
        files,
        load_test_split(data, rescale, take, skip, packages),
        reference=reference,
        threads=_counts(threads, "--threads"),
        batch=_counts(batch, "--batch"),
        devices=[each.strip() for each in device.split(",")],
        energy=energy,
        metrics=find_metrics({each.rpartition(":")[2]: each for each in metric or ()}, packages),
        processes=processes,
        allow_imports=packages,
    ).with_short_names()
    if output:
        from compress.files import atomic_path

        with atomic_path(Path(output)) as temporary:
            temporary.write_text(report.to_json())
    if json_output:
        print_json(report.model_dump(mode="json", by_alias=True))
        return
    print_table(*report.rows())
    if metrics or metric:
        print_table(*report.metric_rows())
    for result in report.results:
        if result.energy is not None:
            used = result.energy
            told = used.reasons.get("joules") or f"{1000 * used.joules:.3g} mJ a sample ({used.source})"
            say(f"energy of {result.file}: {told}")
        if result.gpu_memory is not None:
            held = result.gpu_memory.held_bytes
            told = f"{held:,} bytes" if held is not None else result.gpu_memory.reasons["held_bytes"]
            say(f"GPU memory of {result.file}: {told}")
    for warning in report.warnings:
        say(f"note: {warning}")


def _counts(text: str, option: str) -> list[int]:
    """Return the numbers of a list such as `"1,2,4"`."""
    from compress.errors import UsageError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"expected {option} to be numbers from 1, such as 1,2,4. Received: {text}")
    return [int(part) for part in parts]


@command
def profile(
    file: Annotated[str, typer.Argument(help="A .tflite or .onnx file.")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="FILE", help="The .keras file it came from: layers are then told exactly."),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="operator, or sums by layer or type.")] = "operator",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples per inference.")] = 1,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Timed runs.")] = 50,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the time of each operator of an exported file, and the Keras layer that it comes from."""
    from compress.cli.terminal import print_json, print_table
    from compress.errors import UsageError
    from compress.measure.profiling import profile_file
    from compress.text import printable

    if by not in ("operator", "layer", "type"):
        raise UsageError(f"expected --by to be operator, layer or type. Received: {by}")
    found = profile_file(file, model=model, threads=threads, batch=batch, runs=runs)
    if json_output:
        print_json(found.model_dump(mode="json", by_alias=True))
        return
    print_table(*found.rows(by), title=printable(file))
    for line in found.sentences():
        print(printable(line))
