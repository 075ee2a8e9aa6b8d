"""Verdicts on quality, by intervals: what is allowed must be met surely, and a limit is broken only surely.

A drop is taken sample by sample where the results of the other side are known for the same samples, which shows
several times smaller drops than two separate values can (Agresti and Min 2005).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.gate.baseline import BaselineArtifact, BaselineMetric
from compress.gate.budgets import Budget
from compress.gate.evidence import Evidence
from compress.gate.verdicts import Line, Outcome, Verdict
from compress.measure.results import FileResult, Interval, Metric

if TYPE_CHECKING:
    import numpy as np

_SHARES = {"accuracy", "agreement", "top_5"}
"""Shares of samples: right or wrong each, unless a sample has several positions."""

_EXACT = {"max_abs_diff"}
"""Facts about these samples, not estimates from them."""

_SURELY_WORSE_P, _SURELY_WORSE_DROP = 0.01, 0.005
"""Where no drop is limited: an accuracy that fell by more than this, and not by chance, is broken all the same."""


def judge_quality(budget: Budget, index: int, result: FileResult, evidence: Evidence) -> Iterator[Verdict]:
    """Yield a verdict on each limit of quality."""
    for name, limits in budget.quality_limits().items():
        root = ("metrics", name) if name in budget.metrics else (name,)
        found = {n: m for n, m in (result.quality or {}).items() if n == name or n.endswith(f".{name}")}
        for kind in ("min", "max", "max_drop"):
            allowed = getattr(limits, kind)
            if allowed is None:
                continue
            if not found:
                reason = result.reasons.get("quality", "the data have no labels for it, or the task has no such metric")
                yield Line(budget, index, (*root, kind), f"{name}.{kind}").missing(allowed, reason)
            for full_name, metric in found.items():
                line = Line(budget, index, (*root, kind), f"{full_name}.{kind}")
                if kind != "max_drop":
                    yield _judge_value(line, allowed, full_name, metric, kind == "max")
                    continue
                if evidence.has_reference:
                    yield _judge_drop_from_reference(line, allowed, metric)
                if evidence.baseline is not None or evidence.baseline_expected or not evidence.has_reference:
                    line = Line(budget, index, (*root, kind), f"{full_name}.max_drop from baseline")
                    yield _judge_drop_from_baseline(line, allowed, full_name, metric, result, evidence)
        if name == "accuracy" and limits.max_drop is None:
            for full_name, metric in found.items():
                line = Line(budget, index, root, f"{full_name}.regression")
                yield from _judge_regression(line, full_name, metric, evidence)
    if budget.max_flips is not None:
        yield from _judge_flips(Line(budget, index, ("max_flips",), "max_flips"), result, evidence)


def _judge_value(line: Line, allowed: float, name: str, metric: Metric, at_most: bool) -> Verdict:
    if metric.value is None:
        return line.missing(allowed, metric.reasons.get("value", "not measured"))
    if name.rpartition(".")[2] in _EXACT:
        met = metric.value <= allowed if at_most else metric.value >= allowed
        return line.verdict("pass" if met else "fail", metric.value, allowed, "of these samples")
    interval = _value_interval(name, metric, line.budget.confidence)
    return _decide(line, metric.value, allowed, interval, metric.n, at_most)


def _judge_drop_from_reference(line: Line, allowed: float, metric: Metric) -> Verdict:
    drop = metric.drop
    if metric.value is None:
        return line.missing(allowed, metric.reasons.get("value", "not measured"))
    if drop is None:
        return line.missing(allowed, "there is no reference to compare with")
    interval = drop.ci95
    if drop.mcnemar_p is None:
        interval = _rescale(interval, drop.value, line.budget.confidence)
    else:  # one decision per sample
        interval = _paired_drop(drop.lost, drop.gained, metric.n, line.budget.confidence)
    return _decide(line, drop.value, allowed, interval, metric.n, at_most=True)


def _judge_drop_from_baseline(
    line: Line, allowed: float, name: str, metric: Metric, result: FileResult, evidence: Evidence
) -> Verdict:
    kept, lack = evidence.find(line.budget.artifact)
    if metric.value is None:
        return line.missing(allowed, metric.reasons.get("value", "not measured"))
    if kept is None:
        return line.missing(allowed, lack.reason, lack.outcome)
    before = kept.metrics.get(name)
    if before is None or before.value is None:
        reason = before.reasons.get("value", "not measured") if before else "not measured"
        return line.missing(allowed, f"the baseline has no value of it: {reason}", evidence.incomplete)
    if _unchanged(kept, result, evidence):
        return line.verdict("pass", 0.0, allowed, "the same file as in the baseline", before.value)
    pairs = _pair(line.budget.artifact, name, before, evidence)
    if isinstance(pairs, str):
        drop = before.value - metric.value if metric.higher_is_better else metric.value - before.value
        if name.rpartition(".")[2] in _EXACT:
            return line.verdict("pass" if drop <= allowed else "fail", drop, allowed, "of these samples", before.value)
        interval = _unpaired(drop, before, metric, line.budget.confidence)
        return _decide(line, drop, allowed, interval, metric.n, True, f"unpaired, as {pairs}", before.value)
    confidence = line.budget.confidence
    detail = _tell_pairs(pairs)
    if pairs.decisions:
        interval = _paired_drop(*pairs.lost_and_gained, len(pairs.before), confidence)
    else:
        from compress.measure.statistics import mean_interval

        interval = mean_interval(pairs.losses, _two_sided(confidence))
    return _decide(line, float(pairs.losses.mean()), allowed, interval, metric.n, True, detail, before.value)


def _judge_regression(line: Line, name: str, metric: Metric, evidence: Evidence) -> Iterator[Verdict]:
    """Judge an accuracy whose drop nobody limited, by the baseline where it has the same samples."""
    kept, _ = evidence.find(line.budget.artifact)
    before = kept.metrics.get(name) if kept else None
    if before is None or before.value is None or metric.value is None:
        return
    pairs = _pair(line.budget.artifact, name, before, evidence)
    if isinstance(pairs, str) or not pairs.decisions:
        return
    from compress.measure.statistics import mcnemar_p

    drop = float(pairs.losses.mean())
    worse = drop > _SURELY_WORSE_DROP and mcnemar_p(*pairs.lost_and_gained) < _SURELY_WORSE_P
    yield line.verdict("fail" if worse else "pass", drop, _SURELY_WORSE_DROP, _tell_pairs(pairs), before.value)


def _judge_flips(line: Line, result: FileResult, evidence: Evidence) -> Iterator[Verdict]:
    allowed = line.budget.max_flips
    kept, lack = evidence.find(line.budget.artifact)
    now = evidence.qualities.get(line.budget.artifact)
    if kept is None:
        yield line.missing(allowed, lack.reason, lack.outcome)
    elif now is None or not now.decisions:
        yield line.missing(allowed, result.reasons.get("quality", "the outputs are no decisions"))
    elif not evidence.same_samples:
        yield line.missing(allowed, "the samples are not those of the baseline", evidence.incomplete)
    elif _unchanged(kept, result, evidence):
        yield line.verdict("pass", 0.0, allowed, "the same file as in the baseline")
    else:
        for name, decisions in now.decisions.items():
            before = kept.decisions.get(name)
            if before is None or before.count != decisions.size:
                reason = f"the baseline has no decisions for it: {kept.reasons.get(name, 'not measured')}"
                yield line.missing(allowed, reason, evidence.incomplete)
                continue
            from compress.measure.statistics import share_interval

            flips = before.values().reshape(decisions.shape) != decisions
            shares = flips.reshape(len(decisions), -1).mean(axis=1)
            interval = share_interval(shares, _two_sided(line.budget.confidence))
            detail = f"{int(flips.sum()):,} of {flips.size:,}"
            yield _decide(line, float(shares.mean()), allowed, interval, len(shares), True, detail)


def _decide(
    line: Line,
    value: float,
    allowed: float,
    interval: Interval | None,
    n: int,
    at_most: bool,
    note: str = "",
    baseline: float | None = None,
) -> Verdict:
    """Compare an interval with what is allowed."""
    notes = [note] if note else []
    if interval is None:
        notes.append(f"{n} samples give no interval")
        return line.verdict("inconclusive", value, allowed, "; ".join(notes), baseline)
    low, high = interval if at_most else (-interval[1], -interval[0])
    bound = allowed if at_most else -allowed
    outcome: Outcome = "pass" if high <= bound else "fail" if low > bound else "inconclusive"
    notes.append(f"{line.budget.confidence:.0%} sure: {interval[0]:.4f} to {interval[1]:.4f}")
    if outcome == "inconclusive" and (needed := _samples_needed(n, value, allowed, interval)):
        notes.append(f"about {needed:,} samples would tell")
    return line.verdict(outcome, value, allowed, "; ".join(notes), baseline)


@dataclass(frozen=True)
class _Pairs:
    """Results of the baseline and of now on the same samples, `(samples,)` each."""

    before: np.ndarray
    now: np.ndarray
    higher_is_better: bool

    @property
    def decisions(self) -> bool:
        """Whether each sample is right or wrong."""
        return self.before.dtype == bool and bool(((self.now == 0) | (self.now == 1)).all())

    @property
    def losses(self) -> np.ndarray:
        """How much worse each sample became."""
        change = self.before.astype("float64") - self.now.astype("float32")
        return change if self.higher_is_better else -change

    @property
    def lost_and_gained(self) -> tuple[int, int]:
        right = self.now.astype(bool)
        return int((self.before & ~right).sum()), int((~self.before & right).sum())


def _pair(artifact: str, name: str, before: BaselineMetric, evidence: Evidence) -> _Pairs | str:
    """Return results sample by sample, or why there are none."""
    if not evidence.same_samples:
        return "the samples are not those of the baseline"
    now = evidence.qualities[artifact].per_sample.get(name) if artifact in evidence.qualities else None
    if now is None or before.per_sample is None:
        return before.reasons.get("per_sample", "the metric is not one of single samples")
    if before.per_sample.count != len(now):
        return "the baseline has another number of samples"
    return _Pairs(before.per_sample.values(), now, before.higher_is_better)


def _unchanged(kept: BaselineArtifact, result: FileResult, evidence: Evidence) -> bool:
    return kept.sha256 == result.sha256 and evidence.same_samples


def _tell_pairs(pairs: _Pairs) -> str:
    if not pairs.decisions:
        return ""
    from compress.measure.statistics import mcnemar_p

    lost, gained = pairs.lost_and_gained
    return f"{lost} lost, {gained} gained, McNemar p = {mcnemar_p(lost, gained):.2g}"


def _paired_drop(lost: int, gained: int, n: int, confidence: float) -> Interval:
    from compress.measure.statistics import paired_difference_interval  # NumPy, which sizes alone do not need

    low, high = paired_difference_interval(lost, gained, n, _two_sided(confidence))
    return -high, -low


def _value_interval(name: str, metric: Metric, confidence: float) -> Interval | None:
    hits = metric.value * metric.n
    if name.rpartition(".")[2] in _SHARES and abs(hits - round(hits)) < 1e-6:
        from compress.measure.statistics import wilson_interval

        return wilson_interval(round(hits), metric.n, _two_sided(confidence))
    return _rescale(metric.ci95, metric.value, confidence)


def _unpaired(drop: float, before: BaselineMetric, metric: Metric, confidence: float) -> Interval | None:
    """Return the interval of a difference of two values that were measured apart."""
    if before.ci95 is None or metric.ci95 is None:
        return None
    half = math.hypot(*((high - low) / 2 for low, high in (before.ci95, metric.ci95)))
    return _rescale((drop - half, drop + half), drop, confidence)


def _rescale(interval: Interval | None, value: float, confidence: float) -> Interval | None:
    """Return an interval at 95 % as one at the level of `confidence`, by the quantiles of the normal distribution."""
    if interval is None:
        return None
    from compress.measure.statistics import normal_quantile

    scale = normal_quantile(confidence) / normal_quantile(0.975)
    return value + (interval[0] - value) * scale, value + (interval[1] - value) * scale


def _two_sided(confidence: float) -> float:
    """Return the two-sided level whose one bound is sure at `confidence`: a limit is crossed on one side only."""
    return 2 * confidence - 1


def _samples_needed(n: int, value: float, allowed: float, interval: Interval) -> int | None:
    margin, half = abs(allowed - value), (interval[1] - interval[0]) / 2
    return math.ceil(n * (half / margin) ** 2) if margin > 0 else None
