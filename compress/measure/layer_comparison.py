"""The child process of a comparison: runs both files on the same samples and returns numbers, not activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.split import flatten_arrays
from compress.deploy.records import TensorInfo
from compress.deploy.runtimes import fit_array, match_inputs, plain_name, predict
from compress.errors import DataError, ModelError
from compress.measure.children import open_file, write_random_inputs
from compress.measure.inputs import read_inputs
from compress.measure.layer_errors import ErrorSums
from compress.measure.layer_matching import Match, arrange, match_tensors, nearest_matched
from compress.measure.layer_outputs import INTEGERS, LayerRuntime, open_layers
from compress.progress import track

_PROBE_BATCHES = 4
_PROBE_BYTES = 2**28
_BATCH_SIZE = 64

Arrays = list[np.ndarray]


def compare_files(
    a: str, b: str, folder: str, samples: int, random_samples: int, seed: int, allow_imports: Sequence[str]
) -> dict[str, Any]:
    """Return the errors of all layers of `a`, and write the outputs of both files for all samples.

    Args:
        a: the file that counts as right.
        b: the other file.
        folder: holds `inputs` if there are data, and receives `a.npz` and `b.npz`.
        samples: number of samples that layers are compared on.
        random_samples: number of inputs to draw where there are no data, else 0.
        seed: of drawn inputs.
        allow_imports: packages whose classes a `.keras` file may name.

    Raises:
        ModelError: a file cannot be opened, or the files take different inputs.
        DataError: the samples do not fit.
    """
    place, notes = Path(folder), []
    sides = [_Side(path, place / name, allow_imports) for path, name in ((a, "a"), (b, "b"))]
    inputs = str(place / "inputs")
    _check_inputs(*sides)
    if random_samples:
        real = next((side for side in sides if not side.takes_integers), sides[0])
        notes = write_random_inputs(real.path, inputs, random_samples, seed, allow_imports)
        notes.append(f"there are no data: {random_samples} random inputs were drawn, on which agreement says little")
    arrays = match_inputs([info.name for info in sides[0].layers.inputs], read_inputs(inputs))
    arrays = [fit_real(array, info) for array, info in zip(arrays, sides[0].layers.inputs, strict=True)]
    order = _input_order(*sides)
    feeds = [arrays, [arrays[index] for index in order]]
    if len(order) > 1 and not _same_names(*sides):
        notes.append("the inputs of the files have different names and are taken in their order")
    layers, compared = _compare_layers(sides, feeds, samples)
    names = [side.write_outputs(feed, allow_imports) for side, feed in zip(sides, feeds, strict=True)]
    return {
        "layers": layers,
        "samples": compared,
        "outputs": names,
        "quantized": [side.layers.quantized for side in sides],
        "notes": [*notes, *sides[0].layers.notes, *sides[1].layers.notes],
    }


class _Side:
    """One of the two files, with its inner tensors."""

    def __init__(self, path: str, place: Path, allow_imports: Sequence[str]):
        place.mkdir()
        self.path, self._place = path, place
        self.layers: LayerRuntime = open_layers(path, place, allow_imports)

    @property
    def takes_integers(self) -> bool:
        """Whether an input is of a type that real numbers are quantized to."""
        return any(info.dtype in INTEGERS for info in self.layers.inputs)

    def observe(self, inputs: Arrays) -> Arrays:
        """Return all tensors for one batch; a file of a smaller fixed batch runs several times."""
        step = self.layers.batch or len(inputs[0])
        parts = [
            self.layers.run([array[start : start + step] for array in inputs])
            for start in range(0, len(inputs[0]), step)
        ]
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate([np.atleast_1d(part) for part in each]) for each in zip(*parts, strict=True)]

    def write_outputs(self, inputs: Arrays, allow_imports: Sequence[str]) -> list[str]:
        """Write what the file gives for all samples under its default options, and return the outputs' names."""
        runtime = open_file(self.path, allow_imports=allow_imports)
        np.savez(self._place.with_suffix(".npz"), *predict(runtime, inputs, _BATCH_SIZE))
        return [info.name for info in runtime.outputs]


def fit_real(array: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Return `array` as an input takes it; real numbers for integer inputs stay real, to be quantized later."""
    if np.asarray(array).dtype.kind == "f" and info.dtype in INTEGERS:
        info = info.model_copy(update={"dtype": "float32"})
    return fit_array(array, info)


def _check_inputs(a: _Side, b: _Side) -> None:
    order = _input_order(a, b)
    shapes = [[info.shape[1:] for info in side.layers.inputs] for side in (a, b)]
    fits = len(shapes[0]) == len(shapes[1]) and all(
        _fits(shapes[0][index], shape) for index, shape in zip(order, shapes[1], strict=True)
    )
    if not fits:
        said = ["; ".join(f"{info.name} {_words(info.shape)}" for info in side.layers.inputs) for side in (a, b)]
        raise ModelError(
            f"two files must take the same inputs to be compared. Received: {Path(a.path).name} with {said[0]}, "
            f"{Path(b.path).name} with {said[1]}",
            "Compare exports of one model.",
        )
    batches = {side.layers.batch for side in (a, b)} - {None}
    if any(max(batches) % batch for batch in batches):
        raise DataError(f"fixed batch sizes must divide each other. Received: {sorted(batches)}")


def _fits(a: tuple[int | None, ...], b: tuple[int | None, ...]) -> bool:
    return len(a) == len(b) and all(p is None or q is None or p == q for p, q in zip(a, b, strict=True))


def _words(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def _same_names(a: _Side, b: _Side) -> bool:
    return len({frozenset(plain_name(info.name) for info in side.layers.inputs) for side in (a, b)}) == 1


def _input_order(a: _Side, b: _Side) -> list[int]:
    """Return, for each input of `b`, its position in `a`: by name where the names are the same, else in order."""
    names = [plain_name(info.name) for info in a.layers.inputs]
    if _same_names(a, b):
        return [names.index(plain_name(info.name)) for info in b.layers.inputs]
    return list(range(len(b.layers.inputs)))


def _compare_layers(sides: list[_Side], feeds: list[Arrays], samples: int) -> tuple[list[dict[str, Any]], int]:
    """Return what is known of each layer of the first file, and the number of samples that it is known from."""
    batch = max(side.layers.batch or 1 for side in sides)
    available = len(flatten_arrays(feeds[0])[0])
    starts = range(0, min(samples, available), batch)
    probes: list[list[Arrays]] = []
    matches: dict[int, Match] = {}
    sums: dict[int, ErrorSums] = {}
    shapes: list[tuple[int, ...]] = []

    def match() -> None:
        values = [[np.stack(each) for each in zip(*(probe[k] for probe in probes), strict=True)] for k in (0, 1)]
        matches.update(match_tensors(sides[0].layers, sides[1].layers, *values))
        sums.update((position, ErrorSums()) for position in matches)
        shapes.extend(value.shape[1:] for value in values[0])
        for given_a, given_b in probes:
            _add(sums, matches, given_a, given_b)

    with track("layers", total=len(starts)) as advance:
        for given in _observe(sides, feeds, starts, batch):
            if shapes:
                _add(sums, matches, *given)
            else:
                probes.append(list(given))
                heavy = len(probes) * sum(array.nbytes for arrays in given for array in arrays) > _PROBE_BYTES
                if len(probes) == min(_PROBE_BATCHES, len(starts)) or heavy:
                    match()
                    probes.clear()
            advance()
    tensors = sides[0].layers.tensors, sides[1].layers.tensors
    return _describe(tensors, matches, sums, shapes), min(len(starts) * batch, available)


def _observe(sides: list[_Side], feeds: list[Arrays], starts: range, batch: int) -> Iterator[tuple[Arrays, Arrays]]:
    """Yield all tensors of both files for each batch; the last sample fills up the last one."""
    for start in starts:
        rows = np.minimum(np.arange(start, start + batch), len(feeds[0][0]) - 1)
        yield tuple(side.observe([array[rows] for array in feed]) for side, feed in zip(sides, feeds, strict=True))


def _add(sums: dict[int, ErrorSums], matches: dict[int, Match], given_a: Arrays, given_b: Arrays) -> None:
    for position, match in matches.items():
        value = given_a[position]
        other = arrange(given_b[match.position], value.shape, match.axes)
        sums[position].add(np.squeeze(value), other)


def _describe(
    tensors: tuple, matches: dict[int, Match], sums: dict[int, ErrorSums], shapes: list[tuple[int, ...]]
) -> list[dict[str, Any]]:
    """Return one record per layer; `inputs` and `between` are positions of ancestors with and without counterpart."""
    found = []
    for position, tensor in enumerate(tensors[0]):
        match, total = matches.get(position), sums.get(position)
        inputs, between = nearest_matched(position, tensors[0], matches)
        fact = {
            "layer": tensor.name,
            "kind": tensor.kind,
            "shape": shapes[position],
            "counterpart": None,
            "mse": None,
            "sqnr_db": None,
            "cosine": None,
            "inputs": inputs,
            "between": between,
            "reason": "fused or absent",
        }
        if match is not None:
            level = total.sqnr_db
            fact |= {
                "counterpart": tensors[1][match.position].name,
                "mse": total.mse if math.isfinite(total.mse or 0) else None,
                "sqnr_db": level if math.isfinite(level) else None,
                "cosine": total.cosine,
                "reason": _reason(total),
            }
        found.append(fact)
    return found


def _reason(total: ErrorSums) -> str:
    if total.broken:
        return f"{total.broken} values are not finite in one of the files"
    return "there is no error" if total.error == 0 else "the first file has only zeros here"
