"""Verdicts on budgets: pass, fail, or inconclusive where the sample is too small or the machine too noisy to tell.

Bytes and counts are exact. Quality is judged by intervals: a drop is compared sample by sample with the reference
(non-inferiority; Agresti and Min 2005). Latency is a ratio from interleaved pairs, judged only when the machine's own
noise leaves room to see the limit. A number that is missing fails; it is never skipped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from compress.errors import BudgetError, InconclusiveError
from compress.gate.budgets import Budget, MetricBudget
from compress.measure.results import FileResult, Metric, Record

Outcome = Literal["pass", "fail", "inconclusive"]

__all__ = ["Outcome", "Verdict", "judge", "raise_for_verdicts", "verdict_rows"]


class Verdict(Record):
    """One line of a check."""

    artifact: str
    limit: str
    """Which limit, such as `"accuracy.max_drop"`."""
    value: float | None
    """What was measured, or nothing where it could not be."""
    allowed: float
    verdict: Outcome
    detail: str = ""
    """Why, where the value alone does not say."""


def judge(budgets: Iterable[Budget], results: dict[str, FileResult], size_only: bool = False) -> list[Verdict]:
    """Return a verdict for every limit in `budgets`.

    Args:
        budgets: the limits.
        results: what was measured, by artifact.
        size_only: judge only what needs no model to be executed.
    """
    verdicts: list[Verdict] = []
    for budget in budgets:
        result = results[budget.artifact]
        verdicts += _judge_size(budget, result)
        if not size_only:
            for name, limits in budget.metrics().items():
                verdicts += _judge_metric(budget, name, limits, result)
            verdicts += _judge_latency(budget, result)
    return verdicts


def raise_for_verdicts(verdicts: Sequence[Verdict], strict: bool = False) -> None:
    """Raise BudgetError if a verdict is `fail`, and under `strict` InconclusiveError if one is `inconclusive`."""
    broken = [f"{v.artifact}: {v.limit}" for v in verdicts if v.verdict == "fail"]
    if broken:
        raise BudgetError(f"{len(broken)} of {len(verdicts)} limits are broken: {'; '.join(broken)}")
    open_ones = [f"{v.artifact}: {v.limit}" for v in verdicts if v.verdict == "inconclusive"]
    if strict and open_ones:
        raise InconclusiveError(f"{len(open_ones)} of {len(verdicts)} limits are inconclusive: {'; '.join(open_ones)}")


def verdict_rows(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of verdicts."""
    rows = [[v.artifact, v.limit, _show(v.value), _show(v.allowed), v.verdict, v.detail] for v in verdicts]
    return ["artifact", "limit", "measured", "allowed", "verdict", "detail"], rows


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4f}"


def _judge_size(budget: Budget, result: FileResult) -> Iterator[Verdict]:
    measured = {
        "file": (result.size.file_bytes, budget.file),
        "gzip": (result.size.gzip_bytes, budget.gzip),
        "zstd": (result.size.zstd_bytes, budget.zstd),
        "nonzero": (result.size.nonzero_kernel_weights, budget.nonzero),
    }
    for name, (value, allowed) in measured.items():
        if allowed is None:
            continue
        if value is None:
            reason = result.size.reasons.get("nonzero_kernel_weights", "not measured")
            yield _missing(budget, name, allowed, reason)
        else:
            yield _verdict(budget, name, value, allowed, "pass" if value <= allowed else "fail")


def _judge_metric(budget: Budget, name: str, limits: MetricBudget, result: FileResult) -> Iterator[Verdict]:
    wanted = {"min": limits.min, "max": limits.max, "max_drop": limits.max_drop}
    found = {n: m for n, m in (result.quality or {}).items() if n == name or n.endswith(f".{name}")}
    for kind, allowed in wanted.items():
        if allowed is None:
            continue
        if not found:
            reason = result.reasons.get("quality", "the data has no labels for it, or the task has no such metric")
            yield _missing(budget, f"{name}.{kind}", allowed, reason)
        for full_name, metric in found.items():
            yield _judge_value(budget, f"{full_name}.{kind}", kind, allowed, metric)


def _judge_value(budget: Budget, limit: str, kind: str, allowed: float, metric: Metric) -> Verdict:
    """Compare the interval of a metric, or of its drop, with what is allowed."""
    if kind == "max_drop":
        if metric.drop is None:
            return _missing(budget, limit, allowed, "there is no reference to compare with")
        value, interval = metric.drop.value, _drop_interval(metric, budget.confidence)
        upper_limit = True
    else:
        if metric.value is None:
            return _missing(budget, limit, allowed, metric.reasons.get("value", "not measured"))
        value, interval = metric.value, _value_interval(metric, budget.confidence)
        upper_limit = kind == "max"
    if interval is None:
        return _verdict(budget, limit, value, allowed, "inconclusive", f"{metric.n} samples give no interval")
    low, high = interval if upper_limit else (-interval[1], -interval[0])
    bound = allowed if upper_limit else -allowed
    outcome: Outcome = "pass" if high <= bound else "fail" if low > bound else "inconclusive"
    bounds = f"{budget.confidence:.0%} sure: {interval[0]:.4f} to {interval[1]:.4f}"
    if outcome == "inconclusive" and (needed := _samples_needed(metric.n, value, allowed, interval)):
        bounds += f"; about {needed:,} samples would tell"
    return _verdict(budget, limit, value, allowed, outcome, bounds)


def _two_sided(confidence: float) -> float:
    """Return the two-sided level whose one bound is sure at `confidence`: a limit is crossed on one side only."""
    return 2 * confidence - 1


def _value_interval(metric: Metric, confidence: float) -> tuple[float, float] | None:
    if metric.higher_is_better:
        from compress.measure.statistics import wilson_interval  # NumPy, which sizes alone do not need

        return wilson_interval(metric.value * metric.n, metric.n, _two_sided(confidence))
    return metric.ci95


def _drop_interval(metric: Metric, confidence: float) -> tuple[float, float] | None:
    drop = metric.drop
    if drop.mcnemar_p is None:  # not one decision per sample: the interval of the mean stands
        return drop.ci95
    from compress.measure.statistics import paired_difference_interval

    low, high = paired_difference_interval(drop.lost, drop.gained, metric.n, _two_sided(confidence))
    return -high, -low


def _samples_needed(n: int, value: float, allowed: float, interval: tuple[float, float]) -> int | None:
    margin, half = abs(allowed - value), (interval[1] - interval[0]) / 2
    return math.ceil(n * (half / margin) ** 2) if margin > 0 else None


def _judge_latency(budget: Budget, result: FileResult) -> Iterator[Verdict]:
    if budget.latency is None:
        return
    allowed = budget.latency.ratio
    if not result.latency:
        yield _missing(budget, "latency.ratio", allowed, result.reasons.get("latency", "latency was not measured"))
        return
    for latency in result.latency:
        low, high = latency.ratio_ci95
        detail = (
            f"95 % interval {low:.3f} to {high:.3f}, A/A {latency.control_ci95[0]:.3f} to {latency.control_ci95[1]:.3f}"
        )
        outcome: Outcome = "pass" if high <= allowed else "fail" if low > allowed else "inconclusive"
        noise = max(abs(math.log(bound)) for bound in latency.control_ci95)
        if abs(math.log(latency.ratio / allowed)) <= noise:  # the limit lies within what noise alone does to 1
            outcome, detail = "inconclusive", f"{detail}: the machine is too noisy to tell"
        yield _verdict(budget, "latency.ratio", latency.ratio, allowed, outcome, detail)


def _verdict(budget: Budget, limit: str, value: float, allowed: float, outcome: Outcome, detail: str = "") -> Verdict:
    return Verdict(artifact=budget.artifact, limit=limit, value=value, allowed=allowed, verdict=outcome, detail=detail)


def _missing(budget: Budget, limit: str, allowed: float, reason: str) -> Verdict:
    return Verdict(artifact=budget.artifact, limit=limit, value=None, allowed=allowed, verdict="fail", detail=reason)
