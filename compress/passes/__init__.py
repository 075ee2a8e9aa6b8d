"""The passes: a written table of the built-in ones, and the entry-point group `compress.passes` for others'."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module

from compress.errors import RecipeError, SetupError
from compress.passes.base import Pass

BUILT_IN: dict[str, str] = {
    "cluster": "compress.passes.cluster:WeightClustering",
    "distill": "compress.passes.distill:Distillation",
    "factorize": "compress.passes.factorize:Factorization",
    "finetune": "compress.passes.finetune:FineTuning",
    "prune": "compress.passes.prune:MagnitudePruning",
    "prune_blocks": "compress.passes.prune_blocks:BlockPruning",
    "prune_channels": "compress.passes.prune_channels:ChannelPruning",
    "ptq": "compress.passes.ptq:PostTrainingQuantization",
    "qat": "compress.passes.qat:QuantizationAwareTraining",
}

_OTHER_WORDS = {
    "clustering": "cluster",
    "channel_pruning": "prune_channels",
    "depth_pruning": "prune_blocks",
    "distillation": "distill",
    "factorise": "factorize",
    "fine_tune": "finetune",
    "low_rank": "factorize",
    "pruning": "prune",
    "sparsify": "prune",
}


@cache
def plugins() -> dict[str, str]:
    """Return the type and `module:class` of every pass that an installed package offers."""
    from importlib.metadata import entry_points  # a slow import that few commands need

    found: dict[str, str] = {}
    for entry in entry_points(group="compress.passes"):
        if entry.name in BUILT_IN or entry.name in found:
            owner = entry.dist.name if entry.dist else "a package"
            raise SetupError(
                f"two packages offer the pass {entry.name!r}. Received: one from {owner}",
                "Uninstall one of them.",
            )
        found[entry.name] = entry.value
    return found


def find_pass(type_name: str) -> type[Pass]:
    """Return the class of the pass `type_name`, or raise RecipeError naming the nearest one."""
    reference = BUILT_IN.get(type_name) or plugins().get(type_name)
    if reference is None:
        known = sorted({*BUILT_IN, *plugins()})
        nearest = _OTHER_WORDS.get(type_name) or next(iter(difflib.get_close_matches(type_name, known, n=1)), None)
        hint = f"did you mean `{nearest}`? " if nearest else ""
        raise RecipeError(f"unknown pass `{type_name}`; {hint}known: {', '.join(known)}")
    module, _, name = reference.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:
        raise SetupError(f"the pass {type_name!r} cannot be imported from {reference}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise SetupError(f"{reference} must be a subclass of compress.Pass. Received: {found!r}")
    return found
