"""Data from a function of the user's, run only when the invoker has allowed its package."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from compress.data.references import SPLITS, PythonFactory
from compress.data.samples import Samples
from compress.data.split import Data, Split, as_data, as_split, digest_arrays, first_line, flatten_arrays
from compress.errors import DataError, RecipeError


def read_factory(
    source: PythonFactory, wanted: str, labels: bool, allow_imports: Iterable[str], cache: dict[Any, Any]
) -> Samples:
    """Return what the function gives for the split `wanted`.

    It may return `(x, y)`, `x`, a `tf.data.Dataset` or a `keras.utils.PyDataset` with batches, or a dict of
    these by split. Modules are looked up in the environment and then in the current folder, never beside a
    recipe.

    Raises:
        RecipeError: the package is not allowed, or there is no such function.
        DataError: the function raised (its error is the cause), returned something else, or lacks the split.
    """
    check_allowed(source.factory, allow_imports)
    function = find_function(source.factory)
    takes_split = "split" not in source.args and "split" in _parameters(function)
    args = {**source.args, "split": wanted} if takes_split else source.args
    key = (source.factory, repr(sorted(args.items())))
    if key not in cache:
        cache[key] = _call(function, source.factory, args)
    split, whole = _pick(cache[key], source, wanted)
    return _as_samples(split, source, whole and not takes_split, labels)


def check_allowed(factory: str, allow_imports: Iterable[str]) -> None:
    """Raise RecipeError unless the package of `package.module:function` is among `allow_imports`."""
    package = factory.partition(":")[0].partition(".")[0]
    if package not in allow_imports:
        raise RecipeError(
            f"running code of the package {package!r} is not allowed. Received: {factory}",
            f"If you trust it: --allow-import {package}",
        )


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Let modules of the current folder be found, after everything that is installed."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def find_function(factory: str) -> Callable[..., Any]:
    """Return what `package.module:function` names; call `check_allowed` first.

    Raises:
        RecipeError: there is no such function.
        DataError: importing its module raised an error.
    """
    name, _, attribute = factory.partition(":")
    try:
        with _current_folder_importable():
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise RecipeError(
                f"there is no module {error.name!r}. Received: {factory}",
                f"It is looked up in the Python environment and in {Path.cwd()}.",
            ) from None
        raise _failed(factory, "importing it", error) from error
    except Exception as error:
        raise _failed(factory, "importing it", error) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, [n for n in vars(module) if callable(getattr(module, n))], n=1)
        hint = f"; did you mean `{near[0]}`?" if near else "."
        raise RecipeError(f"module {name!r} has no function {attribute!r}{hint} Received: {factory}")
    return function


def _parameters(function: Callable[..., Any]) -> Iterable[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return ()


def _failed(factory: str, doing: str, error: Exception) -> DataError:
    return DataError(f"{factory}: {doing} raised {type(error).__name__}: {first_line(error)}")


def _call(function: Callable[..., Any], factory: str, args: dict[str, Any]) -> Data | Split:
    """Return the splits that the function gives, or one unnamed split."""
    try:
        with _current_folder_importable():
            value = function(**args)
    except Exception as error:
        raise _failed(factory, "calling it", error) from error
    try:
        if value is None:
            raise DataError("data must be (x, y), x, a tf.data.Dataset or a PyDataset. Received: None")
        data = as_data(value)
    except DataError as error:
        raise DataError(f"{factory} returned no usable data: {error.message}", error.help) from None
    by_split = isinstance(value, Data) or (isinstance(value, dict) and set(value) <= set(SPLITS))
    return data if by_split else as_split("all", data.train)


def _pick(found: Data | Split, source: PythonFactory, wanted: str) -> tuple[Split, bool]:
    """Return the wanted split, and whether the function gave one set for all splits."""
    if isinstance(found, Split):
        return found, True
    split = getattr(found, wanted, None)
    if split is None:
        has = [name for name in SPLITS if getattr(found, name) is not None]
        raise DataError(f"{source.factory} gives no {wanted!r} split. Received: {', '.join(has) or 'no split'}")
    return split, False


def _as_samples(split: Split, source: PythonFactory, whole: bool, labels: bool) -> Samples:
    where = source.factory
    if split.in_memory:
        y = split.y if labels else None
        names = (
            [f"x[{i}]" for i in range(len(flatten_arrays(split.x)))],
            [f"y[{i}]" for i in range(len(flatten_arrays(y)))],
        )
        flat = tuple(name[:1] if len(group) == 1 else name for group in names for name in group)
        return Samples(where, split.x, y, names=flat, whole=whole)
    try:
        x, y = split.head(1)
    except DataError as error:
        raise DataError(f"{where}: reading the first batch: {error.message}", error.help) from error.__cause__
    first = digest_arrays([*flatten_arrays(x), *flatten_arrays(y)])
    what = f"{where} {sorted(source.args.items())!r} {split.name}"
    digest = hashlib.sha256((what + first).encode()).hexdigest()
    return Samples(where, stream=split.stream, whole=whole, digest=digest)
