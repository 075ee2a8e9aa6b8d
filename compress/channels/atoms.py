"""Atoms: the places along the axes of tensors and weights that can be removed, and which of them go together.

An axis of a tensor carries an atom for each of its places, or `None` where its length is fixed. Layers hand atoms on,
make new ones, or tie two together; atoms that are tied stand for one *unit*, which stays or goes as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np

Axis = np.ndarray | None
"""The atoms of one axis `(length,)`, or `None`."""
Axes = list[Axis]
"""The atoms of each axis of a tensor, batch axis included."""
Norm = Literal["freeze", "allow"]
Role = Literal["makes", "reads", "passes"]
"""What a weight does with the channels along an axis: it makes them, it reads them, or it changes each by itself."""


@dataclass(frozen=True, eq=False)
class WeightAxis:
    """An axis of a weight that gets shorter with the atoms along it.

    Args:
        path: path of the layer.
        variable: the weight.
        axis: which axis, from 0.
        atoms: an atom for each place.
        role: what the weight does with these channels.
    """

    path: str
    variable: keras.Variable
    axis: int
    atoms: np.ndarray
    role: Role


@dataclass(frozen=True, eq=False)
class Edit:
    """An entry of an operation's configuration that follows from how many atoms are left.

    Args:
        key: name of the entry; `"layer/config/units"` is inside of others, and `"target_shape/2"` one of a sequence.
        atoms: those that are counted.
        value: makes the entry of the count.
    """

    key: str
    atoms: np.ndarray
    value: Callable[[int], Any]


@dataclass(frozen=True, eq=False)
class Read:
    """A call that reads the channels along an axis of one of its tensors without a weight, such as a sum over them.

    Args:
        call: `id` of the node.
        tensor: which of the node's inputs, from 0.
        axis: which axis of it.
        atoms: an atom for each place.
    """

    call: int
    tensor: int
    axis: int
    atoms: np.ndarray


@dataclass(frozen=True, eq=False)
class NormOver:
    """A call of a layer whose statistics run over channels that may go.

    Args:
        call: `id` of the node.
        layer: LayerNormalization, RMSNormalization or GroupNormalization.
        axes: what the statistics run over.
        atoms: those of an axis of the input.
        groups: number of groups, and the axis that is divided into them, or `None`.
    """

    call: int
    layer: keras.Layer
    axes: tuple[int, ...]
    atoms: dict[int, np.ndarray]
    groups: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Factor:
    """A weight that is multiplied by a number that follows from how many atoms are left.

    Args:
        variable: the weight.
        atoms: those that are counted.
        value: makes the factor of the count.
    """

    variable: keras.Variable
    atoms: np.ndarray
    value: Callable[[int], float]


@dataclass(frozen=True, eq=False)
class Split:
    """An axis that was divided into several, of which one carries the channels.

    Args:
        chosen: index of the candidate that carries them.
        candidates: axes that could carry them, best first.
        atoms: what it carries.
    """

    chosen: int
    candidates: tuple[int, ...]
    atoms: np.ndarray


@dataclass(frozen=True, eq=False)
class Producer:
    """Channels that one layer makes.

    Args:
        path: path of the layer; heads of attention have a path of their own below it.
        atoms: one for each channel.
    """

    path: str
    atoms: np.ndarray


class Atoms:
    """All atoms of a model, with what hangs on them.

    Args:
        norm: `"freeze"` keeps channels that a layer norms over, since their statistics change with their number;
            `"allow"` lets them go.
        choices: by path and axis of the input, which of the axes that could carry the channels of a divided one does.
    """

    def __init__(self, norm: Norm = "freeze", choices: Mapping[tuple[str, int], int] | None = None) -> None:
        self._norm = norm
        self._choices = dict(choices or {})
        self.normed: list[np.ndarray] = []
        self.norms: list[NormOver] = []
        self.reads: list[Read] = []
        self.factors: list[Factor] = []
        self.splits: dict[tuple[str, int], Split] = {}
        self._parents = np.zeros(0, np.int64)
        self._count = 0
        self._frozen: dict[int, str] = {}
        self._seen: dict[tuple[int, int], Axis] = {}
        self._inside: dict[int, tuple[keras.Operation, str]] = {}
        self.producers: list[Producer] = []
        self.weights: list[WeightAxis] = []
        self.edits: dict[int, list[Edit]] = {}

    def new(self, count: int, path: str) -> np.ndarray:
        """Return new atoms for the channels that the layer at `path` makes."""
        found = self._make(count)
        self.producers.append(Producer(path, found))
        return found

    def fixed(self, count: int, reason: str) -> np.ndarray:
        """Return new atoms for channels that must stay."""
        found = self._make(count)
        self.freeze(found, reason)
        return found

    def tie(self, first: Axis, second: Axis, reason: str) -> Axis:
        """Let two axes live or die together, place by place, and return one of them.

        Where one of them is fixed, the other is from now on, for this reason.
        """
        if first is None or second is None or len(first) != len(second):
            self.freeze(first, reason)
            self.freeze(second, reason)
            return None
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            root, other = self._root(a), self._root(b)
            if root != other:
                self._parents[other] = root
        return first

    def freeze(self, atoms: Axis, reason: str) -> None:
        """Let these channels stay; the first reason counts."""
        for atom in () if atoms is None else np.unique(atoms).tolist():
            self._frozen.setdefault(atom, reason)

    def freeze_since(self, count: int, reason: str) -> None:
        """Let the channels stay whose atoms were made when there were `count` atoms or more."""
        self.freeze(np.arange(count, self._count), reason)

    @property
    def count(self) -> int:
        """How many atoms there are."""
        return self._count

    def tie_parts(self, atoms: Axis, parts: int, reason: str) -> Axis:
        """Tie what has the same place in each of equal parts of an axis, and return the first part."""
        if atoms is None:
            return None
        first, *others = np.split(atoms, parts)
        for other in others:
            self.tie(first, other, reason)
        return first

    def split(self, path: str, axis: int, candidates: Sequence[int], grid: np.ndarray) -> tuple[int, np.ndarray]:
        """Let one axis of a grid of atoms carry them: what has the same place along it is tied.

        Args:
            path: path of the operation.
            axis: axis of its input that is divided.
            candidates: axes of the grid that may carry the atoms, best first.
            grid: atoms.

        Returns:
            The axis, and its atoms.
        """
        index = self._choices.get((path, axis), 0)
        chosen = candidates[index]
        rows = np.moveaxis(grid, chosen, 0).reshape(grid.shape[chosen], -1)
        for column in range(1, rows.shape[1]):
            self.tie(rows[:, 0], rows[:, column], f"{path} divides it")
        carried = rows[:, 0].copy()
        self.splits[path, axis] = Split(index, tuple(candidates), carried)
        return chosen, carried

    def freeze_norm(self, atoms: Axis, reason: str) -> None:
        """Let channels that a layer norms over stay, unless that is allowed."""
        if self._norm == "freeze":
            self.freeze(atoms, reason)
        elif atoms is not None:
            self.normed.append(atoms)

    def norm_over(
        self,
        call: int,
        layer: keras.Layer,
        axes: Sequence[int],
        x: Axes,
        reason: str,
        groups: tuple[int, int] | None = None,
    ) -> None:
        """Say that the statistics of a layer of Keras run over `axes` of `x`: they stay, unless that is allowed.

        The reference of the check then norms over the channels that are left.
        """
        if self._norm == "freeze":
            for axis in axes:
                self.freeze(x[axis], reason)
            return
        if groups is not None:
            self.tie_parts(x[groups[1]], groups[0], reason)
        carried = {axis: own for axis in axes if (own := x[axis]) is not None}
        self.norms.append(NormOver(call, layer, tuple(axes), carried, groups))

    def read(self, call: int, tensor: int, axis: int, atoms: Axis) -> None:
        """Say that a call reads the channels along an axis of one of its inputs without a weight."""
        if atoms is not None:
            self.reads.append(Read(call, tensor, axis, atoms))

    def factor(self, variable: keras.Variable | None, atoms: Axis, value: Callable[[int], float]) -> None:
        """Say that a weight is multiplied by a number that follows from how many of `atoms` are left."""
        if variable is None or atoms is None or any(each.variable is variable for each in self.factors):
            return
        self.factors.append(Factor(variable, atoms, value))

    def inside(self, inner: keras.Operation, outer: keras.Operation, key: str) -> None:
        """Say that the configuration of a layer is the entry `key` of that of another one."""
        self._inside[id(inner)] = outer, key

    def weight(self, path: str, variable: keras.Variable, axis: int, atoms: Axis, role: Role) -> None:
        """Say what lies along an axis of a weight; a weight that is used again ties what it is used on."""
        axis %= len(variable.shape)
        key = id(variable), axis
        if key in self._seen:
            self.tie(self._seen[key], atoms, f"{path} is used on channels that are fixed elsewhere")
            return
        self._seen[key] = atoms
        if atoms is not None:
            self.weights.append(WeightAxis(path, variable, axis, atoms, role))

    def edit(
        self, operation: keras.Operation, key: str, atoms: Axis, value: Callable[[int], Any] = lambda count: count
    ) -> None:
        """Say that an entry of an operation's configuration follows from how many of `atoms` are left."""
        if atoms is None:
            return
        while id(operation) in self._inside:
            operation, prefix = self._inside[id(operation)]
            key = f"{prefix}/{key}"
        edits = self.edits.setdefault(id(operation), [])
        earlier = next((each for each in edits if each.key == key), None)
        if earlier is None:
            edits.append(Edit(key, atoms, value))
        elif earlier.atoms is not atoms:  # an operation without weights that is called again
            self.tie(earlier.atoms, atoms, "an operation is used on channels of unlike lengths")

    def units(self, atoms: np.ndarray) -> np.ndarray:
        """Return the unit of each atom."""
        return np.array([self._root(atom) for atom in atoms.tolist()], np.int64)

    def frozen_units(self) -> dict[int, str]:
        """Return the units that must stay, with the reason."""
        found: dict[int, str] = {}
        for atom, reason in self._frozen.items():
            found.setdefault(self._root(atom), reason)
        return found

    def _make(self, count: int) -> np.ndarray:
        start, self._count = self._count, self._count + count
        if self._count > len(self._parents):
            grown = np.arange(max(1024, 2 * self._count), dtype=np.int64)
            grown[:start] = self._parents[:start]
            self._parents = grown
        return np.arange(start, self._count)

    def _root(self, atom: int) -> int:
        parents = self._parents
        root = atom
        while parents[root] != root:
            root = int(parents[root])
        while parents[atom] != root:
            atom, parents[atom] = int(parents[atom]), root
        return root
