"""How much sparsity each kernel bears: one at a time is pruned, and the outputs are compared with those before.

The model is traced once; a kernel is pruned in place, measured, and put back. Layer-wise sensitivity as in Han et al.
2015, arXiv:1506.02626.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from typing import Any

import keras
import numpy as np

from compress.data.split import Split, as_data
from compress.errors import DataError, UsageError
from compress.models.copying import copy_model
from compress.models.gradients import weight_gradients
from compress.models.kernel_layout import KernelLayout
from compress.models.output_loss import OutputLoss, replaced_weights
from compress.progress import track
from compress.pruning.distributions import MEASURED, DistributionLike, most_prunable, require_sparsity, round_to_total
from compress.pruning.masks import make_masks, resolve_sparsity
from compress.pruning.patterns import NM, Pattern, parse_pattern
from compress.pruning.scores import ScoreLike, find_score
from compress.pruning.selection import kernel_values, select_kernels

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_LEAST_LOSS = 1e-9  # a kernel that nothing depends on still gets a curve that rises
_MOST_LOSS = 1e12


@dataclass(frozen=True)
class SensitivityPoint:
    """What pruning one kernel to one sparsity does.

    Args:
        sparsity: share of zeros in the kernel.
        loss: how far the outputs moved, see `OutputLoss`.
        metric: what `evaluate` returned, or `None` without it.
    """

    sparsity: float
    loss: float
    metric: float | None = None


@dataclass(frozen=True)
class KernelSensitivity:
    """What one kernel bears.

    Args:
        path: path of the kernel.
        size: its weights.
        units: what is pruned as a whole: weights, or blocks of a pattern.
        points: by rising sparsity.
    """

    path: str
    size: int
    units: int
    points: tuple[SensitivityPoint, ...]


@dataclass(frozen=True)
class PruningSensitivity:
    """What each kernel of a model bears.

    Args:
        kernels: in the order of the model.
        metric: what `evaluate` returned for the model as it is, or `None` without it.
        pattern: which weights were pruned together.
    """

    kernels: tuple[KernelSensitivity, ...]
    metric: float | None = None
    pattern: str = "unstructured"

    def distribution(self, sparsity: float) -> dict[str, float]:
        """Return sparsities by pattern over kernel paths with which all kernels suffer alike, for `distribution=`.

        A kernel's loss is taken to rise linearly between the points that were measured, and beyond the last one as the
        weights that are left get fewer.

        Args:
            sparsity: share of zeros in all kernels together, met exactly.

        Raises:
            UsageError: a sparsity outside [0, 1), or an N:M pattern was measured, which has only its own.
        """
        require_sparsity(sparsity)
        if isinstance(parse_pattern(self.pattern), NM):
            raise UsageError(
                f"pattern {self.pattern} has the same sparsity in every kernel. Received: distribution({sparsity!r})",
                "Measure the pattern unstructured or one of blocks.",
            )
        kernels = [kernel for kernel in self.kernels if kernel.units]
        units = np.array([kernel.units for kernel in kernels], np.int64)
        total = round(sparsity * int(units.sum()))
        counts = round_to_total(_share_out(kernels, units, total), total, most_prunable(units, total))
        return {escape(kernel.path): count / kernel.units for kernel, count in zip(kernels, counts, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def pruning_sensitivity(
    model: keras.Model,
    data: Any,
    *,
    sparsities: Sequence[float] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    score: ScoreLike = "magnitude",
    pattern: str | Pattern = "unstructured",
    evaluate: Callable[[keras.Model], float] | None = None,
    samples: int = 256,
    seed: int = 0,
) -> PruningSensitivity:
    """Return what pruning each kernel alone does to the outputs, at several sparsities.

    Losses are Kullback-Leibler divergences in nats for outputs that are probabilities, else mean squared errors in
    units of the output's variance.

    Args:
        model: a float model; it is not changed.
        data: inputs as `fit` takes them, a `tf.data.Dataset`, or a `compress.Split`; labels serve only scores that need
            gradients.
        sparsities: what to try, each at least 0 and less than 1; by default `SPARSITIES`, or the only one that an N:M
            pattern has.
        include: shell patterns over layer or kernel paths; only these kernels are measured.
        exclude: shell patterns over layers or kernels to leave alone.
        score: which weights of a kernel go first, see `prune_weights`.
        pattern: which weights go together, see `prune_weights`.
        evaluate: returns a metric of the model that it is given, such as the accuracy; called once per measurement.
        samples: how many are used to compare outputs on.
        seed: chooses the samples, and seeds the score `"random"`.

    Raises:
        UsageError: an option that makes no sense, or no kernel is left to prune.
        DataError: no samples, or outputs that are not finite.
    """
    chosen_pattern, chosen = parse_pattern(pattern), find_score(score)
    tried = _sparsities_to_try(sparsities, chosen_pattern)
    if chosen.needs_movement:
        raise UsageError(
            "expected a score that a trained model has. Received: the score movement, which needs a training",
            "Use magnitude or taylor.",
        )
    if data is None:
        raise DataError("sensitivity needs samples. Received: data=None", "Pass some hundred inputs.")
    split = data if isinstance(data, Split) else as_data(data).require("train", "sensitivity")
    copy = copy_model(model)
    kernels, layouts, _ = select_kernels(copy, include, exclude)
    variables = [kernel.variable for kernel in kernels]
    gradients = weight_gradients(copy, variables, split) if chosen.needs_gradients else [None] * len(kernels)
    probe = OutputLoss(copy, split.sample(samples, seed), samples)
    found = []
    with track("sensitivity to sparsity", total=len(kernels) * len(tried)) as advance:
        for kernel, layout, value, gradient in zip(kernels, layouts, kernel_values(kernels), gradients, strict=True):
            chosen_pattern.require_fit(kernel.path, value.shape, layout)
            points = []
            for sparsity in tried:
                (mask,) = make_masks(
                    [value],
                    sparsity,
                    paths=[kernel.path],
                    layouts=[layout],
                    score=score,
                    pattern=chosen_pattern,
                    gradients=None if gradient is None else [gradient],
                    seed=seed,
                )
                with replaced_weights([kernel.variable], [np.where(mask, value, np.zeros((), value.dtype))]):
                    points.append(SensitivityPoint(sparsity, probe.measure(), evaluate and evaluate(copy)))
                advance(note=f"{kernel.path}, {sparsity:.0%}")
            units = _count_units(chosen_pattern, layout, value.shape)
            found.append(KernelSensitivity(kernel.path, value.size, units, tuple(points)))
    return PruningSensitivity(tuple(found), evaluate and evaluate(copy), str(chosen_pattern))


def resolve_distribution(
    distribution: DistributionLike,
    model: keras.Model,
    data: Any,
    sparsity: float,
    **options: Any,
) -> DistributionLike:
    """Return `distribution`, or the sparsities that are measured for it.

    Args:
        distribution: what the user chose.
        model: the model before it is pruned.
        data: samples.
        sparsity: share of zeros in all kernels together.
        options: `include`, `exclude`, `score`, `pattern` and `seed` as `pruning_sensitivity` takes them.
    """
    if distribution != MEASURED:
        return distribution
    return pruning_sensitivity(model, data, **options).distribution(sparsity)


def _sparsities_to_try(sparsities: Sequence[float] | None, pattern: Pattern) -> list[float]:
    if sparsities is None:
        return [pattern.sparsity] if isinstance(pattern, NM) else list(SPARSITIES)
    if not len(sparsities):
        raise UsageError("expected sparsities to try. Received: none")
    for each in sparsities:
        require_sparsity(each)
        resolve_sparsity(each, pattern)
    return sorted({float(each) for each in sparsities})


def _share_out(kernels: Sequence[KernelSensitivity], units: np.ndarray, total: int) -> np.ndarray:
    """Return how many units each kernel loses, not yet whole, so that all suffer alike and the sum is `total`."""

    def at(loss: float) -> np.ndarray:
        return units * np.array([_sparsity_at(kernel.points, loss) for kernel in kernels])

    low, high = 0.0, 1.0
    while at(high).sum() < total and high < _MOST_LOSS:
        low, high = high, 2 * high
    if at(high).sum() < total:  # beyond every loss that was measured: each gives the same part of what it has left
        fewer, more = at(high), units.astype(float)
    else:
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if at(middle).sum() >= total else (middle, high)
        fewer, more = at(low), at(high)
    # Where losses are level, the least step in loss is a leap in sparsity; all go the same part of it.
    leap = more.sum() - fewer.sum()
    return fewer + (more - fewer) * ((total - fewer.sum()) / leap if leap > 0 else 0.0)


def _count_units(pattern: Pattern, layout: KernelLayout, shape: tuple[int, ...]) -> int:
    return pattern.pool(np.broadcast_to(np.float32(0), shape), layout).size


def _sparsity_at(points: Sequence[SensitivityPoint], loss: float) -> float:
    """Return the greatest sparsity at which a kernel's loss is at most `loss`."""
    sparsities = np.array([0.0, *(point.sparsity for point in points)])
    losses = np.array([0.0, *(point.loss if np.isfinite(point.loss) else np.inf for point in points)])
    # A loss that falls again is noise; one that does not rise at all could not be inverted.
    losses = np.maximum.accumulate(losses) + _LEAST_LOSS * sparsities
    if loss >= losses[-1]:
        return 1 - (1 - sparsities[-1]) * losses[-1] / loss if loss > 0 else 0.0
    return float(np.interp(loss, losses[np.isfinite(losses)], sparsities[np.isfinite(losses)]))
