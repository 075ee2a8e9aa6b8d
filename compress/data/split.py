"""What the rest of the package sees of data: splits of samples, whatever they came from.

A split is either arrays in memory or a stream of batches that can be read again from the start. Labels are
optional: distillation and parity need none. Nothing here imports a framework.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from compress.errors import BmcompressError, DataError

Arrays = Any
"""One array, or a list, tuple or dict of arrays that share their first axis (the samples)."""


def map_arrays(function: Callable[[np.ndarray], Any], arrays: Arrays) -> Arrays:
    """Return `arrays` with `function` applied to each leaf; `None` stays `None`."""
    if arrays is None:
        return None
    if isinstance(arrays, dict):
        return {key: map_arrays(function, value) for key, value in arrays.items()}
    if isinstance(arrays, (list, tuple)):
        return type(arrays)(map_arrays(function, value) for value in arrays)
    return function(arrays)


def flatten_arrays(arrays: Arrays) -> list[np.ndarray]:
    """Return the leaves of `arrays` in order; dicts in sorted key order, as Keras flattens them."""
    if arrays is None:
        return []
    if isinstance(arrays, dict):
        return [leaf for key in sorted(arrays) for leaf in flatten_arrays(arrays[key])]
    if isinstance(arrays, (list, tuple)):
        return [leaf for value in arrays for leaf in flatten_arrays(value)]
    return [arrays]


def concatenate_arrays(parts: list[Arrays]) -> Arrays:
    """Return the batches `parts`, all of one structure, joined along the first axis."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: concatenate_arrays([part[key] for part in parts]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(concatenate_arrays(list(values)) for values in zip(*parts, strict=True))
    return np.concatenate(parts)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sample_count(arrays: Arrays) -> int:
    return len(flatten_arrays(arrays)[0])


@dataclass(frozen=True)
class Split:
    """Samples of one split.

    Args:
        name: what messages call it, such as `"train"`.
        x: inputs in memory, each `(samples, ...)`, or `None` for a stream.
        y: labels in memory, each `(samples, ...)`, or `None`.
        stream: re-iterable batches `(x, y)` or `x` as `fit` takes them, such as a `tf.data.Dataset`.
        digest: sha256 of what the samples are; equal digests mean equal data.
    """

    name: str
    x: Arrays = None
    y: Arrays = None
    stream: Any = None
    digest: str = ""

    def __post_init__(self) -> None:
        if (self.x is None) == (self.stream is None):
            raise DataError(f"split {self.name!r} needs either arrays or a stream")
        if self.x is None:
            return
        leaves = flatten_arrays(self.x) + flatten_arrays(self.y)
        if not flatten_arrays(self.x) or any(np.ndim(leaf) == 0 for leaf in leaves):
            raise DataError(f"split {self.name!r} needs arrays of samples. Received: {self.x!r:.100}")
        counts = [len(leaf) for leaf in leaves]
        if len(set(counts)) != 1:
            raise DataError(f"arrays of split {self.name!r} differ in length. Received: {counts} samples")
        if counts[0] == 0:
            raise DataError(f"split {self.name!r} is empty. Received: 0 samples")

    @property
    def in_memory(self) -> bool:
        """Whether the samples are arrays."""
        return self.stream is None

    @property
    def has_labels(self) -> bool:
        """Whether each sample has a label; a stream is asked for its first batch."""
        return self.y is not None if self.in_memory else next(self.batches())[1] is not None

    def __len__(self) -> int:
        """Return the number of samples; a stream is read through once to count them."""
        if self.in_memory:
            return _sample_count(self.x)
        return sum(_sample_count(x) for x, _ in self.batches())

    def batches(self, batch_size: int = 128) -> Iterator[tuple[Arrays, Arrays]]:
        """Yield `(x, y)` NumPy batches in order; a stream keeps its own batch size.

        Raises:
            DataError: the stream has no batch, or failed; its own error is the cause.
        """
        if self.in_memory:
            for start in range(0, len(self), batch_size):
                window = slice(start, start + batch_size)
                yield map_arrays(lambda a: a[window], self.x), map_arrays(lambda a: a[window], self.y)  # noqa: B023
            return
        number = 0
        try:
            for batch in self._stream_batches():
                number += 1
                x, y = (*batch, None)[:2] if isinstance(batch, tuple) else (batch, None)
                yield map_arrays(np.asarray, x), map_arrays(np.asarray, y)
        except BmcompressError:
            raise
        except Exception as error:  # whatever a user's own stream raises
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"split {self.name!r} failed after batch {number}: {reason}") from error
        if number == 0:
            raise DataError(f"split {self.name!r} is empty. Received: 0 samples")

    def _stream_batches(self) -> Iterator[Any]:
        if hasattr(self.stream, "__getitem__"):
            return (self.stream[i] for i in range(len(self.stream)))
        return iter(self.stream)

    def head(self, samples: int) -> tuple[Arrays, Arrays]:
        """Return `(x, y)` of the first `samples` samples, fewer when there are fewer."""
        parts, found = [], 0
        for x, y in self.batches(batch_size=samples):
            parts.append((x, y))
            found += _sample_count(x)
            if found >= samples:
                break
        x, y = concatenate_arrays([p[0] for p in parts]), concatenate_arrays([p[1] for p in parts])
        return map_arrays(lambda a: a[:samples], x), map_arrays(lambda a: a[:samples], y)

    def sample(self, samples: int, seed: int = 0) -> Split:
        """Return `samples` random ones of those in memory, in their order, as files are often sorted by class.

        A stream, or a split that has no more, is returned as it is.
        """
        if not self.in_memory or len(self) <= samples:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), samples, replace=False))
        return array_split(self.name, *(map_arrays(lambda a: a[chosen], arrays) for arrays in (self.x, self.y)))

    def all(self) -> tuple[Arrays, Arrays]:
        """Return `(x, y)` of every sample, read into memory."""
        if self.in_memory:
            return self.x, self.y
        parts = list(self.batches())
        return concatenate_arrays([p[0] for p in parts]), concatenate_arrays([p[1] for p in parts])


@dataclass(frozen=True)
class Data:
    """The splits that a pass or a run may use; each may be missing.

    Args:
        train: samples to train on, with labels unless a pass needs none.
        validation: samples to watch while training.
        test: samples that measurements are made on.
        unlabelled: further inputs without labels, for distillation.
        notes: sentences about choices that were made while loading, to be said to the user.
    """

    train: Split | None = None
    validation: Split | None = None
    test: Split | None = None
    unlabelled: Split | None = None
    notes: tuple[str, ...] = field(default=())

    def require(self, name: str, why: str) -> Split:
        """Return the split `name`, or say which part of the data is missing and why it is needed."""
        split = getattr(self, name)
        if split is None:
            raise DataError(
                f"{why} needs a {name!r} split, and the data has none.",
                f"Add `{name}:` to the recipe's data section, or give --data a reference that has one.",
            )
        return split


def as_data(value: Any) -> Data:
    """Return `Data` from what Python users have at hand.

    Args:
        value: `Data`; `Split`, `(x, y)`, `x`, a `tf.data.Dataset` or a `keras.utils.PyDataset`, which become
            the train split; a dict of these by split, such as `{"train": (x, y)}`; `None` for no data.

    Raises:
        DataError: `value` is none of these, has no samples, or has arrays of different length.
    """
    if value is None:
        return Data()
    if isinstance(value, Data):
        return value
    if isinstance(value, dict) and value and set(value) <= {"train", "validation", "test", "unlabelled"}:
        return Data(**{name: None if part is None else as_split(name, part) for name, part in value.items()})
    return Data(train=as_split("train", value))


def as_split(name: str, value: Any) -> Split:
    """Return the split `name` from `Split`, `(x, y)`, `x` or a stream of batches, or raise DataError."""
    if isinstance(value, Split):
        return replace(value, name=name)
    if isinstance(value, tuple) and len(value) == 2:
        return array_split(name, *value)
    if isinstance(value, (list, dict)) or hasattr(value, "__array__"):
        return array_split(name, value)
    if (hasattr(value, "__iter__") or hasattr(value, "__getitem__")) and not isinstance(value, (str, bytes, tuple)):
        if hasattr(value, "__next__"):
            raise DataError(
                f"split {name!r} must be readable more than once. Received: a {type(value).__name__}",
                "Give a tf.data.Dataset or a keras.utils.PyDataset.",
            )
        return Split(name, stream=value)
    kind = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
    raise DataError(f"data must be Data, (x, y), x, a tf.data.Dataset or a PyDataset. Received: {kind}")


def array_split(name: str, x: Arrays, y: Arrays = None) -> Split:
    """Return an in-memory split with its digest."""
    x, y = map_arrays(np.asarray, x), map_arrays(np.asarray, y)
    return Split(name, x, y, digest=digest_arrays([*flatten_arrays(x), *flatten_arrays(y)], str(_outline((x, y)))))


def _outline(arrays: Arrays) -> Any:
    """Return the structure of `arrays` without their contents."""
    if isinstance(arrays, dict):
        return {key: _outline(arrays[key]) for key in sorted(arrays)}
    if isinstance(arrays, (list, tuple)):
        return [_outline(value) for value in arrays]
    return None if arrays is None else "array"


def digest_arrays(arrays: list[np.ndarray], salt: str = "") -> str:
    """Return the sha256 over `salt` and the dtype, shape and bytes of `arrays`, in order."""
    digest = hashlib.sha256(salt.encode())
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        if array.dtype == object:
            digest.update(repr(array.tolist()).encode())
        else:
            numeric = array.dtype.kind in "biufc"  # only these can be hashed without a copy
            digest.update(np.ascontiguousarray(array).data if numeric else array.tobytes())
    return digest.hexdigest()
