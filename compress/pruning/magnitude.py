"""Pruning at once, without training: the least important weights of a copy of the model become zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from compress.errors import UsageError
from compress.models.copying import copy_model
from compress.models.gradients import weight_gradients
from compress.models.patterns import matches
from compress.models.walking import list_kernels
from compress.pruning.distributions import MEASURED, DistributionLike
from compress.pruning.masks import make_masks, require_plan, resolve_sparsity
from compress.pruning.patterns import Pattern
from compress.pruning.scores import ScoreLike, find_score
from compress.pruning.selection import kernel_values, select_kernels
from compress.pruning.sensitivity import resolve_distribution


def prune_weights(
    model: keras.Model,
    sparsity: float | None = None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    score: ScoreLike = "magnitude",
    distribution: DistributionLike = "uniform",
    pattern: str | Pattern = "unstructured",
    data: Any = None,
    samples: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
) -> keras.Model:
    """Return a copy of `model` in which the least important weights of each selected kernel are zero.

    Args:
        model: a built model; it is not changed.
        sparsity: fraction of zeros, at least 0 and less than 1, met exactly: `round(sparsity * size)`. May be left
            out with an N:M pattern, which implies it.
        include: shell patterns over layer or kernel paths (`"encoder/conv*"`).
        exclude: shell patterns over layers or kernels to leave alone.
        score: importance of a weight: `"magnitude"`, `"random"`, `"taylor"` (needs `data` and a compiled model), or
            a function `ScoreInput -> array`. `"movement"` needs a training, see `Pruning`.
        distribution: `"uniform"`: each kernel has this sparsity; `"global"`, `"erk"`, `"lamp"`: all of them together
            have; `"sensitivity"`: so do they, as much as each bears, which is measured first (needs `data`); or a
            mapping from shell patterns to sparsities, where the rest gets `sparsity`.
        pattern: `"unstructured"`, `"2:4"` (n of each m along the inputs stay), or `"4x1"` (whole blocks, inputs x
            outputs, are pruned).
        data: `(x, y)` or other data with labels, for scores that need gradients; inputs do for `"sensitivity"`.
        samples: how many samples of `data` gradients are computed from at most.
        batch_size: samples per gradient.
        seed: seed of the score `"random"`.

    Raises:
        UsageError: an option that makes no sense, a pattern that does not fit a kernel or matches nothing, frozen or
            fake-quantized kernels, or a kernel that would lose all of its weights.
        ModelError: the model cannot be copied.
        DataError: the score needs data with labels.
        PassError: a weight or gradient is NaN.
    """
    final = resolve_sparsity(sparsity, pattern)
    kernels, layouts, _ = select_kernels(model, include, exclude)  # complain before the copy is made
    require_plan(kernels, layouts, final, distribution, pattern, score)
    if find_score(score).needs_movement:
        raise UsageError(
            f"the score {score!r} needs a training. Received: pruning at once",
            "Use magnitude or taylor, or prune while training.",
        )
    if distribution == MEASURED and data is None:
        raise UsageError(f"the distribution {MEASURED} needs data to measure on. Received: data=None", "Pass data=x.")
    which = {"include": include, "exclude": exclude, "score": score, "pattern": pattern, "seed": seed}
    distribution = resolve_distribution(distribution, model, data, final, **which)
    copy = copy_model(model)
    kernels, layouts, _ = select_kernels(copy, include, exclude)
    gradients = None
    if find_score(score).needs_gradients:
        if data is None:
            raise UsageError(f"the score {score!r} needs data. Received: data=None", "Pass data=(x, y).")
        variables = [kernel.variable for kernel in kernels]
        gradients = weight_gradients(copy, variables, data, samples=samples, batch_size=batch_size)
    values = kernel_values(kernels)
    masks = make_masks(
        values,
        final,
        paths=[kernel.path for kernel in kernels],
        layouts=layouts,
        score=score,
        distribution=distribution,
        pattern=pattern,
        gradients=gradients,
        seed=seed,
    )
    for kernel, value, mask in zip(kernels, values, masks, strict=True):
        kernel.variable.assign(np.where(mask, value, np.zeros((), value.dtype)))
    return copy


def has_pruned_kernels(model: keras.Model, exclude: Sequence[str] = ()) -> bool:
    """Return whether a trainable kernel of `model` holds zeros; one that is all zeros is new, not pruned.

    Args:
        model: a built model.
        exclude: shell patterns over layers or kernels that do not count.
    """
    kernels = (kernel for kernel in list_kernels(model, trainable=True) if not matches(kernel.path, exclude))
    weights = (keras.ops.convert_to_numpy(kernel.variable) for kernel in kernels)
    return any(0 < np.count_nonzero(weight) < weight.size for weight in weights)
