"""Recipes: YAML <-> `Recipe`. The schema is the classes themselves; every problem is reported at once with its line."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, SerializeAsAny, TypeAdapter, ValidationError, field_validator, model_validator

from compress.data.references import DataOptions
from compress.errors import RecipeError
from compress.gate.budgets import Budget
from compress.options import Options
from compress.passes import BUILT_IN, find_pass, plugins
from compress.passes.base import ModelFile, Name, Pass
from compress.strict_yaml import Document, Place, parse_yaml, read_yaml
from compress.tracking.tracker import TrackerName

SCHEMA = "bmcompress/recipe/v1"


class Export(Options):
    """One file to write from the final model."""

    format: Literal["tflite", "onnx"]
    """The kind of file."""
    opset: int = Field(default=17, ge=13, le=18)
    """ONNX operator set; not used by TFLite."""
    io: Literal["float32", "int8", "uint8"] = "float32"
    """Type of inputs and outputs; integers only after a pass that quantizes activations."""
    weights: Literal["uint8", "int8"] = "uint8"
    """How ONNX files hold 8-bit weights: `uint8` is exact on every CPU, `int8` suits accelerators."""
    sparse: Literal["never", "auto"] = "never"
    """Whether a TFLite file leaves out zeros of pruned weights where that makes it smaller (`auto`); runs as fast."""
    tolerance: float | None = Field(default=None, gt=0)
    """Largest accepted difference to the Keras model, relative to the largest output; by default 1e-4 in float32, and
    one step of its integers on average where the output is quantized."""


class Benchmark(Options):
    """How the exported files are measured."""

    enabled: bool = True
    """Whether latency and memory are measured; accuracy and size always are."""
    threads: int = Field(default=1, ge=1, le=256)
    """Threads of the runtime."""
    batch: int = Field(default=1, ge=1)
    """Samples per inference."""
    processes: int = Field(default=3, ge=1, le=50)
    """Fresh processes per file; the interval of the latency ratio comes from them."""
    pairs: int = Field(default=200, ge=30)
    """Interleaved pairs per process, fewer when inference is slow."""
    include: tuple[ModelFile, ...] = ()
    """Further models to show beside the results, such as a teacher."""


class Recipe(Options):
    """A trained model, the passes over it in order, the files to export, and the budgets they must keep."""

    schema_: Literal["bmcompress/recipe/v1"] = Field(default=SCHEMA, alias="schema")
    """Version of the recipe's format."""
    name: Name
    """Names the run directory."""
    description: str = ""
    """What the recipe is for."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seeds every step, so that a run can be repeated."""
    model: ModelFile
    """The trained model that the recipe starts from."""
    data: DataOptions = DataOptions()
    """Where samples come from."""
    passes: tuple[SerializeAsAny[Pass], ...] = ()
    """The passes in the order in which they run."""
    exports: tuple[Export, ...] = ()
    """The files to write from the final model."""
    benchmark: Benchmark = Benchmark()
    """How the exported files are measured."""
    budgets: tuple[Budget, ...] = ()
    """What the exported files must keep; a broken budget ends the run with exit code 6."""
    tracking: tuple[TrackerName, ...] = ()
    """Where the run is shown too while it goes on."""

    @field_validator("model", mode="before")
    @classmethod
    def _model_from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("tracking", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("passes", mode="before")
    @classmethod
    def _passes_by_type(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError("expected a list of passes")
        return tuple(item if isinstance(item, Pass) else find_pass(item["type"]).model_validate(item) for item in value)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        ids = [p.id for p in self.passes]
        if repeated := {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"two passes have the id `{sorted(repeated)[0]}`; give one of them another `id:`")
        formats = [e.format for e in self.exports]
        if repeated := {f for f in formats if formats.count(f) > 1}:
            raise ValueError(f"`{sorted(repeated)[0]}` is exported twice")
        for budget in self.budgets:
            if budget.artifact not in formats and budget.artifact != "keras":
                raise ValueError(
                    f"a budget names the artifact `{budget.artifact}`, which is not exported; exports: {formats}"
                )
            if budget.metrics:
                raise ValueError("metrics of your own are judged by `bmcompress check` with a budget file alone")
        return self

    def digest(self) -> str:
        """Return the sha256 of what the recipe says; equal recipes have equal digests."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, defaults included."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(_without_nothing(self.to_dict()), sort_keys=False, width=110)

    def resolve(self, folder: Path) -> Recipe:
        """Return the recipe with every path absolute, counted from `folder`."""

        def resolve_pass(item: Pass) -> Pass:
            return item.model_copy(update={k: v.resolve(folder) for k, v in item.model_files().items()})

        include = tuple(file.resolve(folder) for file in self.benchmark.include)
        return self.model_copy(
            update={
                "model": self.model.resolve(folder),
                "data": self.data.resolve(folder),
                "passes": tuple(resolve_pass(p) for p in self.passes),
                "benchmark": self.benchmark.model_copy(update={"include": include}),
            }
        )


def load_recipe(source: str | Path | dict | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Return a validated recipe whose paths are absolute.

    Args:
        source: a YAML file, whose folder relative paths count from, or a mapping or `Recipe`, for which they count
            from the current folder.
        overrides: `path=value` settings such as `"passes.prune.sparsity=0.8"`, which beat the file.

    Raises:
        RecipeError: every problem of the file, each with its line.
    """
    if isinstance(source, Recipe):
        source = source.to_dict()
    if isinstance(source, dict):
        document, folder = Document(source), Path.cwd()
    else:
        document, folder = read_yaml(source), Path(source).resolve().parent
    if overrides:
        document = apply_overrides(document, overrides)
    return validate_document(document, Recipe).resolve(folder)


def validate_document(document: Document, model: type[Options]) -> Any:
    """Return `document` as an instance of `model`, or raise RecipeError with every problem and its line."""
    problems = list(_pass_problems(document)) if model is Recipe else []
    value = dict(document.value)
    if problems:  # the other sections are still checked, so that all problems come at once
        value["passes"] = []
    result = None
    try:
        result = model.model_validate(value)
    except ValidationError as error:
        problems += [_describe(document, item, (), model) for item in error.errors()]
    if problems:
        ordered = sorted(set(problems), key=lambda problem: (problem[0] or 0, problem[1]))
        raise RecipeError("\n".join(f"{document.source}:{line or '-'}: {text}" for line, text in ordered))
    return result


def _pass_problems(document: Document) -> Iterable[tuple[int | None, str]]:
    """Validate each pass by its own class: a union's messages would name the union, not the option."""
    passes = document.value.get("passes", [])
    if not isinstance(passes, (list, tuple)):
        yield document.line_of(("passes",)), "passes: expected a list of passes"
        return
    for index, item in enumerate(passes):
        if isinstance(item, Pass):
            continue
        place: Place = ("passes", index)
        if not isinstance(item, dict) or not isinstance(item.get("type"), str):
            yield (
                document.line_of(place),
                f"passes.{index}: expected a pass such as `{{type: prune, sparsity: 0.8}}`",
            )
            continue
        try:
            kind = find_pass(item["type"])
            kind.model_validate(item)
        except RecipeError as error:
            yield document.line_of((*place, "type")), f"passes.{index}: {error.message}"
        except ValidationError as error:
            yield from (_describe(document, problem, place, kind) for problem in error.errors())


def _describe(document: Document, problem: Any, around: Place, model: type[Options]) -> tuple[int | None, str]:
    """Return the line and the sentence for one pydantic problem found inside `around`, which is a `model`."""
    place = _find_place(document.value, (*around, *problem["loc"]))
    if problem["type"] == "extra_forbidden":
        text = f"unknown key `{place[-1]}`"
        known = _known_keys(model, place[len(around) :])
        nearest = difflib.get_close_matches(str(place[-1]), known, n=1)
        text += f"; did you mean `{nearest[0]}`?" if nearest else f"; known: {', '.join(known)}"
    elif problem["type"] == "missing":
        text = "is required"
    else:
        text = problem["msg"].removeprefix("Value error, ")
        received = problem.get("input")
        if "Received" not in text and isinstance(received, (str, int, float, bool)):
            text += f" (got {received!r})"
    return document.line_of(place), f"{_spell(document.value, place)}: {text}"


def _find_place(value: Any, location: Sequence[str | int]) -> Place:
    """Return pydantic's location as a place in the file: the tags of unions, which stand in no file, are left out."""
    place: list[str | int] = []
    for position, part in enumerate(location):
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]
        elif position < len(location) - 1:
            continue
        place.append(part)
    return tuple(place)


def _spell(value: Any, place: Place) -> str:
    """Return a place as users write it in `--set`: list items that have an id are called by it."""
    parts = []
    for part in place:
        inside = part in value if isinstance(value, dict) else isinstance(value, (list, tuple))
        value = value[part] if inside else None
        named = isinstance(part, int) and isinstance(value, dict)
        parts.append(str((value.get("id") or value.get("type") or part) if named else part))
    return ".".join(parts) or "recipe"


def _known_keys(model: type[Options], place: Place) -> list[str]:
    """Return the keys that the options at `place`, counted from `model`, would take."""
    candidates = [model]
    for part in place[:-1]:
        if isinstance(part, str):
            annotations = [
                f.annotation for c in candidates for n, f in c.model_fields.items() if (f.alias or n) == part
            ]
            candidates = [found for annotation in annotations for found in _options_in(annotation)]
    return sorted({field.alias or name for c in candidates for name, field in c.model_fields.items()})


def _options_in(annotation: Any) -> Iterable[type[Options]]:
    if isinstance(annotation, type) and issubclass(annotation, Options):
        yield annotation
    for inner in get_args(annotation):
        yield from _options_in(inner)


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """Return `document` with each `path=value` set; list items are named by id, type or position."""
    value = copy.deepcopy(document.value)
    lines = dict(document.lines)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise RecipeError(
                f"--set: expected path=value. Received: {override!r}",
                "Such as --set passes.prune.sparsity=0.8",
            )
        try:
            new = parse_yaml(f"value: {text}", source="--set").value["value"]
        except RecipeError as error:
            raise RecipeError(f"--set {path}: {error.message}") from None
        *parents, last = path.split(".")
        target: Any = value
        for depth, part in enumerate(parents):
            target = _step(target, part, f"--set {path}", create=depth > 0 or part in Recipe.model_fields)
        if isinstance(target, list):
            target[_position(target, last, f"--set {path}")] = new
        elif isinstance(target, dict):
            target[last] = new
        else:
            raise RecipeError(f"--set {path}: `{parents[-1]}` holds one value, not keys")
    return Document(value, document.source, lines)


def _step(target: Any, part: str, where: str, create: bool) -> Any:
    if isinstance(target, list):
        return target[_position(target, part, where)]
    if isinstance(target, dict):
        if part not in target and create:
            target[part] = {}
        if part in target:
            return target[part]
        nearest = difflib.get_close_matches(part, [*target, *Recipe.model_fields], n=1)
        raise RecipeError(f"{where}: no entry `{part}`", f"Did you mean `{nearest[0]}`?" if nearest else None)
    raise RecipeError(f"{where}: `{part}` is not inside anything that holds keys")


def _position(items: list, name: str, where: str) -> int:
    """Return the position of the list item called `name`: its id, type, format or artifact, or its position."""
    names = [next((str(item[k]) for k in ("id", "type", "format", "artifact") if k in item), "") for item in items]
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(items):
        return int(name)
    raise RecipeError(f"{where}: no entry `{name}`", f"Known: {', '.join(filter(None, names)) or 'none'}.")


def recipe_schema(model: type = Recipe) -> dict[str, Any]:
    """Return JSON Schema (2020-12) of `model`, in a form that editors can use for completion and checks."""
    schema = TypeAdapter(model).json_schema(by_alias=True)
    if model is Recipe:
        definitions = schema.setdefault("$defs", {})
        kinds = {name: find_pass(name) for name in (*BUILT_IN, *plugins())}
        for name, kind in kinds.items():
            own = kind.model_json_schema(by_alias=True)
            definitions.update(own.pop("$defs", {}))
            own["required"] = sorted({*own.get("required", ()), "type"})
            own["properties"]["type"] = {"const": name}
            definitions[f"pass:{name}"] = own
        schema["properties"]["passes"]["items"] = _choose_by("type", {n: f"#/$defs/pass:{n}" for n in kinds})
        definitions.pop("Pass", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_without_discriminators(schema)}


def _choose_by(key: str, references: dict[str, str]) -> dict[str, Any]:
    """Return a schema that picks by `key`; editors explain `if`/`then` far better than `oneOf`."""
    cases = [
        {"if": {"properties": {key: {"const": name}}, "required": [key]}, "then": {"$ref": reference}}
        for name, reference in references.items()
    ]
    return {
        "type": "object",
        "required": [key],
        "properties": {key: {"enum": list(references)}},
        "allOf": cases,
    }


def _without_discriminators(schema: Any) -> Any:
    """Replace `oneOf` with a discriminator, which editors ignore, by `if`/`then`."""
    if isinstance(schema, list):
        return [_without_discriminators(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "discriminator" in schema and "oneOf" in schema:
        rest = {k: v for k, v in schema.items() if k not in ("discriminator", "oneOf")}
        chooser = schema["discriminator"]
        return {**_without_discriminators(rest), **_choose_by(chooser["propertyName"], chooser["mapping"])}
    return {key: _without_discriminators(item) for key, item in schema.items()}


def _without_nothing(value: Any) -> Any:
    """Leave out what is not set, which reads better and loads to the same recipe."""
    if isinstance(value, dict):
        return {k: _without_nothing(v) for k, v in value.items() if v is not None and v not in ([], {})}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value
