"""The command `sensitivity`: which layers of a model suffer from quantization, or from zeros."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.command import AllowImport, DataReference, Json, Quiet, Rescale, Skip, Take, command
from compress.cli.files import load_test_split
from compress.cli.passes import Exclude, Include

if TYPE_CHECKING:
    import keras

    from compress.data.split import Split
    from compress.pruning.sensitivity import PruningSensitivity
    from compress.quantization.sensitivity import LayerSensitivity


class Change(StrEnum):
    """What is done to a layer."""

    quantization = "quantization"
    sparsity = "sparsity"


@command
def sensitivity(
    model: Annotated[str, typer.Argument(help="A .keras file, float or fake-quantized.")],
    data: DataReference = None,
    of: Annotated[Change, typer.Option("--of", help="What is done to one layer at a time.")] = Change.quantization,
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", help="How a float model is quantized, such as int8_weights; int8 by default."),
    ] = None,
    sparsities: Annotated[
        str | None, typer.Option("--sparsities", metavar="LIST", help="Shares of zeros to try, such as 50%,80%,90%.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="Which weights are pruned together: 2:4, 4x1.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw it too: .png, .svg or .pdf; needs matplotlib.")
    ] = None,
    rescale: Rescale = None,
    take: Take = None,
    skip: Skip = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to compare outputs on.")] = 256,
    allow_import: AllowImport = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize or prune each layer alone and show how far the outputs move."""
    from compress.cli.terminal import say
    from compress.errors import UsageError

    _refuse_others(of, {"--scheme": scheme}, {"--sparsities": sparsities, "--pattern": pattern})
    if of is Change.quantization and (include or exclude):
        raise UsageError("--include and --exclude go with --of sparsity; quantization shows all layers.")
    if scheme is not None:
        from compress.quantization.schemes import find_scheme

        find_scheme(scheme)
    tried = _parse_sparsities(sparsities)
    if data is None:
        raise UsageError("expected samples. Received: no --data", "Name some, such as --data npz:FILE.")
    if plot:
        from compress.cli.plots import require_plots

        require_plots(plot)
    say("loading TensorFlow ...")
    from compress.models.opening import load_model

    packages = tuple(allow_import or ())
    loaded = load_model(model, allow_imports=packages)
    split = load_test_split(data, rescale, take, skip, packages)
    if of is Change.quantization:
        _of_quantization(loaded, split, model, scheme, samples, plot, json_output)
        return
    options: dict[str, Any] = {"include": tuple(include or ("*",)), "exclude": tuple(exclude or ())}
    options |= {name: value for name, value in (("sparsities", tried), ("pattern", pattern)) if value}
    _of_sparsity(loaded, split, model, options, samples, plot, json_output)


def _refuse_others(of: Change, *options: dict[str, Any]) -> None:
    """Refuse options that belong to the other change."""
    from compress.errors import UsageError

    others = options[0] if of is Change.sparsity else options[1]
    for name, value in others.items():
        if value is not None:
            raise UsageError(f"{name} does not go with --of {of}. Received: {name} {value}")


def _parse_sparsities(text: str | None) -> tuple[float, ...] | None:
    from compress.errors import UsageError
    from compress.options import parse_fraction
    from compress.strict_yaml import parse_scalar

    if text is None:
        return None
    try:
        return tuple(float(parse_fraction(parse_scalar(part.strip()))) for part in text.split(","))
    except (TypeError, ValueError):
        raise UsageError(f"--sparsities: expected shares such as 0.5,0.8 or 50%,80%. Received: {text!r}") from None


def _of_quantization(
    model: keras.Model, split: Split, path: str, scheme: str | None, samples: int, plot: str | None, json_output: bool
) -> None:
    from compress.cli.plots import plot_bars
    from compress.cli.terminal import print_json, print_table, printable
    from compress.errors import UsageError
    from compress.quantization.deployment import is_fake_quantized
    from compress.quantization.model_sensitivity import measure_sensitivity

    if scheme is not None and is_fake_quantized(model):
        raise UsageError(f"expected a float model for --scheme. Received: {path}, which is fake-quantized already")
    found: list[LayerSensitivity] = measure_sensitivity(model, split, scheme=scheme or "int8", samples=samples)
    if plot:
        plot_bars({each.layer: each.loss for each in found}, "loss when quantized alone", plot)
    if json_output:
        print_json([{"layer": each.layer, "loss": _finite(each.loss)} for each in found])
        return
    total = sum(max(each.loss, 0.0) for each in found)
    rows = [
        [each.layer, f"{each.loss:.3e}", f"{max(each.loss, 0.0) / total:.1%}" if total > 0 else "-"] for each in found
    ]
    print_table(("layer", "loss", "share"), rows, title=printable(path))
    print(f"loss: what quantizing this layer alone does to the outputs: {_UNITS}")


def _of_sparsity(
    model: keras.Model,
    split: Split,
    path: str,
    options: dict[str, Any],
    samples: int,
    plot: str | None,
    json_output: bool,
) -> None:
    from compress.cli.plots import plot_curves
    from compress.cli.terminal import print_json, print_table, printable
    from compress.data.split import as_split
    from compress.pruning.sensitivity import pruning_sensitivity

    chosen = split.sample(samples) if split.in_memory else as_split("sensitivity", split.head(samples))
    name, evaluate = _metric_of(model, chosen)
    found = pruning_sensitivity(model, chosen, evaluate=evaluate, samples=samples, **options)
    if plot:
        _plot_sparsity(found, name, plot, plot_curves)
    if json_output:
        print_json(_with_finite(found.to_dict() | {"metric_name": name}))
        return
    tried = [point.sparsity for point in found.kernels[0].points]
    rows = []
    for kernel in found.kernels:
        cells = [
            f"{point.loss:.1e}" + ("" if point.metric is None else f" ({point.metric:.4g})") for point in kernel.points
        ]
        rows.append([printable(kernel.path), f"{kernel.size:,}", *cells])
    print_table(("kernel", "weights", *(f"{each:.0%} zeros" for each in tried)), rows, title=printable(path))
    print(f"what pruning this kernel alone does to the outputs: {_UNITS}")
    if name:
        print(f"in brackets: {name} on {len(chosen)} samples; {found.metric:.4g} before")


def _metric_of(model: keras.Model, split: Split) -> tuple[str | None, Callable[[keras.Model], float] | None]:
    """Return the primary metric of the model's task and what measures it, or `None` for both without labels."""
    if not split.has_labels:
        return None, None
    from compress.measure.in_process import measure_model
    from compress.models.task import infer_task

    x, y = split.head(256)
    task = infer_task(model, y, x)
    name = next(iter(measure_model(model, split, task)), None)
    return name, (lambda each: measure_model(each, split, task)[name]) if name else None


def _plot_sparsity(found: PruningSensitivity, name: str | None, plot: str, draw: Callable[..., None]) -> None:
    tried = [point.sparsity for point in found.kernels[0].points]
    by_loss = name is None
    curves: dict[str, Any] = {
        kernel.path: [point.loss if by_loss else point.metric for point in kernel.points] for kernel in found.kernels
    }
    draw(tried, curves, "share of zeros in one kernel", "loss" if by_loss else name, plot)


_UNITS = "KL divergence in nats where they are probabilities, else squared error in units of their variance"


def _with_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_finite(each) for each in value]
    return _finite(value) if isinstance(value, float) else value


def _finite(value: float) -> float | None:
    """Return a number that JSON can hold: `None` for NaN and infinity."""
    return value if abs(value) < float("inf") else None
