"""Commands of one pass: each builds a one-pass recipe and runs it, so that flags and files mean the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.command import (
    AllowImport,
    DataReference,
    Json,
    Output,
    Overrides,
    PrintRecipe,
    Quiet,
    Rescale,
    Skip,
    Take,
    Track,
    command,
)

Model = Annotated[str, typer.Argument(help="A trained .keras file.")]
EpochCount = Annotated[int | None, typer.Option("--epochs", min=0, help="Epochs of training.")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate of the training.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Samples per training step.")]
Include = Annotated[list[str] | None, typer.Option("--include", help="Only layers that fit this pattern. Repeatable.")]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="Leave layers alone that fit this pattern. Repeatable.")
]
Formats = Annotated[str, typer.Option("--to", help="Files to export afterwards: tflite, onnx, both, or none.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seeds every step.")]
TargetMacs = Annotated[
    str | None, typer.Option("--target-macs", help="Instead, the share of multiply-accumulates to be left.")
]
TargetParameters = Annotated[
    str | None, typer.Option("--target-parameters", help="Instead, the share of parameters to be left.")
]
TargetBytes = Annotated[
    str | None, typer.Option("--target-bytes", help="Instead, the share of the exported file's bytes to be left.")
]
TargetLatency = Annotated[
    str | None,
    typer.Option("--target-latency", help="Instead, the share of time on this machine: 50% is twice as fast."),
]
Runtime = Annotated[str | None, typer.Option("--runtime", help="For bytes and latency: tflite (the default) or onnx.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of that runtime; 1.")]
Engine = Annotated[
    str | None, typer.Option("--engine", help="Who does it: bmcompress, or tfmot on the model rebuilt in tf_keras.")
]
Teacher = Annotated[
    str | None, typer.Option("--teacher", help="The teacher, a .keras file; `input` is the input model.")
]


@dataclass(frozen=True)
class OnePass:
    """What the command of one pass adds to the options that all of them share.

    Args:
        kind: type of the pass.
        model: the `.keras` file that it starts from.
        options: options of the pass; `None` leaves one to the pass.
        io: type of the files' inputs and outputs.
        unlabelled: reference of further inputs without labels.
    """

    kind: str
    model: str
    options: dict[str, Any]
    io: str = "float32"
    unlabelled: str | None = None


def pass_command(function: Callable[..., OnePass]) -> Callable[..., None]:
    """Make a command that runs, or prints, a recipe of the one pass that `function` returns.

    The command has the options of `function` and those of `_run_one_pass`.
    """

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        own = {name: arguments.pop(name) for name in parameters}
        _run_one_pass(function(**own), **arguments)

    parameters = inspect.signature(function, eval_str=True).parameters
    _, data, *shared = inspect.signature(_run_one_pass, eval_str=True).parameters.values()
    required = [each for each in parameters.values() if each.default is each.empty]
    optional = [each for each in parameters.values() if each.default is not each.empty]
    run.__signature__ = inspect.Signature([*required, data, *optional, *shared])
    return command(run)


def _run_one_pass(
    one: OnePass,
    data: DataReference = None,
    to: Formats = "tflite,onnx",
    output: Output = None,
    rescale: Rescale = None,
    take: Take = None,
    skip: Skip = None,
    seed: Seed = 0,
    set_: Overrides = None,
    track: Track = None,
    allow_import: AllowImport = None,
    print_recipe: PrintRecipe = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    from compress.cli.recipes import run_and_show, tracking_override
    from compress.recipe import load_recipe

    recipe = _recipe(one, parse_formats(to), seed)
    if data:
        recipe["data"] = _data(data, rescale, take, skip)
    if one.unlabelled:
        recipe.setdefault("data", {})["unlabelled"] = _unlabelled(one.unlabelled, rescale)
    loaded = load_recipe(recipe, [*(set_ or ()), *tracking_override(track)])
    if print_recipe:
        print(loaded.to_yaml(), end="")
        return
    run_and_show(loaded, output, allow_import, fresh=False, json_output=json_output)


def _recipe(one: OnePass, formats: list[str], seed: int) -> dict[str, Any]:
    return {
        "schema": "bmcompress/recipe/v1",
        "name": f"{_slug(Path(one.model).stem)}-{one.kind}",
        "seed": seed,
        "model": {"path": one.model},
        "passes": [{"type": one.kind, **{k: v for k, v in one.options.items() if v is not None}}],
        "exports": [{"format": name, **({"io": one.io} if one.io != "float32" else {})} for name in formats],
    }


def _data(reference: str, rescale: str | None, take: int | None, skip: int | None) -> dict[str, Any]:
    from compress.data.references import parse_reference

    options = parse_reference(reference, rescale=rescale, take=take, skip=skip)
    return options.model_dump(mode="json", exclude_none=True)


def _unlabelled(reference: str, rescale: str | None) -> dict[str, Any]:
    """Return the source of inputs without labels; not spread over train and test as --data is, all of it is used."""
    from compress.data.grammar import parse_source

    steps = [{"rescale": rescale}] if rescale else []
    return {"preprocess": steps, **parse_source(reference), "labels": False}


@pass_command
def distill(
    student: Annotated[str, typer.Option("--student", help="The student, a .keras file.")],
    teacher: Annotated[str, typer.Option("--teacher", help="The teacher, a .keras file.")],
    unlabelled: Annotated[
        str | None, typer.Option("--unlabelled", metavar="REF", help="Further inputs that only the teacher labels.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Softens both models' answers.")] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Weight of the teacher; 1 - alpha is the labels'.")
    ] = None,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
) -> OnePass:
    """Train a small student to answer as its teacher does, then export and measure it."""
    options = {
        "teacher": {"path": teacher},
        "temperature": temperature,
        "alpha": alpha,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
    }
    return OnePass("distill", student, options, unlabelled=unlabelled)


@pass_command
def prune(
    model: Model,
    sparsity: Annotated[
        str | None, typer.Option("--sparsity", help="Share of zeros in the kernels, such as 80%; N:M implies it.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="unstructured, N:M along the inputs (2:4), or blocks (4x1, 1x16).")
    ] = None,
    score: Annotated[str | None, typer.Option("--score", help="magnitude, taylor, movement or random.")] = None,
    distribution: Annotated[
        str | None, typer.Option("--distribution", help="uniform, global, erk, lamp or sensitivity.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="xnnpack: just what LiteRT's sparse kernels accept.")
    ] = None,
    regrow: Annotated[
        bool, typer.Option("--regrow", help="Pruned weights with great gradients come back, for others.")
    ] = False,
    reestimate_batch_norm: Annotated[
        bool, typer.Option("--reestimate-batch-norm", help="New statistics at the end; reads training samples.")
    ] = False,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    include: Include = None,
    exclude: Exclude = None,
    teacher: Teacher = None,
    engine: Engine = None,
) -> OnePass:
    """Set the smallest weights to zero while training goes on; --epochs 0 needs no data."""
    from compress.errors import UsageError
    from compress.strict_yaml import parse_scalar

    if sparsity is None and ":" not in (pattern or ""):
        raise UsageError("expected --sparsity, such as 80%, unless the pattern is one of N:M. Received: none")

    options = {
        "sparsity": None if sparsity is None else parse_scalar(sparsity),
        "pattern": pattern,
        "score": score,
        "distribution": distribution,
        "profile": profile,
        "regrow": {} if regrow else None,
        "reestimate_batch_norm": reestimate_batch_norm or None,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "include": include,
        "exclude": exclude,
        "engine": engine,
        "teacher": {"path": teacher} if teacher not in (None, "input") else teacher,
    }
    return OnePass("prune", model, options)


def _one_target(others: dict[str, Any], targets: dict[str, str | None]) -> dict[str, Any] | None:
    """Return the target by what it is of, or nothing; one of the options in all must be given."""
    from compress.errors import UsageError
    from compress.strict_yaml import parse_scalar

    found = {cost: parse_scalar(left) for cost, left in targets.items() if left is not None}
    if len(found) + sum(value is not None for value in others.values()) != 1:
        names = [*others, *(f"--target-{cost}" for cost in targets)]
        raise UsageError(f"expected one of {', '.join(names)}.")
    return found or None


@pass_command
def prune_channels(
    model: Model,
    ratio: Annotated[
        str | None, typer.Option("--ratio", help="Share of the channels to remove, such as 0.5 or 50%.")
    ] = None,
    target_macs: TargetMacs = None,
    target_parameters: TargetParameters = None,
    target_bytes: TargetBytes = None,
    target_latency: TargetLatency = None,
    runtime: Runtime = None,
    threads: Threads = None,
    importance: Annotated[
        str | None,
        typer.Option("--importance", help="l1, l2, bn_scale, fpgm, taylor, hessian, activation or random."),
    ] = None,
    ranking: Annotated[
        str | None, typer.Option("--ranking", help="local: each group loses this share; global: all together do.")
    ] = None,
    multiple_of: Annotated[
        int | None, typer.Option("--multiple-of", min=1, help="Round numbers of channels to a multiple; 8 by default.")
    ] = None,
    norm: Annotated[
        str | None, typer.Option("--norm", help="allow: channels under LayerNormalization may go, too.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Try out layers that nobody knows instead of leaving them as they are.")
    ] = False,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Rounds of cutting and training.")] = None,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    include: Include = None,
    exclude: Exclude = None,
    teacher: Teacher = None,
) -> OnePass:
    """Remove whole channels, then train; --epochs 0 only cuts and needs no data."""
    from compress.strict_yaml import parse_scalar

    target = _one_target(
        {"--ratio": ratio},
        {"macs": target_macs, "parameters": target_parameters, "bytes": target_bytes, "latency": target_latency},
    )
    options = {
        "ratio": None if ratio is None else parse_scalar(ratio),
        "target": target,
        "runtime": runtime,
        "threads": threads,
        "importance": importance,
        "ranking": ranking,
        "multiple_of": multiple_of,
        "norm": norm,
        "probe": probe or None,
        "steps": steps,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "include": include,
        "exclude": exclude,
        "teacher": {"path": teacher} if teacher not in (None, "input") else teacher,
    }
    return OnePass("prune_channels", model, options)


@pass_command
def prune_blocks(
    model: Model,
    count: Annotated[int | None, typer.Option("--count", min=1, help="How many residual blocks go.")] = None,
    target_macs: TargetMacs = None,
    target_parameters: TargetParameters = None,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    include: Include = None,
    exclude: Exclude = None,
    teacher: Teacher = None,
) -> OnePass:
    """Drop whole residual blocks, those first without which the outputs change least, then train."""
    options = {
        "count": count,
        "target": _one_target({"--count": count}, {"macs": target_macs, "parameters": target_parameters}),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "include": include,
        "exclude": exclude,
        "teacher": {"path": teacher} if teacher not in (None, "input") else teacher,
    }
    return OnePass("prune_blocks", model, options)


@pass_command
def factorize(
    model: Model,
    energy: Annotated[
        str | None, typer.Option("--energy", help="Share of the squared singular values to keep, such as 0.9.")
    ] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", help="Instead, a number of components, or a share of them below 1.")
    ] = None,
    target_macs: TargetMacs = None,
    target_parameters: TargetParameters = None,
    target_bytes: TargetBytes = None,
    target_latency: TargetLatency = None,
    runtime: Runtime = None,
    threads: Threads = None,
    method: Annotated[str | None, typer.Option("--method", help="auto, svd, spatial or tucker.")] = None,
    multiple_of: Annotated[
        int | None, typer.Option("--multiple-of", min=1, help="Round ranks up to a multiple; 8 by default.")
    ] = None,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    include: Include = None,
    exclude: Exclude = None,
    teacher: Teacher = None,
) -> OnePass:
    """Write kernels as products of smaller ones where that is cheaper, then train; --epochs 0 needs no data."""
    from compress.strict_yaml import parse_scalar

    target = _one_target(
        {"--energy": energy, "--rank": rank},
        {"macs": target_macs, "parameters": target_parameters, "bytes": target_bytes, "latency": target_latency},
    )
    options = {
        "energy": None if energy is None else parse_scalar(energy),
        "rank": None if rank is None else parse_scalar(rank),
        "target": target,
        "runtime": runtime,
        "threads": threads,
        "method": method,
        "multiple_of": multiple_of,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "include": include,
        "exclude": exclude,
        "teacher": {"path": teacher} if teacher not in (None, "input") else teacher,
    }
    return OnePass("factorize", model, options)


@pass_command
def cluster(
    model: Model,
    clusters: Annotated[int, typer.Option("--clusters", min=2, help="The most distinct values of a kernel: 16, 32.")],
    initialisation: Annotated[
        str | None, typer.Option("--initialisation", help="Where the values start: linear, density or k-means++.")
    ] = None,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="Each output channel of a kernel has values of its own.")
    ] = False,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    include: Include = None,
    exclude: Exclude = None,
    teacher: Teacher = None,
    engine: Engine = None,
) -> OnePass:
    """Share a few values among the weights of each kernel while training goes on; --epochs 0 needs no data."""
    options = {
        "clusters": clusters,
        "initialisation": initialisation,
        "granularity": "per_channel" if per_channel else None,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "include": include,
        "exclude": exclude,
        "engine": engine,
        "teacher": {"path": teacher} if teacher not in (None, "input") else teacher,
    }
    return OnePass("cluster", model, options)


@pass_command
def finetune(
    model: Model,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
) -> OnePass:
    """Train on, with the zeros of earlier passes held."""
    options = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    return OnePass("finetune", model, options)


def parse_formats(to: str) -> list[str]:
    """Return the export formats in a list such as `"tflite,onnx"`; `"none"` gives an empty list."""
    from compress.errors import UsageError

    names = [name.strip().lower() for name in to.split(",") if name.strip()]
    if names == ["none"]:
        return []
    if not names or set(names) - {"tflite", "onnx"}:
        raise UsageError(f"--to: expected tflite, onnx, both with a comma between, or none. Received: {to!r}")
    return list(dict.fromkeys(names))


def _slug(text: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in text).strip("-._")
    return kept[:48] or "model"
