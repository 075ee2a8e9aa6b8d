"""Commands of one pass: each builds a one-pass recipe and runs it, so that flags and files mean the same."""

from __future__ import annotations

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
Teacher = Annotated[
    str | None, typer.Option("--teacher", help="The teacher, a .keras file; `input` is the input model.")
]


@command
def distill(
    student: Annotated[str, typer.Option("--student", help="The student, a .keras file.")],
    teacher: Annotated[str, typer.Option("--teacher", help="The teacher, a .keras file.")],
    data: DataReference = None,
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
    to: Formats = "tflite,onnx",
    output: Output = None,
    rescale: Rescale = None,
    take: Take = None,
    skip: Skip = None,
    seed: Seed = 0,
    set_: Overrides = None,
    allow_import: AllowImport = None,
    print_recipe: PrintRecipe = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small student to answer as its teacher does, then export and measure it."""
    from compress.data.grammar import parse_source

    options = {
        "teacher": {"path": teacher},
        "temperature": temperature,
        "alpha": alpha,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
    }
    data_options = {"reference": data, "rescale": rescale, "take": take, "skip": skip}
    recipe = one_pass_recipe("distill", student, options, data_options, to, seed)
    if unlabelled:
        # Not spread over train and test, as --data is: all that the reference holds is used.
        steps = [{"rescale": rescale}] if rescale else []
        source = {"preprocess": steps, **parse_source(unlabelled), "labels": False}
        recipe.setdefault("data", {})["unlabelled"] = source
    run_or_print(recipe, output, set_, allow_import, print_recipe, json_output)


@command
def prune(
    model: Model,
    sparsity: Annotated[str, typer.Option("--sparsity", help="Share of zeros in every kernel, such as 0.8 or 80%.")],
    data: DataReference = None,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    include: Include = None,
    exclude: Exclude = None,
    teacher: Teacher = None,
    to: Formats = "tflite,onnx",
    output: Output = None,
    rescale: Rescale = None,
    take: Take = None,
    skip: Skip = None,
    seed: Seed = 0,
    set_: Overrides = None,
    allow_import: AllowImport = None,
    print_recipe: PrintRecipe = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Set the smallest weights to zero while training goes on; --epochs 0 needs no data."""
    from compress.strict_yaml import parse_scalar

    options = {
        "sparsity": parse_scalar(sparsity),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "include": include,
        "exclude": exclude,
        "teacher": {"path": teacher} if teacher not in (None, "input") else teacher,
    }
    data_options = {"reference": data, "rescale": rescale, "take": take, "skip": skip}
    recipe = one_pass_recipe("prune", model, options, data_options, to, seed)
    run_or_print(recipe, output, set_, allow_import, print_recipe, json_output)


@command
def finetune(
    model: Model,
    data: DataReference = None,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    to: Formats = "tflite,onnx",
    output: Output = None,
    rescale: Rescale = None,
    take: Take = None,
    skip: Skip = None,
    seed: Seed = 0,
    set_: Overrides = None,
    allow_import: AllowImport = None,
    print_recipe: PrintRecipe = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train on, with the zeros of earlier passes held."""
    options = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    data_options = {"reference": data, "rescale": rescale, "take": take, "skip": skip}
    recipe = one_pass_recipe("finetune", model, options, data_options, to, seed)
    run_or_print(recipe, output, set_, allow_import, print_recipe, json_output)


def parse_formats(to: str) -> list[str]:
    """Return the export formats in a list such as `"tflite,onnx"`; `"none"` gives an empty list."""
    from compress.errors import UsageError

    names = [name.strip().lower() for name in to.split(",") if name.strip()]
    if names == ["none"]:
        return []
    if not names or set(names) - {"tflite", "onnx"}:
        raise UsageError(f"--to: expected tflite, onnx, both with a comma between, or none. Received: {to!r}")
    return list(dict.fromkeys(names))


def one_pass_recipe(
    kind: str, model: str, options: dict, data: dict, to: str, seed: int, io: str = "float32"
) -> dict[str, Any]:
    """Return the recipe, as plain values, that a one-pass command stands for."""
    from compress.data.references import parse_reference

    recipe: dict[str, Any] = {
        "schema": "bmcompress/recipe/v1",
        "name": f"{_slug(Path(model).stem)}-{kind}",
        "seed": seed,
        "model": {"path": model},
        "passes": [{"type": kind, **{k: v for k, v in options.items() if v is not None}}],
        "exports": [{"format": name, **({"io": io} if io != "float32" else {})} for name in parse_formats(to)],
    }
    if data["reference"]:
        options = parse_reference(data["reference"], rescale=data["rescale"], take=data["take"], skip=data["skip"])
        recipe["data"] = options.model_dump(mode="json", exclude_none=True)
    return recipe


def _slug(text: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in text).strip("-._")
    return kept[:48] or "model"


def run_or_print(
    recipe: dict, output: str | None, overrides: Any, allow_import: Any, print_recipe: bool, json_output: bool
) -> None:
    from compress.cli.recipes import run_and_show
    from compress.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if print_recipe:
        print(loaded.to_yaml(), end="")
        return
    run_and_show(loaded, output, allow_import, fresh=False, json_output=json_output)
