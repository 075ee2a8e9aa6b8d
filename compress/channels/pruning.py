"""Channel pruning: whole channels are removed; what is left is a plain, narrower model that needs no sparse kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import keras
import numpy as np

from compress.channels.atoms import Norm
from compress.channels.costs import Cost, CostModel
from compress.channels.groups import ChannelGroups, Group, find_channel_groups
from compress.channels.importance import SCORES, ChannelScore, score_units
from compress.channels.rebuild import check_equal, narrow, silence
from compress.channels.selection import choose_units, require_ratio
from compress.channels.targets import reach_target
from compress.errors import DataError, UsageError
from compress.models.copying import copy_compile_settings
from compress.models.gradients import weight_gradients
from compress.models.graph import name_outputs_as, repeat, rewrite_graph
from compress.models.patterns import matches, require_matches

ScoreName = Literal["l1", "l2", "bn_scale", "fpgm", "taylor", "random"]


@dataclass(frozen=True, eq=False)
class PrunedChannels:
    """A narrower model and what was done.

    Args:
        model: the new model.
        kept: by path of each layer that lost channels, the indices of those of its outputs that stayed.
        difference: largest difference to the original with the removed channels silenced, relative to its largest
            output; `None` where norms over channels were allowed to change.
    """

    model: keras.Model
    kept: dict[str, list[int]]
    difference: float | None


def prune_channels(
    model: keras.Model,
    ratio: float | Mapping[str, float] | None = None,
    *,
    target: Mapping[Cost, float] | None = None,
    importance: ScoreName | ChannelScore = "l2",
    ranking: Literal["local", "global"] = "local",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    multiple_of: int = 8,
    minimum: int = 1,
    norm: Norm = "freeze",
    data: Any = None,
    seed: int = 0,
) -> PrunedChannels:
    """Return a narrower copy of `model` without its least important channels.

    What is coupled by sums, products, joins or shared layers stays or goes together. The new model is compared with the
    original whose removed channels are silenced, and refused if it computes anything else.

    Args:
        model: a functional or sequential float model; it is not changed.
        ratio: share of the channels to remove, at least 0 and less than 1, or shares by pattern over layer paths; half
            of them where there is neither a ratio nor a target.
        target: instead, the share of the `"parameters"` or `"macs"` that is to be left, such as `{"macs": 0.5}`; met
            within 3 %.
        importance: `"l1"`, `"l2"`, `"bn_scale"`, `"fpgm"`, `"taylor"` (needs `data` and a compiled model), `"random"`,
            or a function like those in `compress.channels.importance`.
        ranking: `"local"`: each group loses this share; `"global"`: all of them together do.
        include: shell patterns over layer paths; a group may lose channels if all layers that make them fit.
        exclude: shell patterns; a group with such a layer stays as it is.
        multiple_of: numbers of channels are rounded to a multiple: runtimes compute 63 channels more slowly than 64.
        minimum: channels that stay at least, wherever some are removed.
        norm: `"freeze"` keeps the channels that LayerNormalization and RMSNormalization norm over, `"allow"` does not.
        data: `(x, y)` or other data with labels, for `"taylor"`.
        seed: of `"random"`.

    Raises:
        UsageError: an option that makes no sense, a pattern that fits no layer, no group left, or a fake-quantized
            model.
        ModelError: the calls of the model are known to Python alone, or the result would be wrong.
        DataError: `"taylor"` has no data.
    """
    groups = find_channel_groups(model, norm=norm)
    chosen = select_groups(groups, include, exclude)
    ratio = require_choice(ratio, target, [path for group in groups.groups for path in group.producers])
    if multiple_of < 1 or minimum < 1:
        raise UsageError(
            f"expected multiple_of and minimum of at least 1. Received: multiple_of={multiple_of}, minimum={minimum}"
        )
    scores = _scores(groups, model, importance, data, seed)

    def choose(share: float | Mapping[str, float]) -> set[int]:
        options = {"together": ranking == "global", "multiple_of": multiple_of, "minimum": minimum}
        return choose_units(chosen, scores, share, **options)

    if target is None:
        removed = choose(ratio)
    else:
        ((cost, share),) = target.items()
        removed, _ = reach_target(chosen, choose, CostModel(groups, cost), share)
    narrowed = name_outputs_as(narrow(groups, removed), model)
    if type(model) is keras.Sequential and len(model.layers) == len(groups.graph.nodes):  # none of them is a model
        narrowed = keras.Sequential(narrowed.layers, name=model.name)
    kept = kept_channels(groups, removed)
    exact = not any(set(groups.atoms.units(atoms).tolist()) & removed for atoms in groups.atoms.normed)
    difference = check_equal(narrowed, silence(groups, removed)) if exact else None
    copy_compile_settings(model, narrowed)
    return PrunedChannels(narrowed, kept, difference)


def require_choice(
    ratio: float | Mapping[str, float] | None, target: Mapping[str, float] | None, paths: Sequence[str]
) -> float | Mapping[str, float]:
    """Return the ratio, or raise UsageError unless there is either a ratio or a target that makes sense."""
    if target is None:
        chosen = 0.5 if ratio is None else ratio
        require_ratio(chosen, paths)
        return chosen
    if ratio is not None:
        raise UsageError(f"expected a ratio or a target, not both. Received: ratio={ratio!r}, target={dict(target)}")
    known = get_args(Cost)
    if len(target) != 1 or not set(target) <= set(known) or not all(0 < share <= 1 for share in target.values()):
        raise UsageError(
            f"expected a target such as macs: 0.5, a share of one of {', '.join(known)}. Received: {dict(target)}"
        )
    return 0.0


def select_groups(groups: ChannelGroups, include: Sequence[str], exclude: Sequence[str]) -> list[Group]:
    """Return the groups that the patterns choose.

    Raises:
        UsageError: a pattern fits no layer, or no group is left.
    """
    paths = [node.path for node in groups.graph.nodes]
    require_matches(paths, include, "include")
    require_matches(paths, exclude, "exclude")
    chosen = [
        group
        for group in groups.groups
        if all(matches(path, include) and not matches(path, exclude) for path in group.producers)
    ]
    if not chosen:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(groups.frozen.items())[:5])
        raise UsageError(
            f"expected channels that can be removed. Received: model {groups.graph.name!r} with "
            f"{len(groups.groups)} groups, include={list(include)}, exclude={list(exclude)}",
            f"What stays, and why: {reasons or 'see bmcompress inspect --groups'}.",
        )
    return chosen


def kept_channels(groups: ChannelGroups, removed: set[int]) -> dict[str, list[int]]:
    """Return by path of each layer that loses channels the indices of those that stay."""
    gone = np.array(sorted(removed), np.int64)
    found = {}
    for producer in groups.atoms.producers:
        stays = ~np.isin(groups.atoms.units(producer.atoms), gone)
        if not stays.all():
            found[producer.path] = np.flatnonzero(stays).tolist()
    return found


def _scores(
    groups: ChannelGroups, model: keras.Model, importance: ScoreName | ChannelScore, data: Any, seed: int
) -> dict[int, float]:
    weights = groups.atoms.weights
    if importance == "random":
        units = sorted({unit for weight in weights for unit in groups.atoms.units(weight.atoms).tolist()})
        return dict(zip(units, np.random.default_rng(seed).random(len(units)).tolist(), strict=True))
    if not callable(importance) and importance not in SCORES:
        known = [*SCORES, "random"]
        raise UsageError(f"expected importance to be one of {known} or a function. Received: {importance!r}")
    variables = list({id(weight.variable): weight.variable for weight in weights}.values())
    gradients: dict[int, np.ndarray] = {}
    if importance == "taylor":
        if data is None:
            raise DataError("the importance taylor needs data with labels. Received: data=None", "Pass data=(x, y).")
        same = rewrite_graph(groups.graph, repeat)  # holds the variables that the atoms speak of
        copy_compile_settings(model, same)
        trained = {id(variable) for variable in same.trainable_variables}
        wanted = [variable for variable in variables if id(variable) in trained]
        gradients = dict(zip(map(id, wanted), weight_gradients(same, wanted, data), strict=True))
    values = {id(variable): keras.ops.convert_to_numpy(variable).astype("float32") for variable in variables}
    score = importance if callable(importance) else SCORES[importance]
    return score_units(weights, groups.atoms.units, score, values, gradients)
