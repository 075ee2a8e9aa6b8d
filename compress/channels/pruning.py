"""Channel pruning: whole channels are removed; what is left is a plain, narrower model that needs no sparse kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import keras
import numpy as np

from compress.channels.atoms import Norm
from compress.channels.costs import Cost, CostModel
from compress.channels.groups import ChannelGroups, find_channel_groups
from compress.channels.importance import SCORES, ChannelScore, score_units
from compress.channels.rebuild import narrow, silence
from compress.channels.samples import channel_activations, loss_gradients, output_gradients
from compress.channels.selection import choose_units, require_ratio, select_groups
from compress.channels.targets import reach_file_target, reach_target
from compress.errors import DataError, UsageError
from compress.models.copying import copy_compile_settings
from compress.models.equivalence import check_equal
from compress.models.graph import name_outputs_as
from compress.targets.files import TOLERANCE, FileCost, FileCosts, Runtime
from compress.targets.reaching import Reached

ScoreName = Literal["l1", "l2", "bn_scale", "fpgm", "taylor", "hessian", "activation", "random"]
NEED_DATA = ("taylor", "hessian", "activation")
"""Scores that look at samples."""


@dataclass(frozen=True, eq=False)
class PrunedChannels:
    """A narrower model and what was done.

    Args:
        model: the new model.
        kept: by path of each layer that lost channels, the indices of those of its outputs that stayed.
        difference: largest difference to the original with the removed channels silenced, relative to its largest
            output; norms over channels run over those that are left. `None` where a rule of the user's own says that
            norms may change.
        reached: what became of the target, where there was one.
    """

    model: keras.Model
    kept: dict[str, list[int]]
    difference: float | None
    reached: Reached | None = None


def prune_channels(
    model: keras.Model,
    ratio: float | Mapping[str, float] | None = None,
    *,
    target: Mapping[Cost | FileCost, float] | None = None,
    tolerance: float = TOLERANCE,
    runtime: Runtime = "tflite",
    threads: int = 1,
    importance: ScoreName | ChannelScore = "l2",
    ranking: Literal["local", "global"] = "local",
    normalize: bool = True,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    multiple_of: int = 8,
    minimum: int = 1,
    norm: Norm = "freeze",
    probe: bool = False,
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
        target: instead, the share of the `"parameters"`, `"macs"`, `"bytes"` of the exported file or its `"latency"`,
            measured on this machine, that is to be left, such as `{"latency": 0.5}`.
        tolerance: how far from the target, as a share of it, the result may be.
        runtime: of a target in bytes or latency: `"tflite"` (LiteRT) or `"onnx"` (ONNX Runtime).
        threads: of that runtime.
        importance: `"l1"`, `"l2"`, `"bn_scale"`, `"fpgm"`; with `data`: `"taylor"` (labels and a compiled model),
            `"hessian"` (what the outputs would change by), `"activation"` (how strong the channel is where it is read);
            `"random"`; or a function like those in `compress.channels.importance`. Channels that it says nothing of,
            such as those without batch norm, go by `"l2"`.
        ranking: `"local"`: each group loses this share; `"global"`: all of them together do.
        normalize: whether a weight's scores count in units of their mean, so that layers can be compared.
        include: shell patterns over layer paths; a group may lose channels if all layers that make them fit.
        exclude: shell patterns; a group with such a layer stays as it is.
        multiple_of: numbers of channels are rounded to a multiple: runtimes compute 63 channels more slowly than 64.
        minimum: channels that stay at least, wherever some are removed.
        norm: `"freeze"` keeps the channels that LayerNormalization, RMSNormalization and GroupNormalization norm over;
            with `"allow"` the new model norms over those that are left, which training has to make up for.
        probe: whether layers without a rule are tried out: built again for fewer channels, which runs their code.
        data: `(x, y)` or other data, for the scores that need it.
        seed: of `"random"` and `"hessian"`.

    Raises:
        UsageError: an option that makes no sense, a pattern that fits no layer, no group left, or a fake-quantized
            model.
        ModelError: the calls of the model are known to Python alone, or the result would be wrong.
        DataError: the score needs data.
    """
    groups = find_channel_groups(model, norm=norm, probe=probe)
    chosen = select_groups(groups, include, exclude)
    ratio = require_choice(ratio, target, [path for group in groups.groups for path in group.producers])
    if not tolerance > 0:
        raise UsageError(f"expected a tolerance above 0. Received: tolerance={tolerance}")
    if multiple_of < 1 or minimum < 1:
        raise UsageError(
            f"expected multiple_of and minimum of at least 1. Received: multiple_of={multiple_of}, minimum={minimum}"
        )
    scores = _scores(groups, model, importance, data, seed, normalize)

    def choose(share: float | Mapping[str, float]) -> set[int]:
        options = {"together": ranking == "global", "multiple_of": multiple_of, "minimum": minimum}
        return choose_units(chosen, scores, share, **options)

    reached = None
    if target is None:
        removed = choose(ratio)
    else:
        ((cost, share),) = target.items()
        if cost in get_args(FileCost):
            with FileCosts(model, cost, runtime, threads) as files:
                removed, reached = reach_file_target(groups, chosen, choose, cost, share, files, tolerance)
        else:
            removed, found = reach_target(chosen, choose, CostModel(groups, cost), share, tolerance)
            reached = Reached(cost, share, found, found)
    narrowed = name_outputs_as(narrow(groups, removed), model)
    if type(model) is keras.Sequential and len(model.layers) == len(groups.graph.nodes):  # none of them is a model
        narrowed = keras.Sequential(narrowed.layers, name=model.name)
    kept = kept_channels(groups, removed)
    exact = not any(set(groups.atoms.units(atoms).tolist()) & removed for atoms in groups.atoms.normed)
    claim = "the narrower model does not compute what the original does without the removed channels"
    difference = check_equal(narrowed, silence(groups, removed), claim) if exact else None
    copy_compile_settings(model, narrowed)
    return PrunedChannels(narrowed, kept, difference, reached)


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
    known = (*get_args(Cost), *get_args(FileCost))
    if len(target) != 1 or not set(target) <= set(known) or not all(0 < share <= 1 for share in target.values()):
        raise UsageError(
            f"expected a target such as macs: 0.5, a share of one of {', '.join(known)}. Received: {dict(target)}"
        )
    return 0.0


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
    groups: ChannelGroups,
    model: keras.Model,
    importance: ScoreName | ChannelScore,
    data: Any,
    seed: int,
    normalize: bool,
) -> dict[int, float]:
    weights = groups.atoms.weights
    if importance == "random":
        units = sorted({unit for weight in weights for unit in groups.atoms.units(weight.atoms).tolist()})
        return dict(zip(units, np.random.default_rng(seed).random(len(units)).tolist(), strict=True))
    if not callable(importance) and importance not in (*SCORES, "activation"):
        known = [*SCORES, "activation", "random"]
        raise UsageError(f"expected importance to be one of {known} or a function. Received: {importance!r}")
    if importance in NEED_DATA and data is None:
        raise DataError(f"the importance {importance} needs data. Received: data=None", "Pass data=(x, y).")
    gradients: dict[int, list[np.ndarray]] = {}
    if importance == "taylor":
        gradients = loss_gradients(groups, model, data)
    elif importance == "hessian":
        gradients = output_gradients(groups, data, seed)
    values = {id(each.variable): keras.ops.convert_to_numpy(each.variable).astype("float32") for each in weights}
    if importance == "activation":
        sizes = channel_activations(groups, data)
        score: ChannelScore = lambda weight, rows, gradients: sizes.get(id(weight.atoms))  # noqa: E731
    else:
        score = importance if callable(importance) else SCORES[importance]
    units_of = groups.atoms.units
    # Channels that the score says nothing of, such as those without batch norm, go by the size of their weights.
    usual = score_units(weights, units_of, SCORES["l2"], values, {}, normalize=normalize)
    return usual | score_units(weights, units_of, score, values, gradients, normalize=normalize)
