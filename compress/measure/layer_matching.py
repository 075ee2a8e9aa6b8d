"""Which tensor of one file is the output of which layer of another, told by names, by shapes and by values.

Names alone mislead: converters fuse layers, fold batch norm and rename what they keep. So every pair of one shape is
scored by its signal-to-noise ratio on a few samples, with a bonus for names that agree, and the best pairs are taken
first, unless they would turn the order of execution around.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from compress.deploy.conversion import Places
from compress.measure.layer_outputs import LayerRuntime, Observed

_PROBE_ELEMENTS = 4096
_SAME_PLACE_DB, _SHARED_PLACE_DB, _LAST_DB, _SAME_LAYOUT_DB = 10.0, 4.0, 1.0, 0.1
_LOWEST_DB, _HIGHEST_DB = -20.0, 140.0
_PLAUSIBLE_DB, _PLAUSIBLE_CORRELATION = 3.0, 0.5
_CERTAIN_DB = 40.0
"""A pair this close is one whatever comes behind it."""
_CONTRADICTION_DB = {False: (20.0, 15.0), True: (30.0, 25.0)}
"""By whether a pair has a name in common: what its successors reach, and by how much they exceed it, if it is none."""


@dataclass(frozen=True)
class Match:
    """A tensor of the other file.

    Args:
        position: of the tensor in the other file.
        axes: how its axes of more than one entry are transposed, or `None` where it is reshaped.
        sqnr_db: signal-to-noise ratio on the samples that the match was made on.
        named: whether the names of both say that they are one layer's.
    """

    position: int
    axes: tuple[int, ...] | None
    sqnr_db: float
    named: bool


def match_tensors(
    a: LayerRuntime, b: LayerRuntime, values_a: Sequence[np.ndarray], values_b: Sequence[np.ndarray]
) -> dict[int, Match]:
    """Return the counterpart in `b` of each tensor of `a` that has one, by position.

    Args:
        a: a file whose tensors are looked for.
        b: the file they are looked for in.
        values_a: each tensor of `a` on the same few batches, `(batches, ...)`.
        values_b: each tensor of `b` on them.
    """
    names = _Names(a, b)
    pairs = sorted(_score_pairs(a.tensors, b.tensors, values_a, values_b, names), key=lambda pair: -pair[0])
    order = _Order(a.tensors, b.tensors)
    found: dict[int, Match] = {}
    taken: set[int] = set()
    for _, i, match in pairs:
        if i not in found and match.position not in taken and order.allows(i, match.position):
            found[i] = match
            taken.add(match.position)
            order.accept(i, match.position)
    return _without_contradictions(a.tensors, found)


def arrange(value: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> np.ndarray:
    """Return the value of a tensor of the other file in the `shape` of its counterpart, axes of 1 left out."""
    value = np.squeeze(value)
    wanted = tuple(size for size in shape if size != 1)
    return value.reshape(wanted) if axes is None else np.transpose(value, axes)


def nearest_matched(
    position: int, tensors: Sequence[Observed], matched: dict[int, Match]
) -> tuple[list[int], list[int]]:
    """Return the closest ancestors of a tensor that have a counterpart, and those in between that have none."""
    with_match, without = [], []
    waiting, seen = list(tensors[position].parents), set()
    while waiting:
        parent = waiting.pop()
        if parent in seen:
            continue
        seen.add(parent)
        if parent in matched:
            with_match.append(parent)
        else:
            without.append(parent)
            waiting.extend(tensors[parent].parents)
    return sorted(with_match), sorted(without)


class _Names:
    """What the names of both files say about a pair, in dB."""

    def __init__(self, a: LayerRuntime, b: LayerRuntime):
        layers = {part for path in (*a.layers, *b.layers) for part in _plain(path).split("/")}
        self._a, self._b = (_places_of(side, layers) for side in (a, b))
        self._numbers_a, self._numbers_b = _number(self._a), _number(self._b)

    def bonus(self, i: int, j: int) -> float:
        own, other = self._a[i], self._b[j]
        if not own or not other:
            return 0.0
        if own[0] == other[0]:
            (call, calls), (other_call, other_calls) = self._numbers_a[i], self._numbers_b[j]
            if calls == other_calls:  # a layer that is called several times
                return _SAME_PLACE_DB if call == other_call else _SHARED_PLACE_DB
            return _SAME_PLACE_DB + (_LAST_DB if other_call == other_calls else 0.0)
        return _SHARED_PLACE_DB if own[0] in other or other[0] in own else 0.0


def _places_of(side: LayerRuntime, layers: set[str]) -> list[tuple[str, ...]]:
    """Return the layers that the names of each tensor speak of, the most telling one first."""
    labels = [[_plain(label) for label in tensor.labels] for tensor in side.tensors]
    if side.layers:
        return [tuple(each) for each in labels]
    if layers:
        places = Places(sorted(layers), "")
        found = [[places.layer_path(label) for label in each] for each in labels]
    else:
        roots = {label.split("/")[0] for each in labels for label in each if "/" in label}
        found = [[_guess_place(label, len(roots) == 1) for label in each] for each in labels]
    return [tuple(dict.fromkeys(place for place in each if place)) for each in found]


def _number(places: list[tuple[str, ...]]) -> list[tuple[int, int]]:
    """Return for each tensor the how-many-th of its place it is, from 1, and how many there are."""
    totals, seen, numbers = Counter(each[0] for each in places if each), Counter(), []
    for each in places:
        place = each[0] if each else ""
        seen[place] += 1
        numbers.append((seen[place], totals[place]))
    return numbers


def _guess_place(label: str, rooted: bool) -> str:
    parts = [re.sub(r"_\d+$", "", part) for part in label.split("/")[:-1]]
    return "/".join(parts[rooted:])


def _plain(label: str) -> str:
    return re.sub("[.-]", "/", label)  # "-" is what graphs put for "/" in names


def _score_pairs(
    tensors_a: Sequence[Observed],
    tensors_b: Sequence[Observed],
    values_a: Sequence[np.ndarray],
    values_b: Sequence[np.ndarray],
    names: _Names,
) -> Iterator[tuple[float, int, Match]]:
    """Yield score, position in `a` and match of every plausible pair."""
    shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, value in enumerate(values_a):
        shapes[_inner_shape(value)].append(i)
    by_size: dict[int, list[int]] = defaultdict(list)
    for j, value in enumerate(values_b):
        by_size[math.prod(_inner_shape(value))].append(j)
    for shape, group in shapes.items():
        if not by_size[math.prod(shape)] or 0 in shape:
            continue
        picked = _pick(math.prod(shape) * len(values_a[group[0]]))
        rows_a = np.stack([_flat(values_a[i], picked) for i in group])
        layouts = [(j, axes) for j in by_size[math.prod(shape)] for axes in _layouts(_inner_shape(values_b[j]), shape)]
        rows_b = np.stack([_flat(_arrange_batches(values_b[j], shape, axes), picked) for j, axes in layouts])
        sqnr, correlation = _similarity(rows_a, rows_b)
        for row, i in enumerate(group):
            for column, (j, axes) in enumerate(layouts):
                bonus, outputs = names.bonus(i, j), tensors_a[i].is_output and tensors_b[j].is_output
                close = sqnr[row, column] >= _PLAUSIBLE_DB or correlation[row, column] >= _PLAUSIBLE_CORRELATION
                named = bonus >= _SAME_PLACE_DB
                if close or outputs or named:
                    bonus += _SAME_PLACE_DB * outputs + _SAME_LAYOUT_DB * _keeps_layout(axes)
                    yield sqnr[row, column] + bonus, i, Match(j, axes, float(sqnr[row, column]), named)


def _similarity(rows_a: np.ndarray, rows_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return SQNR in dB, within limits, and correlation of every row of `a` with every row of `b`."""
    power_a, power_b = (rows_a**2).sum(1)[:, None], (rows_b**2).sum(1)[None]
    error = np.maximum(power_a + power_b - 2 * rows_a @ rows_b.T, 0)
    # A difference of sums keeps about 1e-15 of them: what is below is no error.
    error[error < 1e-14 * power_a] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        sqnr = 10 * np.log10(power_a / error)
        sqnr = np.where(error == 0, np.inf, sqnr)
        centred_a, centred_b = (rows - rows.mean(1, keepdims=True) for rows in (rows_a, rows_b))
        scale = np.sqrt((centred_a**2).sum(1)[:, None] * (centred_b**2).sum(1)[None])
        correlation = np.where(scale > 0, centred_a @ centred_b.T / scale, 0)
    return np.clip(sqnr, _LOWEST_DB, _HIGHEST_DB), correlation


def _layouts(given: tuple[int, ...], wanted: tuple[int, ...]) -> list[tuple[int, ...] | None]:
    """Return the transpositions that turn shape `given` into `wanted`; `None`, a reshape, where none does."""
    rank = len(given)
    if sorted(given) != sorted(wanted):
        return [None]
    if rank <= 3:
        candidates = list(permutations(range(rank)))
    else:
        straight = tuple(range(rank))
        candidates = [straight, (*straight[1:], 0), (rank - 1, *straight[:-1]), (0, *straight[2:], 1)]
    fitting = [axes for axes in candidates if tuple(given[axis] for axis in axes) == wanted]
    return fitting or [None]


def _keeps_layout(axes: tuple[int, ...] | None) -> bool:
    return axes is not None and axes == tuple(range(len(axes)))


def _arrange_batches(values: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> np.ndarray:
    return np.stack([arrange(value, shape, axes) for value in values])


def _inner_shape(values: np.ndarray) -> tuple[int, ...]:
    """Return the shape of one batch without axes of 1."""
    return tuple(size for size in values.shape[1:] if size != 1)


def _flat(values: np.ndarray, picked: np.ndarray | slice) -> np.ndarray:
    return np.nan_to_num(values.reshape(-1)[picked].astype("float64"), posinf=0.0, neginf=0.0)


def _pick(size: int) -> np.ndarray | slice:
    if size <= _PROBE_ELEMENTS:
        return slice(None)
    return np.sort(np.random.default_rng(0).choice(size, _PROBE_ELEMENTS, replace=False))


class _Order:
    """The order of execution in both files, as sets of bits, and the pairs that were accepted."""

    def __init__(self, a: Sequence[Observed], b: Sequence[Observed]):
        (self._before_a, self._after_a), (self._before_b, self._after_b) = _relations(a), _relations(b)
        self._pairs: list[tuple[int, int]] = []

    def allows(self, i: int, j: int) -> bool:
        """Return whether no accepted pair stands before one of the two and behind the other."""
        for other_i, other_j in self._pairs:
            earlier = self._before_a[i] >> other_i & 1 and self._after_b[j] >> other_j & 1
            later = self._after_a[i] >> other_i & 1 and self._before_b[j] >> other_j & 1
            if earlier or later:
                return False
        return True

    def accept(self, i: int, j: int) -> None:
        self._pairs.append((i, j))


def _relations(tensors: Sequence[Observed]) -> tuple[list[int], list[int]]:
    """Return the ancestors and the descendants of each tensor, each as bits."""
    before, after = [0] * len(tensors), [0] * len(tensors)
    for position, tensor in enumerate(tensors):
        for parent in tensor.parents:
            before[position] |= before[parent] | 1 << parent
    for position in reversed(range(len(tensors))):
        for parent in tensors[position].parents:
            after[parent] |= after[position] | 1 << position
    return before, after


def _without_contradictions(tensors: Sequence[Observed], found: dict[int, Match]) -> dict[int, Match]:
    """Leave out pairs that differ while all that is computed from them agrees.

    Such a tensor is not what the layer gives: converters move biases and scales from one layer into the next.
    """
    successors: dict[int, list[float]] = defaultdict(list)
    for position, match in found.items():
        for parent in nearest_matched(position, tensors, found)[0]:
            successors[parent].append(match.sqnr_db)
    kept = {}
    for position, match in found.items():
        behind = min(successors[position], default=_LOWEST_DB)
        level, margin = _CONTRADICTION_DB[match.named]
        certain = tensors[position].is_output or match.sqnr_db >= _CERTAIN_DB
        if certain or behind < max(level, match.sqnr_db + margin):
            kept[position] = match
    return kept
