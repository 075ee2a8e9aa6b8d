"""Low-rank factorisation: dense layers and convolutions become two or three smaller ones where that is cheaper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np

from compress.errors import UsageError
from compress.low_rank.decompositions import factors_of, rebuild
from compress.low_rank.planning import Candidate, Choice, Cost, cost_of, find_candidates, whole_costs
from compress.models.copying import copy_compile_settings, copy_model
from compress.models.equivalence import check_equal
from compress.models.graph import Graph, Node, copy_graph, name_outputs_as, repeat, require_float, rewrite_graph
from compress.models.patterns import matches, require_matches
from compress.targets.files import TOLERANCE, FileCost, FileCosts, Runtime
from compress.targets.reaching import Reached, reach_file_share

Rank = int | float
"""A number of components, or a share below 1 of all."""

_HALVINGS = 30


@dataclass(frozen=True)
class FactorizedLayer:
    """What became of a layer.

    Args:
        method: `"svd"`, `"spatial"` or `"tucker"`.
        ranks: one, or two for Tucker-2.
        error: length of the difference to the kernel, relative to the kernel's.
        macs: multiply-accumulates before and after.
        parameters: of the kernel before and of those after.
    """

    method: str
    ranks: tuple[int, ...]
    error: float
    macs: tuple[int, int]
    parameters: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Factorized:
    """A factorised model and what was done.

    Args:
        model: the new model.
        layers: by path of each layer that was factorised, how.
        skipped: by path of each other layer with a kernel, why not.
        difference: largest difference to the original with the kernels that the factors stand for, relative to its
            largest output.
        left: share of the parameters and of the MACs that is left.
        reached: what became of the target, where there was one.
    """

    model: keras.Model
    layers: dict[str, FactorizedLayer]
    skipped: dict[str, str]
    difference: float
    left: dict[Cost, float]
    reached: Reached | None = None


def factorize(
    model: keras.Model,
    energy: float | None = None,
    *,
    rank: Rank | Mapping[str, Rank] | None = None,
    target: Mapping[Cost | FileCost, float] | None = None,
    runtime: Runtime = "tflite",
    threads: int = 1,
    method: Literal["auto", "svd", "spatial", "tucker"] = "auto",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    multiple_of: int = 8,
) -> Factorized:
    """Return a copy of `model` whose kernels are products of smaller ones, where that is cheaper.

    Args:
        model: a functional or sequential float model; it is not changed.
        energy: share of the squared singular values that every kernel keeps, such as 0.9.
        rank: instead, how many components, or which share below 1 of them, for all layers or by pattern over paths.
        target: instead, the share of the `"parameters"`, `"macs"`, `"bytes"` of the exported file or its `"latency"`,
            measured on this machine, that is to be left, such as `{"macs": 0.5}`; met within 3 % with one energy for
            all layers.
        runtime: of a target in bytes or latency: `"tflite"` (LiteRT) or `"onnx"` (ONNX Runtime).
        threads: of that runtime.
        method: `"svd"`: a layer with fewer outputs, and one of size 1; `"spatial"`: one along the height, one along the
            width (Jaderberg et al. 2014, arXiv:1405.3866); `"tucker"`: size 1, a small core, size 1 (Kim et al. 2016,
            arXiv:1511.06530); `"auto"`: for each layer the cheapest of them that keeps as much.
        include: shell patterns over layer paths.
        exclude: shell patterns over layer paths that stay.
        multiple_of: ranks are rounded up to a multiple, which runtimes compute faster.

    Raises:
        UsageError: an option that makes no sense, a target that cannot be met, a pattern that fits no layer, or a
            fake-quantized model.
        ModelError: the calls of the model are known to Python alone, or the result would be wrong.
    """
    require_choice(energy, rank, target, multiple_of)
    graph = open_graph(model)
    candidates, skipped = select_candidates(graph, method, include, exclude)
    cost: Cost = "parameters" if target and set(target) & {"parameters", "bytes"} else "macs"
    whole = whole_costs(graph)

    def plan_for(share: float, tolerance: float = TOLERANCE) -> dict[str, Choice]:
        return _reach(candidates, whole, cost, share, multiple_of, tolerance)

    reached = None
    if target is None:
        chosen = [(each, _choose(each, energy, rank, multiple_of, cost)) for each in candidates]
        plan = {each.path: choice for each, choice in chosen if choice is not None}
    elif set(target) & {"parameters", "macs"}:
        ((_, share),) = target.items()
        plan = plan_for(share)
        found = cost_of(plan, candidates, whole, cost) / whole[cost]
        reached = Reached(cost, share, found, found)
    else:
        ((name, share),) = target.items()
        plans: dict[float, dict[str, Choice]] = {}

        def build(wanted: float) -> tuple[keras.Model, float]:
            own = plan_for(wanted, math.inf)  # the file counts, not what leads there
            found = cost_of(own, candidates, whole, cost) / whole[cost]
            plans[found] = own
            return _build(graph, candidates, own)[0], found

        with FileCosts(model, name, runtime, threads) as files:
            reached, proxy = reach_file_share(build, files, name, share)
        plan = plans[proxy]
    built, errors = _build(graph, candidates, plan)
    # The layers that stay have been called by every model that was built; a copy has the calls of the result alone.
    factorized = name_outputs_as(copy_model(built), model)
    if type(model) is keras.Sequential and len(model.layers) == len(graph.nodes):  # none of them is a model
        factorized = keras.Sequential(factorized.layers, name=model.name)
    difference = _check(factorized, graph, candidates, plan)
    copy_compile_settings(model, factorized)
    layers = {
        each.path: FactorizedLayer(
            plan[each.path].method,
            plan[each.path].ranks,
            errors[each.path],
            (each.macs, plan[each.path].macs),
            (each.parameters, plan[each.path].parameters),
        )
        for each in candidates
        if each.path in plan
    }
    skipped |= {each.path: "would not get cheaper" for each in candidates if each.path not in plan}
    left = {name: cost_of(plan, candidates, whole, name) / max(1, whole[name]) for name in ("parameters", "macs")}
    return Factorized(factorized, layers, skipped, difference, left, reached)


def require_choice(energy: float | None, rank: Any, target: Mapping[str, float] | None, multiple_of: int) -> None:
    """Raise UsageError unless exactly one of energy, rank and target is given and makes sense."""
    if sum(each is not None for each in (energy, rank, target)) != 1:
        raise UsageError(f"expected an energy, a rank or a target. Received: {energy=}, {rank=}, {target=}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"expected an energy above 0 and at most 1. Received: energy={energy}")
    for each in rank.values() if isinstance(rank, Mapping) else [rank] if rank is not None else []:
        if isinstance(each, bool) or not (0 < each < 1 if isinstance(each, float) else each >= 1):
            raise UsageError(f"expected a rank of at least 1, or a share between 0 and 1. Received: rank={each}")
    if multiple_of < 1:
        raise UsageError(f"expected multiple_of of at least 1. Received: multiple_of={multiple_of}")
    known = {"parameters", "macs", "bytes", "latency"}
    if target is not None and (
        len(target) != 1 or not set(target) <= known or not all(0 < share <= 1 for share in target.values())
    ):
        raise UsageError(
            f"expected a target such as macs: 0.5, a share of one of {sorted(known)}. Received: {dict(target)}"
        )


def open_graph(model: keras.Model) -> Graph:
    """Return the graph of a copy of a float model.

    Raises:
        UsageError: the model is fake-quantized.
        ModelError: its calls are known to Python alone.
    """
    return copy_graph(require_float(model, "Factorise before you quantize."))


def select_candidates(
    graph: Graph, method: str, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Candidate], dict[str, str]]:
    """Return the layers that the patterns choose, and why the others stay.

    Raises:
        UsageError: an unknown method, a pattern that fits no layer, or none is left.
    """
    if method not in ("auto", "svd", "spatial", "tucker"):
        raise UsageError(f"expected method to be auto, svd, spatial or tucker. Received: method={method!r}")
    found, skipped = find_candidates(graph, ("svd", "spatial", "tucker") if method == "auto" else (method,))
    paths = [node.path for node in graph.nodes]
    require_matches(paths, include, "include")
    require_matches(paths, exclude, "exclude")
    chosen = [each for each in found if matches(each.path, include) and not matches(each.path, exclude)]
    if not chosen:
        raise UsageError(
            f"expected a dense layer or convolution to factorise. Received: model {graph.name!r}, "
            f"include={list(include)}, exclude={list(exclude)}"
        )
    return chosen, skipped


def _choose(
    candidate: Candidate, energy: float | None, rank: Rank | Mapping[str, Rank] | None, multiple_of: int, cost: Cost
) -> Choice | None:
    if energy is not None:
        return candidate.choose(energy, multiple_of, cost)
    own = rank
    if isinstance(rank, Mapping):
        own = next((value for pattern, value in rank.items() if matches(candidate.path, [pattern])), None)
    return None if own is None else candidate.choose_rank(own, multiple_of, cost)


def _reach(
    candidates: Sequence[Candidate],
    whole: Mapping[Cost, int],
    cost: Cost,
    share: float,
    multiple_of: int,
    tolerance: float,
) -> dict[str, Choice]:
    """Return the plan whose cost is nearest to a share of the whole, with one energy for all layers.

    Ranks are rounded, so between the two energies that enclose the target layer by layer follows the smaller one.

    Raises:
        UsageError: the target cannot be met; the nearest share is named.
    """

    def plan_of(energy: float) -> dict[str, Choice]:
        choices = {each.path: each.choose(energy, multiple_of, cost) for each in candidates}
        return {path: choice for path, choice in choices.items() if choice is not None}

    def price(plan: Mapping[str, Choice]) -> float:
        return cost_of(plan, candidates, whole, cost) / whole[cost]

    low, high = 0.0, 1.0
    least = price(plan_of(low))
    if least > share * (1 + tolerance):
        raise UsageError(
            f"the target cannot be met: the least that can be left is {least:.1%}. Received: {share:.1%}",
            "Raise the target, lower `multiple_of`, or let more layers be factorised.",
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if price(plan_of(middle)) > share else (middle, high)
    plan, cheaper = plan_of(high), plan_of(low)
    best = min((dict(plan), cheaper), key=lambda each: abs(price(each) - share))
    for each in candidates:
        if each.path in cheaper:
            plan[each.path] = cheaper[each.path]
        if abs(price(plan) - share) < abs(price(best) - share):
            best = dict(plan)
    if abs(price(best) - share) > tolerance * share:
        raise UsageError(
            f"the target cannot be met within {tolerance:.0%}: the nearest that rounding allows is {price(best):.1%}. "
            f"Received: {share:.1%}",
            f"Ask for {price(best):.1%}, or lower `multiple_of`.",
        )
    return best


def _build(
    graph: Graph, candidates: Sequence[Candidate], plan: Mapping[str, Choice]
) -> tuple[keras.Model, dict[str, float]]:
    """Return the model with the planned layers, and the error of each kernel."""
    by_layer = {id(each.layer): each for each in candidates if each.path in plan}
    parts: dict[int, list[keras.Layer]] = {}
    taken = {node.operation.name for node in graph.nodes}

    def call(node: Node, *args: Any, **kwargs: Any) -> Any:
        candidate = by_layer.get(id(node.operation))
        if candidate is None:
            return repeat(node, *args, **kwargs)
        if id(node.operation) not in parts:
            parts[id(node.operation)] = _layers(candidate, plan[candidate.path], taken)
        (x,) = [each for each in keras.tree.flatten((args, kwargs)) if isinstance(each, keras.KerasTensor)]
        for layer in parts[id(node.operation)]:
            x = layer(x)
        return x

    model = rewrite_graph(graph, call)
    errors = {}
    for key, layers in parts.items():
        candidate = by_layer[key]
        choice = plan[candidate.path]
        factors = factors_of(candidate.kernel, choice.method, choice.ranks)
        for layer, values in zip(layers, factors, strict=True):
            layer.kernel.assign(values.astype("float32"))
            layer.trainable = candidate.layer.trainable
        if candidate.layer.bias is not None:
            layers[-1].bias.assign(candidate.layer.bias)
        missing = np.linalg.norm(rebuild(factors, choice.method) - candidate.kernel)
        errors[candidate.path] = float(missing / (np.linalg.norm(candidate.kernel) or 1.0))
    return model, errors


def _layers(candidate: Candidate, choice: Choice, taken: set[str]) -> list[keras.Layer]:
    """Return the layers that stand for one; the last has its name, bias and activation."""
    layer = candidate.layer
    config = layer.get_config()
    *size, _, outputs = candidate.kernel.shape
    count = "filters" if size else "units"
    inner = {"use_bias": False, "activation": "linear", "activity_regularizer": None}
    plain = {"kernel_size": (1,) * len(size), "strides": 1, "padding": "valid", "dilation_rate": 1} if size else {}
    if choice.method == "svd":
        changes = [{count: choice.ranks[0], **inner}, {count: outputs, **plain}]
    elif choice.method == "spatial":
        steps, holes = layer.strides, layer.dilation_rate
        down = {"kernel_size": (size[0], 1), "strides": (steps[0], 1), "dilation_rate": (holes[0], 1)}
        right = {"kernel_size": (1, size[1]), "strides": (1, steps[1]), "dilation_rate": (1, holes[1])}
        changes = [{"filters": choice.ranks[0], **down, **inner}, right]
    else:
        first = {"filters": choice.ranks[0], **plain, **inner}
        changes = [first, {"filters": choice.ranks[1], **inner}, {"filters": outputs, **plain}]
    made = []
    for index, change in enumerate(changes):
        name = layer.name
        if index < len(changes) - 1:
            name = f"{layer.name}_{'in' if index == 0 else 'core'}"
            while name in taken:
                name += "_"
            taken.add(name)
        made.append(type(layer).from_config({**config, **change, "name": name}))
    return made


def _check(factorized: keras.Model, graph: Graph, candidates: Sequence[Candidate], plan: Mapping[str, Choice]) -> float:
    """Return the largest difference to the original with the kernels that the factors stand for, or raise."""
    for each in candidates:
        if each.path in plan:
            choice = plan[each.path]
            each.layer.kernel.assign(rebuild(factors_of(each.kernel, choice.method, choice.ranks), choice.method))
    claim = "the factorised model does not compute what its kernels stand for"
    return check_equal(factorized, rewrite_graph(graph, repeat), claim)
