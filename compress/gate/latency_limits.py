"""Verdicts on the time of one inference: a ratio that was measured in pairs, and milliseconds on the same machine."""

from __future__ import annotations

import math
from collections.abc import Iterator

from compress.gate.budgets import Budget
from compress.gate.evidence import Evidence
from compress.gate.verdicts import Line, Outcome, Verdict
from compress.measure.results import FileResult, Latency


def judge_latency(budget: Budget, index: int, result: FileResult, evidence: Evidence) -> Iterator[Verdict]:
    """Yield a verdict on each limit of latency, for each setting that was timed."""
    for kind in ("ratio", "p50"):
        allowed = getattr(budget.latency, kind, None)
        if allowed is None:
            continue
        line = Line(budget, index, ("latency", kind), f"latency.{kind}")
        if not result.latency:
            yield line.missing(allowed, result.reasons.get("latency", "latency was not measured"))
        for latency in result.latency or ():
            if kind == "ratio":
                yield _judge_ratio(line, allowed, latency)
            else:
                yield _judge_median(line, allowed, latency, evidence)


def _judge_ratio(line: Line, allowed: float, latency: Latency) -> Verdict:
    low, high = latency.ratio_ci95
    detail = (
        f"95 % interval {low:.3f} to {high:.3f}, A/A {latency.control_ci95[0]:.3f} to {latency.control_ci95[1]:.3f}"
    )
    outcome: Outcome = "pass" if high <= allowed else "fail" if low > allowed else "inconclusive"
    noise = max(abs(math.log(bound)) for bound in latency.control_ci95)
    if abs(math.log(latency.ratio / allowed)) <= noise:  # the limit lies within what noise alone does to 1
        outcome, detail = "inconclusive", f"{detail}: the machine is too noisy to tell"
    return line.verdict(outcome, latency.ratio, allowed, detail)


def _judge_median(line: Line, allowed: float, latency: Latency, evidence: Evidence) -> Verdict:
    """Judge milliseconds, which mean something only on the machine and with the runtimes that set them."""
    if latency.p50_ms is None:
        return line.missing(allowed, latency.reasons.get("p50_ms", "not measured"))
    kept, lack = evidence.find(line.budget.artifact)
    if kept is None:
        return line.verdict(lack.outcome, latency.p50_ms, allowed, f"milliseconds need a machine: {lack.reason}")
    setting = (latency.device, latency.threads, latency.batch)
    before = next((old.p50_ms for old in kept.latency if (old.device, old.threads, old.batch) == setting), None)
    machine = evidence.baseline.machine
    if machine.fingerprint_id != evidence.fingerprint_id:
        detail = f"another machine, or another runtime, than the baseline's ({machine.cpu}, {machine.cores} cores)"
        return line.verdict("skipped", latency.p50_ms, allowed, detail, before)
    if latency.p50_ci95_ms is None:
        return line.verdict("inconclusive", latency.p50_ms, allowed, f"{latency.n} runs give no interval", before)
    low, high = latency.p50_ci95_ms
    outcome: Outcome = "pass" if high <= allowed else "fail" if low > allowed else "inconclusive"
    return line.verdict(outcome, latency.p50_ms, allowed, f"ms; 95 % interval {low:.4g} to {high:.4g}", before)
