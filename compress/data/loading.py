"""Data references -> `Data`: each split of a data section is read, chosen, checked and preprocessed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.built_in import read_built_in
from compress.data.factories import check_allowed, read_factory
from compress.data.image_folder import list_images, read_image_folder
from compress.data.npz import choose_keys, read_members, read_npz
from compress.data.preprocessing import preprocess_arrays
from compress.data.references import (
    SPLITS,
    BuiltInSet,
    DataOptions,
    ImageFolder,
    NpzFile,
    SetOptions,
    SourceOptions,
    SplitName,
    SplitReference,
    Step,
    parse_reference,
)
from compress.data.samples import Samples, check_finite, choose_rows, hold_out
from compress.data.split import Arrays, Data, Split, array_split, flatten_arrays, map_arrays
from compress.errors import DataError

_LIKE_TRAIN = {"unlabelled": "train"}


def load_data(
    options: DataOptions | str,
    *,
    base_folder: Path | str | None = None,
    allow_imports: Iterable[str] = (),
    seed: int = 0,
    needs: Iterable[str] = SPLITS,
) -> Data:
    """Return the splits of a data section or of a reference such as `"npz:file.npz"`, with notes.

    A set without splits of its own is divided into 80 % train and 20 % test by an order that never changes,
    whatever the seed. Samples are as stored unless `preprocess` says otherwise.

    Args:
        options: where each split comes from.
        base_folder: folder that relative paths count from, by default the current one.
        allow_imports: packages whose functions may run.
        seed: seeds `shuffle: true`.
        needs: the splits to load; those that the section does not have are `None` in the result.

    Raises:
        DataError: a source is missing, broken, empty or not finite; the message names the file and the array.
        RecipeError: a function's package is not among `allow_imports`, or there is no such function.
        UsageError: the reference cannot be understood.
    """
    options = parse_reference(options) if isinstance(options, str) else options
    options = options.resolve(Path.cwd() if base_folder is None else Path(base_folder))
    loader = _Loader(options, _as_names(allow_imports), seed)
    splits = {name: loader.load(name) for name in SPLITS if name in set(needs) and getattr(options, name) is not None}
    loader.note_overlap()
    return Data(**splits, notes=tuple(dict.fromkeys(loader.notes)))


def describe_data(
    options: DataOptions, *, base_folder: Path | str | None = None, allow_imports: Iterable[str] = ()
) -> list[str]:
    """Return one line per split on what would be loaded, from file headers and folder listings alone.

    Raises:
        DataError, RecipeError: as `load_data`, as far as that can be known without reading samples.
    """
    resolved = options.resolve(Path.cwd() if base_folder is None else Path(base_folder))
    lines = []
    for name in SPLITS:
        source = getattr(resolved, name)
        if source is not None:
            parts = [
                _describe_source(source, resolved, name, _as_names(allow_imports)),
                *_describe_choice(source),
            ]
            lines.append(f"{name}: {', '.join(parts)}")
    return lines


def _describe_source(source: Any, options: DataOptions, name: str, allow_imports: tuple[str, ...]) -> str:
    if isinstance(source, SplitReference):
        return f"samples of {source.of}"
    part = source.split or name
    rest = {"train": ", 80 % of it", "unlabelled": ", 80 % of it", "test": ", 20 % of it"}.get(part, "")
    rest = rest if is_divided(options, name) else ""
    labels = source.labels and name != "unlabelled"
    if isinstance(source, BuiltInSet):
        return f"{source.name}, " + ("all of it" if part == "all" else f"its {_LIKE_TRAIN.get(part, part)} part")
    if isinstance(source, NpzFile):
        path = Path(source.path)
        members = read_members(path)
        x, y, whole = choose_keys(source, path, members, part, labels)
        arrays = [f"{key} {members[key][0]} {members[key][1]}" for key in [*flatten_arrays(x), *flatten_arrays(y)]]
        return f"{path.name}: {', '.join(arrays)}{rest if whole else ''}"
    if isinstance(source, ImageFolder):
        found = list_images(source, part, labels)
        size = f"{source.size[0]}x{source.size[1]}x{source.channels}"
        return f"{found.root}: {len(found.files)} images as {size}, {len(found.classes)} classes" + (
            rest if found.whole else ""
        )
    check_allowed(source.factory, allow_imports)
    return f"{source.factory}({', '.join(f'{key}={value!r}' for key, value in source.args.items())})"


def _describe_choice(source: Any) -> list[str]:
    parts = ["shuffled"] if source.shuffle else []
    parts += [f"skip {source.skip}"] if source.skip else []
    parts += [f"take {source.take}"] if source.take is not None else []
    return parts + [str(step) for step in source.preprocess]


def _as_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return `names` as a tuple; a single string is one name, not one per letter."""
    return (names,) if isinstance(names, str) else tuple(names)


def is_divided(options: DataOptions, name: str) -> bool:
    """Return whether the split `name` gets its part of a source without splits, or else all of it.

    It gets its part when it says so with `split:`, when the source is built in, and when another split reads
    the same source; but where one of them uses `skip` and no `split`, the user divides by hand.
    """
    source = getattr(options, name)
    if source.split is not None or isinstance(source, BuiltInSet):
        return source.split != "all"
    same = [other for key in SPLITS if _origin(other := getattr(options, key)) == _origin(source)]
    return len(same) > 1 and not any(other.skip for other in same if other.split is None)


def _origin(source: Any) -> Any:
    """Return what tells where the samples come from, whatever is taken of them."""
    if not isinstance(source, SetOptions):
        return None
    return source.model_dump(exclude={*SetOptions.model_fields})


class _Loader:
    """Loads splits one by one and keeps what was read, since two splits may share a source."""

    def __init__(self, options: DataOptions, allow_imports: tuple[str, ...], seed: int):
        self.options, self.allow_imports, self.seed = options, allow_imports, seed
        self.cache: dict[Any, Any] = {}
        self.used: dict[str, tuple[Samples, np.ndarray]] = {}
        self.notes: list[str] = []
        self.ranges: set[str] = set()

    def load(self, name: SplitName) -> Split:
        """Return the split `name`."""
        source = getattr(self.options, name)
        samples, rows, steps = self.choose(name)
        labels = source.labels and name != "unlabelled"
        self.notes += samples.notes
        if rows is not None:
            self.used[name] = samples, rows
            return self._finish(name, samples, rows, steps, labels)
        from compress.data.streams import check_end, preprocess_stream

        check_end(samples.stream, samples.where)
        stream = preprocess_stream(samples.stream, steps, labels, samples.where)
        return Split(name, stream=stream, digest=_digest(samples.digest, *steps, labels))

    def choose(self, name: SplitName) -> tuple[Samples, np.ndarray | None, tuple[Step, ...]]:
        """Return everything its source holds, the rows chosen of it (`None` for a stream) and the steps."""
        source = getattr(self.options, name)
        if isinstance(source, SplitReference):
            samples, rows, steps = self.choose(source.of)
        else:
            samples, rows, steps = self._read(name), None, ()
            divided = samples.whole and is_divided(self.options, name)
            if samples.stream is None:
                rows = self._divide(name, samples) if divided else np.arange(len(samples))
            elif divided:
                raise DataError(
                    f"{samples.where}: gives one stream, which cannot be divided into train and test",
                    "Give the function a parameter `split`, or let it return {'train': ..., 'test': ...}.",
                )
        if rows is not None:
            rows = self._take(source, samples, rows)
        elif source.skip or source.shuffle or source.take is not None:
            from compress.data.streams import choose_samples

            digest = _digest(samples.digest, source.skip, source.take)
            samples = replace(samples, stream=choose_samples(samples.stream, source, samples.where), digest=digest)
        return samples, rows, (*steps, *source.preprocess)

    def note_overlap(self) -> None:
        """Note how many test samples are also trained on."""
        if not {"train", "test"} <= set(self.used):
            return
        (trained, train_rows), (tested, test_rows) = self.used["train"], self.used["test"]
        common = len(np.intersect1d(train_rows, test_rows)) if _same_arrays(trained, tested) else 0
        if common:
            self.notes.append(
                f"{common} of {len(test_rows)} test samples are also in train: accuracy will look too good"
            )

    def _read(self, name: SplitName) -> Samples:
        source = getattr(self.options, name)
        wanted, labels = source.split or name, source.labels and name != "unlabelled"
        if isinstance(source, BuiltInSet):
            return read_built_in(source.name, wanted, labels, self.cache)
        if isinstance(source, NpzFile):
            return read_npz(source, Path(source.path), wanted, labels, self.cache)
        if isinstance(source, ImageFolder):
            return read_image_folder(source, wanted, labels, self.cache)
        return read_factory(source, wanted, labels, self.allow_imports, self.cache)

    def _divide(self, name: SplitName, samples: Samples) -> np.ndarray:
        part = getattr(self.options, name).split or name
        if part == "validation":
            raise DataError(
                f"{samples.where}: has no validation samples of its own, needed for {name!r}",
                "Divide its train part: `split: train`, with `take` for train and `skip` for validation.",
            )
        self.notes.append(
            f"{samples.where} has no splits: a fixed random 80 % of its {len(samples)} samples are train, "
            "the rest is test; `split: all` gives every sample"
        )
        return hold_out(len(samples), part)

    def _take(self, source: SourceOptions, samples: Samples, rows: np.ndarray) -> np.ndarray:
        chosen = choose_rows(rows, source, self.seed, samples.where)
        if source.take is not None and len(chosen) < source.take:
            self.notes.append(
                f"{samples.where}: take {source.take} was asked for, {len(chosen)} samples are left and used"
            )
        return chosen

    def _finish(self, name: str, samples: Samples, rows: np.ndarray, steps: tuple[Step, ...], labels: bool) -> Split:
        """Return the chosen rows, checked, decoded and preprocessed."""
        everything = len(rows) == len(samples) and bool((rows == np.arange(len(rows))).all())
        kept = None if everything else rows
        check_finite(samples, kept)
        x, y = (arrays if everything else map_arrays(lambda a: a[rows], arrays) for arrays in (samples.x, samples.y))
        y = y if labels else None
        if samples.decode is not None:
            x, y, stream, digest = samples.decode(x, y)
            if stream is not None:
                from compress.data.streams import preprocess_stream

                stream = preprocess_stream(stream, steps, labels, samples.where)
                return Split(name, stream=stream, digest=_digest(digest, *steps))
        x, y = preprocess_arrays(steps, x, y, samples.where)
        self._note_range(samples, x, steps)
        return array_split(name, x, y)

    def _note_range(self, samples: Samples, x: Arrays, steps: tuple[Step, ...]) -> None:
        """Note, once per source, integer images in a wide range, which models are rarely trained on."""
        if samples.where in self.ranges or any(step.rescale is not None or step.cast for step in steps):
            return
        self.ranges.add(samples.where)
        for position, array in enumerate(flatten_arrays(x)):
            if array.dtype.kind in "iu" and array.ndim >= 3 and array.max() > 1:
                called = samples.names[position] if samples.names else "x"
                low, high = array.min(), array.max()
                self.notes.append(
                    f"{samples.where}: {called} is {array.dtype} in {low}..{high}, given to the model as "
                    f"stored; --rescale 1/{255 if 16 < high <= 255 else high} scales it"
                )


def _same_arrays(one: Samples, other: Samples) -> bool:
    """Return whether both were read from the same arrays, with or without labels."""
    return all(a is b for a, b in zip(flatten_arrays(one.x), flatten_arrays(other.x), strict=False))


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()
