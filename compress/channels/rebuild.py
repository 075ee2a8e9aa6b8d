"""From groups and the units to remove to a new, plain, narrower model; and the reference that it must be equal to.

The reference is the original with the removed channels silenced where they are read, which is exact also
where an activation makes something of nothing; norms that run over some of them norm over those that are left.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import keras
import numpy as np

from compress.channels.atoms import NormOver, Read
from compress.channels.groups import ChannelGroups
from compress.channels.reference import mask_axis, norm_over_kept
from compress.errors import ModelError
from compress.models.copying import rebuild_operation
from compress.models.graph import Node, free_name, rewrite_graph


def narrow(groups: ChannelGroups, removed: Collection[int]) -> keras.Model:
    """Return a new functional model without the removed units, with the layer names and options of the original.

    Args:
        groups: of the model.
        removed: units.

    Raises:
        ModelError: an operation cannot be called with fewer channels.
    """
    keep = _kept(groups, removed)
    new = _NewOperations(groups, keep)
    try:
        model = rewrite_graph(groups.graph, new.call)
        for source, target in new.pairs():
            _copy_weights(groups, source, target, keep)
    except (AttributeError, TypeError, ValueError) as error:  # such as a weight that is also used outside its layer
        reason = (str(error).rpartition("Exception encountered: ")[2].strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the model cannot be built with fewer channels. Received: {type(error).__name__}: {reason[:200]}",
            "Leave out the layers that are used in an unusual way with exclude.",
        ) from error
    return model


def duplicate(groups: ChannelGroups) -> tuple[keras.Model, dict[int, keras.Variable]]:
    """Return a functional model that computes the same, and its variables by `id` of those that `groups` speaks of."""
    new = _NewOperations(groups, None)
    model = rewrite_graph(groups.graph, new.call)
    return model, new.copy_variables()


def silence(groups: ChannelGroups, removed: Collection[int]) -> keras.Model:
    """Return a functional model like the original with zeros in the weights that read removed units."""
    keep = _kept(groups, removed)
    new = _NewOperations(groups, None)
    reads: dict[int, list[Read]] = {}
    for read in groups.atoms.reads:
        reads.setdefault(read.call, []).append(read)
    norms = {norm.call: norm for norm in groups.atoms.norms}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        if id(node) in norms:
            (x,) = _tensors((args, kwargs))
            return _norm(norms[id(node)], x, keep)
        own = reads.get(id(node), ())
        if own:
            args, kwargs = _silence_inputs(own, keep, args, kwargs)
        return new.call(node, *args, **kwargs)

    model = rewrite_graph(groups.graph, call)
    copies = new.copy_variables()
    for weight in groups.atoms.weights:
        if weight.role == "reads" and id(weight.variable) in copies:
            mask = keep[id(weight.atoms)]
            shape = [1] * len(weight.variable.shape)
            shape[weight.axis] = -1
            copy = copies[id(weight.variable)]
            values = keras.ops.convert_to_numpy(copy)
            copy.assign(np.where(mask.reshape(shape), values, np.zeros((), values.dtype)))
    return model


class _NewOperations:
    """New operations in place of those of a graph, made as they are called; the weights are copied afterwards.

    Args:
        groups: of the model.
        keep: which atoms stay, for narrower operations; or `None` for equal ones.
    """

    def __init__(self, groups: ChannelGroups, keep: dict[int, np.ndarray] | None):
        self._groups, self._keep = groups, keep
        self._made: dict[int, tuple[keras.Operation, keras.Operation]] = {}
        self._taken = {tensor.name for tensor in _tensors(groups.graph.inputs)}

    def call(self, node: Node, *args: Any, **kwargs: Any) -> Any:
        """Make a recorded call with the new operation."""
        operation = node.operation
        if id(operation) not in self._made:
            name = free_name(operation.name, node.path, self._taken)
            self._made[id(operation)] = operation, _rebuild(self._groups, operation, self._keep, name)
        return self._made[id(operation)][1](*args, **kwargs)

    def pairs(self) -> list[tuple[keras.Layer, keras.Layer]]:
        """Return each layer that was called and its new one."""
        return [(old, new) for old, new in self._made.values() if isinstance(old, keras.Layer)]

    def copy_variables(self) -> dict[int, keras.Variable]:
        """Give equal layers the values of the old ones, and return the new variables by `id` of the old ones."""
        found = {}
        for source, target in self.pairs():
            for before, after in zip(source.variables, target.variables, strict=True):
                after.assign(keras.ops.convert_to_numpy(before))
                after.trainable = before.trainable
                found[id(before)] = after
        return found


def _norm(norm: NormOver, x: keras.KerasTensor, keep: dict[int, np.ndarray]) -> keras.KerasTensor:
    masks = {axis: keep[id(atoms)] for axis, atoms in norm.atoms.items()}
    return norm_over_kept(norm.layer, x, norm.axes, masks, norm.groups)


def _silence_inputs(reads: list[Read], keep: dict[int, np.ndarray], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of a call with zeros for the channels that it would read and that are removed."""
    counter = itertools.count()

    def silenced(value: Any) -> Any:
        if not isinstance(value, keras.KerasTensor):
            return value
        index = next(counter)
        for read in reads:
            if read.tensor == index:
                value = mask_axis(value, read.axis, keep[id(read.atoms)])
        return value

    return keras.tree.map_structure(silenced, (args, kwargs))


def _tensors(structure: Any) -> list[keras.KerasTensor]:
    return [each for each in keras.tree.flatten(structure) if isinstance(each, keras.KerasTensor)]


def _kept(groups: ChannelGroups, removed: Collection[int]) -> dict[int, np.ndarray]:
    """Return by `id` of an array of atoms which of them stay."""
    gone = np.array(sorted(removed), np.int64)
    arrays = [weight.atoms for weight in groups.atoms.weights]
    arrays += [edit.atoms for edits in groups.atoms.edits.values() for edit in edits]
    arrays += [each.atoms for each in (*groups.atoms.reads, *groups.atoms.factors)]
    arrays += [atoms for norm in groups.atoms.norms for atoms in norm.atoms.values()]
    return {id(array): ~np.isin(groups.atoms.units(array), gone) for array in arrays}


def _rebuild(
    groups: ChannelGroups, operation: keras.Operation, keep: dict[int, np.ndarray] | None, name: str
) -> keras.Operation:
    """Return an operation like this one, for fewer channels if `keep` says so, without its weights."""
    config = _unbuilt(operation.get_config())
    if isinstance(operation, keras.Layer) or "name" in config:
        config["name"] = name
    for edit in groups.atoms.edits.get(id(operation), ()) if keep is not None else ():
        config = _with_entry(config, edit.key.split("/"), edit.value(int(keep[id(edit.atoms)].sum())))
    return rebuild_operation(operation, config)


def _with_entry(config: Any, path: list[str], value: Any) -> Any:
    """Return a configuration in which the entry at `path`, through dictionaries and sequences, is `value`."""
    if not path:
        return value
    if isinstance(config, dict):
        return {**config, path[0]: _with_entry(config.get(path[0]), path[1:], value)}
    place = int(path[0])
    return [_with_entry(each, path[1:], value) if index == place else each for index, each in enumerate(config)]


def _unbuilt(config: Any) -> Any:
    """Return a configuration without the shapes for which layers inside the layer were built."""
    if isinstance(config, dict):
        return {key: _unbuilt(value) for key, value in config.items() if key != "build_config"}
    return [_unbuilt(each) for each in config] if isinstance(config, list) else config


def _copy_weights(groups: ChannelGroups, source: keras.Layer, target: keras.Layer, keep: dict[int, np.ndarray]) -> None:
    cuts: dict[int, list[tuple[int, np.ndarray]]] = {}
    own = {id(variable) for variable in source.variables}
    for weight in groups.atoms.weights:
        if id(weight.variable) in own:
            cuts.setdefault(id(weight.variable), []).append((weight.axis, keep[id(weight.atoms)]))
    factors = {id(each.variable): each for each in groups.atoms.factors}
    for before, after in zip(source.variables, target.variables, strict=True):
        values = keras.ops.convert_to_numpy(before)
        for axis, mask in cuts.get(id(before), ()):
            values = np.compress(mask, values, axis)
        if factor := factors.get(id(before)):
            values = values * np.asarray(factor.value(int(keep[id(factor.atoms)].sum())), values.dtype)
        after.assign(values)
        after.trainable = before.trainable
