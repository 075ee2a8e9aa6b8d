"""What a recipe's `data:` section and `--data REF` mean: where each split comes from and what is taken of it.

Plain options that are validated before anything is opened; `compress.data.loading` loads them. Imports no
framework and no NumPy, so that a recipe is checked in milliseconds.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.data.grammar import FACTORY_PATTERN, parse_source
from compress.errors import UsageError
from compress.options import Fraction, Options

SplitName = Literal["train", "validation", "test", "unlabelled"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test", "unlabelled")

_Source = TypeVar("_Source", bound="SourceOptions")


class Step(Options):
    """One change made to every sample; exactly one key, except that `offset` may stand beside `rescale`."""

    rescale: Fraction | None = Field(default=None, allow_inf_nan=False)
    """Multiply every input by this, such as `1/255`; integers become float32."""
    offset: float | None = Field(default=None, allow_inf_nan=False)
    """Add this to every input, after `rescale` where both are given; integers become float32."""
    expand_dims: int | None = None
    """Add an axis of length 1 to every input at this position; `-1` is last, `0` is refused."""
    flatten: Literal[True] | None = None
    """Make every input one vector per sample."""
    cast: Literal["float16", "float32", "float64", "int32", "int64", "uint8"] | None = None
    """Change the data type of every input."""
    one_hot: int | None = Field(default=None, ge=2)
    """Turn integer labels into vectors of this length."""

    @model_validator(mode="after")
    def _check_one(self) -> Step:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1 and set(given) != {"rescale", "offset"}:
            known = ", ".join(type(self).model_fields)
            raise ValueError(
                f"a preprocessing step has exactly one key of {known}. Received: {', '.join(given) or 'none'}"
            )
        if self.expand_dims == 0:
            raise ValueError("expand_dims must not be 0, the axis of the samples. Received: 0")
        return self

    def __str__(self) -> str:
        given = self.model_dump(exclude_none=True).items()
        return " ".join("flatten" if key == "flatten" else f"{key} {value}" for key, value in given)


class SourceOptions(Options):
    """What is taken of a source: `shuffle` first, then `skip`, `take` and the steps of `preprocess`."""

    shuffle: bool = False
    """Put the samples in a random order, drawn once from the seed; `take` is then a random subset."""
    skip: int = Field(default=0, ge=0)
    """Samples to leave out at the beginning."""
    take: int | None = Field(default=None, ge=1)
    """Samples to keep after those skipped; by default all."""
    labels: bool = True
    """Whether labels are used; the unlabelled split never has any."""
    preprocess: tuple[Step, ...] = ()
    """Changes made to every sample, in order. Without any, samples go to the model as stored."""


class SetOptions(SourceOptions):
    """A source that may have several splits."""

    split: Literal["train", "validation", "test", "unlabelled", "all"] | None = None
    """Which split of the source, by default the one of the same name; `all` is every sample."""


class BuiltInSet(SetOptions):
    """A public data set: digits ships with scikit-learn, the others are downloaded by Keras."""

    type: Literal["builtin"] = "builtin"
    """Kind of source."""
    name: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100"]
    """The data set."""


class NpzFile(SetOptions):
    """Arrays saved with `numpy.savez`; pickled objects are never loaded."""

    type: Literal["npz"] = "npz"
    """Kind of source."""
    path: str = Field(min_length=1)
    """The file; a relative path counts from the recipe's folder."""
    x: str | tuple[str, ...] | dict[str, str] | None = None
    """Array of the inputs, or one per input: in order or by input name. By default `x_train`, ... or `x`."""
    y: str | tuple[str, ...] | dict[str, str] | None = None
    """Array of the labels, or one per output. By default `y_train`, ... or `y`."""

    @field_validator("x", "y")
    @classmethod
    def _check_named(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("expected the name of at least one array")
        return value


def _parse_size(value: Any) -> Any:
    if isinstance(value, (str, int)):
        parts = str(value).split("x")
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise ValueError(f"expected height x width such as `96x96`. Received: {value!r}")
        return tuple(int(part) for part in parts)
    return value


_Side = Annotated[int, Field(ge=1, le=8192)]


class ImageFolder(SetOptions):
    """PNG, JPEG, GIF or BMP images, one folder per class, optionally below `train/`, `test/`, ..."""

    type: Literal["image_folder"] = "image_folder"
    """Kind of source."""
    path: str = Field(min_length=1)
    """The folder; a relative path counts from the recipe's folder."""
    size: Annotated[tuple[_Side, _Side], BeforeValidator(_parse_size, json_schema_input_type=tuple[int, int] | str)]
    """Height and width that images are resized to, in pixels: `[96, 96]` or `96x96`."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    classes: tuple[str, ...] | None = None
    """Class folders in the order of their labels; by default sorted by name."""


class PythonFactory(SetOptions):
    """A function that returns data; it runs only when its package is allowed with `--allow-import`."""

    type: Literal["python"] = "python"
    """Kind of source."""
    factory: str = Field(pattern=FACTORY_PATTERN)
    """`package.module:function`. A parameter called `split` is given the name of the split that is wanted."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""


class SplitReference(SourceOptions):
    """Samples of another split."""

    type: Literal["ref"] = "ref"
    """Kind of source."""
    of: SplitName
    """The split they are taken from, after its own `skip`, `take` and `preprocess`."""


_KINDS: dict[str, type[SourceOptions]] = {
    "builtin": BuiltInSet,
    "npz": NpzFile,
    "image_folder": ImageFolder,
    "python": PythonFactory,
    "ref": SplitReference,
}


def _read_source(value: Any) -> Any:
    """Return a mapping or a string as the source that it is, with messages that name the nearest kind."""
    if isinstance(value, str):
        mapping = parse_source(value)
        try:
            return _KINDS[mapping["type"]].model_validate(mapping)
        except ValidationError as error:
            raise ValueError(_explain(error.errors()[0], mapping["type"])) from None
    if isinstance(value, dict) and value.get("type") not in _KINDS:
        kind = value.get("type")
        if kind is None:
            raise ValueError(f"`type` is required. Known: {', '.join(_KINDS)}")
        near = difflib.get_close_matches(str(kind), _KINDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(_KINDS)}."
        raise ValueError(f"unknown type of data; {hint} Received: {kind!r}")
    return value


_AnySource = Annotated[BuiltInSet | NpzFile | ImageFolder | PythonFactory | SplitReference, Field(discriminator="type")]
Source = Annotated[_AnySource, BeforeValidator(_read_source, json_schema_input_type=_AnySource | str)]
"""Where one split comes from: a mapping with `type`, or a string such as `npz:file.npz`."""


def _accept_text_schema(schema: dict[str, Any]) -> None:
    described = {key: schema.pop(key) for key in ("title", "description") if key in schema}
    spelled_out = dict(schema)
    schema.clear()
    schema.update(described, anyOf=[{"type": "string"}, spelled_out])


class DataOptions(Options):
    """Where the samples of each split come from; one string such as `digits` gives train and test."""

    model_config = ConfigDict(json_schema_extra=_accept_text_schema)

    train: Source | None = None
    """Samples to train on."""
    validation: Source | None = None
    """Samples to watch while training."""
    test: Source | None = None
    """Samples that measurements are made on."""
    unlabelled: Source | None = None
    """Further inputs without labels, for distillation."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return dict(parse_reference(value)) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_splits(self) -> DataOptions:
        for name in SPLITS:
            source = getattr(self, name)
            if isinstance(source, BuiltInSet) and (source.split or name) == "validation":
                raise ValueError(
                    f"{name}: {source.name} has a train and a test split and no validation split; "
                    "write `split: train` and divide it with `take` and `skip`"
                )
            seen = [name]
            while isinstance(source, SplitReference):
                if source.of in seen:
                    raise ValueError(f"{name}: refers to itself: {' -> '.join([*seen, source.of])}")
                seen.append(source.of)
                source = getattr(self, source.of)
                if source is None:
                    raise ValueError(f"{name}: refers to `{seen[-1]}`, which the data section does not have")
        return self

    def resolve(self, folder: Path) -> DataOptions:
        """Return the same options with every path absolute, relative ones counted from `folder`."""

        def resolve_source(source: _Source | None) -> _Source | None:
            if not isinstance(source, (NpzFile, ImageFolder)):
                return source
            return source.model_copy(update={"path": str(Path(folder).absolute() / Path(source.path).expanduser())})

        return self.model_copy(update={name: resolve_source(getattr(self, name)) for name in SPLITS})


def spread_source(source: dict[str, Any]) -> dict[str, Any]:
    """Return the data section that one source stands for: train and test, or only the split it names."""
    split = source.get("split")
    if split is None:
        return {name: {**source, "split": name} for name in ("train", "test")}
    return {split if split in SPLITS else "test": source}


def parse_reference(
    text: str, *, take: int | None = None, skip: int | None = None, rescale: float | str | None = None
) -> DataOptions:
    """Return the splits that a reference stands for: train and test, or the one named by `?split=`.

    Args:
        text: such as `digits`, `npz:FILE?x=left,right`, `folder:PATH?size=96x96`, `module:function?arg=1`.
        take: samples to keep of each split; beats `?take=`.
        skip: samples to leave out at the beginning of each split; beats `?skip=`.
        rescale: factor for every input such as `"1/255"`; beats `?rescale=`.

    Raises:
        UsageError: the reference is none of the known forms, or an option of it is unknown or out of range.
    """
    source = parse_source(text)
    source |= {key: value for key, value in (("take", take), ("skip", skip)) if value is not None}
    if rescale is not None:
        others = [step for step in source.get("preprocess", []) if "rescale" not in step]
        source["preprocess"] = [{"rescale": rescale}, *others]
    try:
        return DataOptions.model_validate(spread_source(source))
    except ValidationError as error:
        raise UsageError(f"data reference {text!r}: {_explain(error.errors()[0], source['type'])}") from None


def _explain(problem: Any, kind: str) -> str:
    key = str(problem["loc"][-1]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        known = [name for name in _KINDS[kind].model_fields if name not in ("type", "preprocess")]
        known += list(Step.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        return f"unknown option `{key}`; " + (f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"`{key}` is required" + (", such as ?size=96x96" if key == "size" else "")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if "Received" in message else f". Received: {problem['input']!r}")
