"""Rules of attention layers: whole heads can go, the width of a head, and what queries, keys and values are made of.

Scores are divided by the root of the width of a head. Where that shrinks, the weights of the queries take over what the
root loses, so that the narrow layer computes the same scores.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import keras
import numpy as np

from compress.channels.atoms import Atoms, Axes, Role
from compress.channels.rules import fixed_outputs, freeze_all, output_tensors, rule_of
from compress.models.graph import Node
from compress.models.walking import find_all_layers


@rule_of("MultiHeadAttention")
def attention(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    layer = node.operation
    sources = _sources(node, inputs)
    config = layer.get_config()
    if sources is None or len(config.get("output_shape") or ()) > 1:
        return freeze_all(node, inputs, atoms, f"{node.path} (MultiHeadAttention) is called in an unknown way")
    heads = atoms.new(layer.num_heads, f"{node.path}/heads")
    key = atoms.new(layer.key_dim, f"{node.path}/key_width")
    value = atoms.new(layer.value_dim, f"{node.path}/value_width")
    if layer.key_dim == layer.value_dim:  # JAX's fused attention wants them alike, so they stay so
        atoms.tie(key, value, f"{node.path} has keys and values of one width")
    parts = _projections(layer)
    _project(node, parts["query"], sources["query"], (heads, key), atoms, width="reads")  # the keys, by their product
    _project(node, parts["key"], sources["key"], (heads, key), atoms)
    _project(node, parts["value"], sources["value"], (heads, value), atoms)
    if "gate" in parts:
        _project(node, parts["gate"], sources["query"], (heads, value), atoms)
    out = _output(node, parts["attention_output"], (heads, value), atoms)
    atoms.edit(layer, "num_heads", heads)
    atoms.edit(layer, "key_dim", key)
    atoms.edit(layer, "value_dim", value)
    atoms.edit(layer, "output_shape", out, lambda count: (count,))
    _keep_scores(parts["query"], key, atoms)
    return _results(node, inputs, sources, heads, out, atoms)


@rule_of("GroupedQueryAttention", "GroupQueryAttention")
def grouped_attention(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """A head of keys and values goes with the heads of queries that share it; the model keeps its width throughout."""
    layer = node.operation
    sources = _sources(node, inputs)
    if sources is None:
        return freeze_all(node, inputs, atoms, f"{node.path} ({node.kind}) is called in an unknown way")
    heads = atoms.new(layer.num_key_value_heads, f"{node.path}/heads")
    repeated = np.repeat(heads, layer.num_query_heads // layer.num_key_value_heads)
    width = atoms.new(layer.head_dim, f"{node.path}/head_width")
    parts = _projections(layer)
    _project(node, parts["query"], sources["query"], (repeated, width), atoms, width="reads")
    _project(node, parts["key"], sources["key"], (heads, width), atoms)
    _project(node, parts["value"], sources["value"], (heads, width), atoms)
    if "gate" in parts:
        _project(node, parts["gate"], sources["query"], (repeated, width), atoms)
    out = _output(node, parts["attention_output"], (repeated, width), atoms)
    atoms.edit(layer, "num_key_value_heads", heads)
    atoms.edit(layer, "num_query_heads", repeated)
    atoms.edit(layer, "head_dim", width)
    _keep_scores(parts["query"], width, atoms)
    reason = f"{node.path} makes as many channels as it reads"
    for source in (sources["query"], sources["value"]):
        atoms.tie(out, source[-1], reason)
    own = None if sources["query"][-1] is None else out
    return _results(node, inputs, sources, heads, own, atoms)


@rule_of("Attention", "AdditiveAttention")
def without_projections(node: Node, inputs: list[Axes], atoms: Atoms) -> list[Axes]:
    """Queries and keys are read by their product, or by the scale of their sum; values pass."""
    layer = node.operation
    given = node.args[0] if node.args else node.kwargs["inputs"]
    by_tensor = _by_tensor(node, inputs)
    additive = node.kind == "AdditiveAttention"
    if not layer.use_scale if additive else layer.score_mode != "dot":
        return freeze_all(node, inputs, atoms, f"{node.path} ({node.kind}) sums over channels after an activation")
    query, value, key = (by_tensor[id(each)] for each in (*given[:2], given[2] if len(given) > 2 else given[1]))
    width = atoms.tie(query[-1], key[-1], f"{node.path} compares it with channels that are fixed")
    if additive:
        atoms.weight(node.path, layer.scale, 0, width, "reads")
    else:
        atoms.read(id(node), [id(each) for each in node.inputs].index(id(given[0])), len(query) - 1, width)
    _freeze_places(node, inputs, (query, value, key), atoms)
    return [[None, None, value[-1]], *fixed_outputs(node)[1:]]


def _by_tensor(node: Node, inputs: list[Axes]) -> dict[int, Axes]:
    return dict(zip(map(id, node.inputs), inputs, strict=True))


def _sources(node: Node, inputs: list[Axes]) -> dict[str, Axes] | None:
    """Return the axes of query, key and value, or `None` where they are not tensors of the graph."""
    bound = inspect.signature(node.operation.call).bind(*node.args, **node.kwargs).arguments
    by_tensor = _by_tensor(node, inputs)
    found: dict[str, Any] = {name: bound.get(name) for name in ("query", "value", "key")}
    if found["key"] is None:
        found["key"] = found["value"]
    known = all(id(each) in by_tensor for each in found.values())
    return {name: by_tensor[id(each)] for name, each in found.items()} if known else None


def _projections(layer: keras.Layer) -> dict[str, keras.Layer]:
    """Return the layers that project, by their names: query, key, value, attention_output, and gate if there is one."""
    return {each.name: each for each in find_all_layers(layer) if isinstance(each, keras.layers.EinsumDense)}


def _project(
    node: Node,
    projection: keras.Layer,
    source: Axes,
    made: tuple[np.ndarray, np.ndarray],
    atoms: Atoms,
    *,
    width: Role = "makes",
) -> None:
    """Say what lies along the weights (channels, heads, width) of a projection to heads."""
    heads, own = made
    atoms.weight(node.path, projection.kernel, 0, source[-1], "reads")
    for variable, first in ((projection.kernel, 1), (projection.bias, 0)):
        if variable is not None:
            atoms.weight(node.path, variable, first, heads, "makes")
            atoms.weight(node.path, variable, first + 1, own, width)


def _output(node: Node, projection: keras.Layer, read: tuple[np.ndarray, np.ndarray], atoms: Atoms) -> np.ndarray:
    out = atoms.new(projection.kernel.shape[-1], node.path)
    for axis, own in enumerate(read):
        atoms.weight(node.path, projection.kernel, axis, own, "reads")
    atoms.weight(node.path, projection.kernel, 2, out, "makes")
    if projection.bias is not None:
        atoms.weight(node.path, projection.bias, 0, out, "makes")
    return out


def _keep_scores(query: keras.Layer, width: np.ndarray, atoms: Atoms) -> None:
    for variable in (query.kernel, query.bias):
        atoms.factor(variable, width, lambda count: math.sqrt(count / len(width)))


def _results(
    node: Node, inputs: list[Axes], sources: dict[str, Axes], heads: np.ndarray, out: Any, atoms: Atoms
) -> list[Axes]:
    """Return the axes of the outputs: of what is attended to, and of the scores where they are asked for."""
    _freeze_places(node, inputs, tuple(sources.values()), atoms)
    results: list[Axes] = [[*([None] * (len(sources["query"]) - 1)), out]]
    if len(output_tensors(node)) > 1:
        atoms.freeze(heads, f"{node.path} returns its scores")
        results += fixed_outputs(node)[1:]
    return results


def _freeze_places(node: Node, inputs: list[Axes], sources: tuple[Axes, ...], atoms: Atoms) -> None:
    """Keep what is attended along, and all of masks."""
    for axes in inputs:
        source = any(axes is each for each in sources)
        for axis in axes[1:-1] if source else axes:
            atoms.freeze(axis, f"{node.path} attends along it")
