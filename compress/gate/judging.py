"""Verdicts on budgets: pass, fail, or inconclusive where the sample is too small or the machine too noisy to tell.

Bytes and counts are exact. Quality is judged by intervals: a drop is compared sample by sample (non-inferiority;
Agresti and Min 2005). Latency is a ratio from interleaved pairs, judged only when the machine's own noise leaves room
to see the limit. A number that is missing fails; it is never skipped in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from compress.gate.baseline import SIZES
from compress.gate.budgets import SIZE_LIMITS, Budget
from compress.gate.evidence import Evidence
from compress.gate.latency_limits import judge_latency
from compress.gate.quality_limits import judge_quality
from compress.gate.units import grown
from compress.gate.verdicts import Line, Verdict
from compress.measure.results import FileResult

_FIELDS = {**SIZES, "zstd": "zstd_bytes"}
"""The field of each limit in `FileSize`."""


def judge(
    budgets: Iterable[Budget],
    results: dict[str, FileResult],
    evidence: Evidence | None = None,
    size_only: bool = False,
) -> list[Verdict]:
    """Return a verdict for every limit in `budgets`.

    Args:
        budgets: the limits.
        results: what was measured, by artifact.
        evidence: the baseline and what is compared with it; none by default.
        size_only: judge only what needs no model to be executed.
    """
    verdicts: list[Verdict] = []
    evidence = evidence or Evidence()
    for index, budget in enumerate(budgets):
        result = results[budget.artifact]
        verdicts += _judge_size(budget, index, result)
        verdicts += _judge_growth(budget, index, result, evidence)
        if not size_only:
            verdicts += judge_quality(budget, index, result, evidence)
            verdicts += judge_latency(budget, index, result, evidence)
    return verdicts


def _judge_size(budget: Budget, index: int, result: FileResult) -> Iterator[Verdict]:
    for name in SIZE_LIMITS:
        field = _FIELDS[name]
        allowed, value = getattr(budget, name), getattr(result.size, field)
        line = Line(budget, index, (name,), name)
        if allowed is None:
            continue
        if value is None:
            yield line.missing(allowed, result.size.reasons.get(field, "not measured"))
        elif value > allowed:
            yield line.verdict("fail", value, allowed, _left_out(name, result))
        else:
            left_out = _left_out(name, result)
            yield line.verdict("inconclusive" if left_out else "pass", value, allowed, left_out)


def _judge_growth(budget: Budget, index: int, result: FileResult, evidence: Evidence) -> Iterator[Verdict]:
    limits = budget.max_growth.limits() if budget.max_growth else {}
    for name, growth in limits.items():
        line = Line(budget, index, ("max_growth", name), f"max_growth.{name}")
        kept, lack = evidence.find(budget.artifact)
        before = getattr(kept, name) if kept else None
        value = getattr(result.size, SIZES[name])
        if kept is None:
            yield line.verdict(lack.outcome, value, None, lack.reason)
        elif value is None:
            yield line.missing(None, result.size.reasons.get(SIZES[name], "not measured"))
        elif before is None:
            reason = kept.reasons.get(name, "not measured")
            yield line.verdict(evidence.incomplete, value, None, f"the baseline has no such number: {reason}")
        else:
            allowed = grown(before, growth)
            outcome = "pass" if value <= allowed else "fail"
            detail = "; ".join(filter(None, (f"{value - before:+,}", _left_out(name, result))))
            yield line.verdict(outcome, value, allowed, detail, before)


def _left_out(name: str, result: FileResult) -> str:
    """Return what a number leaves out, where the file does work that nobody knows how to count."""
    if name != "macs" or not result.size.macs_partial:
        return ""
    return f"without {', '.join(result.size.uncounted_ops) or 'some operators'}, whose work is not counted"
