"""The one table of what operations do with channels: class name -> rule.

A rule gets a recorded call, the atoms of its input tensors and all atoms of the model; it says which weights lie along
which atoms, and returns the atoms of its outputs. An operation without a rule freezes what it touches.
"""

from __future__ import annotations

from collections.abc import Callable

import keras

from compress.channels.atoms import Atoms, Axes
from compress.models.graph import Node, is_of_keras

Rule = Callable[[Node, list[Axes], Atoms], list[Axes]]
"""`rule(node, inputs, atoms)`: the axes of each output, for the axes of each input tensor in `node.inputs`."""

RULES: dict[str, Rule] = {}
"""Rules by name of Keras' class; layers and operations of `keras.ops` share names where they do the same."""
OWN_RULES: dict[str, Rule] = {}
"""What users have registered by name of the class, their own or one of Keras; these come first."""


def rule_of(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of layers and operations of Keras by the names of their classes."""

    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return enter


def register_rule(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of layers by the names of their classes, such as your own.

    ```python
    @compress.register_rule("MyScale")  # multiplies each channel by a weight of its own
    def my_scale(node, inputs, atoms):
        (x,) = inputs
        atoms.weight(node.path, node.operation.scale, 0, x[-1], "passes")
        return [x]
    ```
    A wrong rule makes no wrong model: every pruned model is compared with the original.
    """

    def register(rule: Rule) -> Rule:
        OWN_RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def find_rule(node: Node) -> Rule | None:
    """Return the rule of an operation, if there is one; those of Keras' classes are for these alone."""
    return OWN_RULES.get(node.kind) or (RULES.get(node.kind) if is_of_keras(type(node.operation)) else None)


def apply_rule(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Return the axes of the outputs of a call; where no rule knows it, all that it touches is frozen."""
    rule = find_rule(node)
    if rule is None:
        return freeze_all(node, inputs, atoms, f"{node.path} ({node.kind}) has no rule")
    return rule(node, inputs, atoms)


def freeze_all(node: Node, inputs: list[Axes], atoms: Atoms, reason: str) -> list[Axes]:
    """Freeze all axes of the inputs, and return outputs of fixed lengths."""
    for axes in inputs:
        for axis in axes:
            atoms.freeze(axis, reason)
    return fixed_outputs(node)


def fixed_outputs(node: Node) -> list[Axes]:
    """Return the axes of the outputs of a call with nothing in them that could be removed."""
    return [[None] * len(tensor.shape) for tensor in output_tensors(node)]


def output_tensors(node: Node) -> list[keras.KerasTensor]:
    """Return the tensors that a call returns, in order."""
    return [each for each in keras.tree.flatten(node.outputs) if isinstance(each, keras.KerasTensor)]


def channel_axis(layer: keras.Layer, rank: int) -> int:
    """Return the axis of the channels by the layer's `data_format`."""
    return 1 if getattr(layer, "data_format", "channels_last") == "channels_first" else rank - 1
