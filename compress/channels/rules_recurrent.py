"""Rules of recurrent layers, and of the wrappers that call a layer in two directions or at each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import keras
import numpy as np

from compress.channels.atoms import Atoms, Axes, Axis
from compress.channels.rules import apply_rule, channel_axis, freeze_all, output_tensors, rule_of
from compress.channels.rules_elementwise import is_elementwise
from compress.models.graph import Node, is_of_keras

_GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
_CELL_GATES = {f"{name}Cell": gates for name, gates in _GATES.items()}
_STATES = {"LSTMCell": 2, "GRUCell": 1, "SimpleRNNCell": 1}


@rule_of(*_GATES)
def recurrent(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x, *states) = node.operation, inputs
    out = _units(node, layer, layer.cell, x[-1], atoms)
    atoms.edit(layer, "units", out)
    return _steps(node, x, out, states, atoms)


@rule_of("RNN")
def cells(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """A layer around one cell, or around several that read each other's units."""
    layer, (x, *states) = node.operation, inputs
    stacked = type(layer.cell).__name__ == "StackedRNNCells"
    found = list(layer.cell.cells) if stacked else [layer.cell]
    if any(not _is_known(cell) for cell in found) or (states and stacked):
        return freeze_all(node, inputs, atoms, f"{node.path} (RNN) has a cell that has no rule")
    axis, outs = x[-1], []
    for index, cell in enumerate(found):
        atoms.inside(cell, layer, f"cell/config/cells/{index}/config" if stacked else "cell/config")
        axis = _units(node, layer, cell, axis, atoms, f"/{index}" if stacked else "")
        atoms.edit(cell, "units", axis)
        outs.append(axis)
    result = _steps(node, x, outs[-1], states, atoms)
    if layer.return_state:
        own = [out for cell, out in zip(found, outs, strict=True) for _ in range(_STATES[type(cell).__name__])]
        return [result[0], *([None, out] for out in own)]
    return result


@rule_of("Bidirectional")
def bidirectional(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Both directions make channels, which are joined or merged; Keras wants as many of either."""
    layer, (x, *states) = node.operation, inputs
    both = {"forward": layer.forward_layer, "backward": layer.backward_layer}
    if states or any(type(each).__name__ not in _GATES or not _is_known(each.cell) for each in both.values()):
        return freeze_all(
            node, inputs, atoms, f"{node.path} (Bidirectional) is known around one LSTM, GRU or SimpleRNN"
        )
    outs: list[np.ndarray] = []
    for (name, each), key in zip(both.items(), ("layer/config", "backward_layer/config"), strict=True):
        atoms.inside(each, layer, key)
        out = _units(node, each, each.cell, x[-1], atoms, f"/{name}")
        atoms.edit(each, "units", out)
        outs.append(out)
    atoms.freeze(x[1], f"{node.path} reads it step by step")
    atoms.tie(*outs, f"{node.path} has directions of unlike width")
    if layer.merge_mode is None:
        merged = list(outs)
    else:
        merged = [np.concatenate(outs) if layer.merge_mode == "concat" else outs[0]]
    if layer.return_state:
        count = _STATES[type(layer.forward_layer.cell).__name__]
        merged += [out for out in outs for _ in range(count)]
    return [
        [*([None] * (len(tensor.shape) - 1)), out] for tensor, out in zip(output_tensors(node), merged, strict=True)
    ]


@rule_of("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
def convolutional(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer, (x, *states) = node.operation, inputs
    if states or not _is_plain(layer, layer.cell):
        return freeze_all(node, inputs, atoms, f"{node.path} ({node.kind}) is called in an unknown way")
    first = channel_axis(layer, len(x)) == 1
    channels = 2 if first else len(x) - 1  # axis 1 is time
    atoms.weight(node.path, layer.cell.kernel, -2, x[channels], "reads")
    out = atoms.new(layer.filters, node.path)
    atoms.edit(layer, "filters", out)
    _gates(node, layer.cell, -2, out, 4, atoms)
    for axis, own in enumerate(x):
        if axis not in (0, channels):
            atoms.freeze(own, f"{node.path} reads neighbours along it")
    space = len(x) - 3
    return [
        [out if axis == (len(tensor.shape) - 1 - space if first else len(tensor.shape) - 1) else None
         for axis in range(len(tensor.shape))]
        for tensor in output_tensors(node)
    ]  # fmt: skip


@rule_of("TimeDistributed")
def at_each_step(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """What the layer inside does, without the axis of time."""
    layer = node.operation
    x, *masks = inputs
    if masks or isinstance(layer.layer, keras.Model):
        return freeze_all(node, inputs, atoms, f"{node.path} (TimeDistributed) is known around one layer")
    atoms.freeze(x[1], f"{node.path} calls its layer at each place of it")
    atoms.inside(layer.layer, layer, "layer/config")
    step = Node(node.path, layer.layer, (_a_step(node.inputs[0]),), {}, keras.tree.map_structure(_a_step, node.outputs))
    reads, norms = len(atoms.reads), len(atoms.norms)
    outputs = apply_rule(step, [[x[0], *x[2:]]], atoms)
    atoms.reads[reads:] = [replace(each, call=id(node), axis=each.axis + 1) for each in atoms.reads[reads:]]
    atoms.norms[norms:] = [
        replace(
            each,
            call=id(node),
            axes=tuple(axis + 1 for axis in each.axes),
            atoms={axis + 1: own for axis, own in each.atoms.items()},
            groups=each.groups and (each.groups[0], each.groups[1] + 1),
        )
        for each in atoms.norms[norms:]
    ]
    return [[own[0], None, *own[1:]] for own in outputs]


def _a_step(tensor: keras.KerasTensor) -> keras.KerasTensor:
    return keras.KerasTensor((tensor.shape[0], *tensor.shape[2:]), tensor.dtype)


def _steps(node: Node, x: Axes, out: Axis, states: Sequence[Axes], atoms: Atoms) -> list[Axes]:
    """Return the axes of the outputs of a layer that reads its input step by step."""
    for state in states:
        out = atoms.tie(out, state[-1], f"{node.path} has a state of fixed length")
    atoms.freeze(x[1], f"{node.path} reads it step by step")
    return [[*([None] * (len(tensor.shape) - 1)), out] for tensor in output_tensors(node)]


def _units(node: Node, layer: keras.Layer, cell: keras.Layer, x: Axis, atoms: Atoms, name: str = "") -> np.ndarray:
    """Return the atoms of the units of a cell; `name` follows the layer's path where there are several."""
    atoms.weight(node.path, cell.kernel, 0, x, "reads")
    out = atoms.new(cell.units, f"{node.path}{name}")
    if not _is_plain(layer, cell):
        atoms.freeze(out, f"{node.path} looks at its units together")
    _gates(node, cell, 0, out, _CELL_GATES[type(cell).__name__], atoms)
    return out


def _gates(node: Node, cell: keras.Layer, axis: int, out: np.ndarray, gates: int, atoms: Atoms) -> None:
    tiled = np.tile(out, gates)
    atoms.weight(node.path, cell.kernel, -1, tiled, "makes")
    atoms.weight(node.path, cell.recurrent_kernel, axis, out, "reads")
    atoms.weight(node.path, cell.recurrent_kernel, -1, tiled, "makes")
    if cell.bias is not None:
        atoms.weight(node.path, cell.bias, -1, tiled, "makes")


def _is_known(cell: keras.Layer) -> bool:
    return type(cell).__name__ in _CELL_GATES and is_of_keras(type(cell))


def _is_plain(layer: keras.Layer, cell: keras.Layer) -> bool:
    """Return whether each unit is made by itself, and no state is kept between calls."""
    functions = [cell.activation, getattr(cell, "recurrent_activation", cell.activation)]
    return not layer.stateful and all(is_elementwise(function) for function in functions)
