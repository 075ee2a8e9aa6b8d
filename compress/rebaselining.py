"""Agreeing on a new baseline: measured like a check, written only when the check passes, shown as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from compress.checking import Measured, evidence_of, measure_artifacts, open_target
from compress.errors import BudgetError, RecipeError, UsageError
from compress.gate.baseline import SIZES, Baseline, BaselineArtifact, BaselineMetric, load_baseline, make_baseline
from compress.gate.budgets import Budget
from compress.gate.evidence import Evidence
from compress.gate.judging import judge
from compress.gate.verdicts import Verdict, show_number


def update_baseline(
    target: str | Path,
    *,
    baseline: str | Path | None = None,
    force: bool = False,
    allow_imports: tuple[str, ...] = (),
) -> tuple[Path, Baseline | None, Baseline]:
    """Measure the artifacts and write the baseline, and return its path, what it was and what it is.

    A baseline that cannot be read is never written over: delete it first.

    Args:
        target: a budget file, or a run directory together with `baseline`.
        baseline: the file to write; the one that the budget file names by default.
        force: write it even where a limit is broken, by what the baseline has now or by itself.
        allow_imports: top-level packages that models and data may import.

    Raises:
        BudgetError: a limit is broken, and nothing was written.
        RecipeError: the budget file or the old baseline is invalid.
        ModelError: an artifact is missing or broken.
    """
    found = open_target(target, baseline)
    if found.baseline_path is None:
        raise UsageError("a run has no baseline of its own. Received: no --baseline", "Name the file to write.")
    before = load_baseline(found.baseline_path)
    measured = measure_artifacts(found.budgets, allow_imports)
    if not force:
        _refuse_broken(_judge(found.budgets.budgets, measured, before, found.budgets.reference is not None))
    after = make_baseline(measured.results, measured.report, measured.qualities)
    after.save(found.baseline_path)
    return found.baseline_path, before, after


def read_baseline(path: str | Path) -> Baseline:
    """Return the baseline in a file, which must be there."""
    found = load_baseline(Path(path).expanduser())
    if found is None:
        raise RecipeError(f"there is no baseline. Received: {path}", "`bmcompress baseline update` writes one.")
    return found


def baseline_rows(baseline: Baseline) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of what a baseline holds."""
    rows = [
        [artifact, what, show_number(value), "" if value is not None else reason]
        for artifact, kept in sorted(baseline.artifacts.items())
        for what, (value, reason) in _numbers(kept).items()
    ]
    return ["artifact", "number", "value", "why not"], rows


def difference_rows(before: Baseline | None, after: Baseline) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of what changed from one baseline to another."""
    rows = []
    old_artifacts = before.artifacts if before else {}
    comparable = before is not None and before.data is not None and before.data == after.data
    for artifact in sorted({*old_artifacts, *after.artifacts}):
        old, new = old_artifacts.get(artifact), after.artifacts.get(artifact)
        olds, news = _numbers(old) if old else {}, _numbers(new) if new else {}
        for what in dict.fromkeys([*olds, *news]):
            (was, _), (now, _) = olds.get(what, (None, "")), news.get(what, (None, ""))
            if was == now:
                continue
            change = f"{now - was:+,.4g}" if was is not None and now is not None else "new" if was is None else "gone"
            rows.append([artifact, what, show_number(was), show_number(now), change])
        if old and new and comparable:
            rows += _flip_rows(artifact, old, new)
    return ["artifact", "number", "before", "after", "change"], rows


def _judge(
    budgets: Sequence[Budget], measured: Measured, before: Baseline | None, has_reference: bool
) -> list[Verdict]:
    """Judge as a check does, but what the old baseline lacks is no reason against a new one."""
    evidence = Evidence(baseline=before, has_reference=has_reference, absent="skipped", incomplete="skipped")
    return judge(budgets, measured.results, evidence_of(measured, evidence))


def _refuse_broken(verdicts: list[Verdict]) -> None:
    broken = [v for v in verdicts if v.verdict == "fail"]
    if broken:
        lines = "; ".join(f"{v.artifact}: {v.limit} ({show_number(v.value)})" for v in broken)
        raise BudgetError(
            f"the baseline was not written, as {len(broken)} limits are broken: {lines}",
            "--force writes it all the same, for a change for the worse that is wanted.",
        )


def _numbers(kept: BaselineArtifact) -> dict[str, tuple[float | None, str]]:
    """Return every number of an artifact, and why there is none."""
    found = {name: (getattr(kept, name), kept.reasons.get(name, "")) for name in SIZES}
    for name, metric in kept.metrics.items():
        found[name] = metric.value, metric.reasons.get("value", "")
    for each in kept.latency:
        found[f"p50 ms ({each.device}, {each.threads} threads, batch {each.batch})"] = each.p50_ms, ""
    return found


def _flip_rows(artifact: str, old: BaselineArtifact, new: BaselineArtifact) -> Iterator[list[str]]:
    for name, decisions in new.decisions.items():
        before = old.decisions.get(name)
        if before is not None and before.count == decisions.count:
            flips = int((before.values() != decisions.values()).sum())
            yield [artifact, f"{name}: flips", "-", f"{flips:,}", f"{flips / max(before.count, 1):.2%}"]
    for name, metric in new.metrics.items():
        lost, gained = _lost_and_gained(old.metrics.get(name), metric)
        if lost or gained:
            yield [artifact, f"{name}: lost, gained", "-", f"{lost:,}, {gained:,}", ""]


def _lost_and_gained(old: BaselineMetric | None, new: BaselineMetric) -> tuple[int, int]:
    packed = [metric.per_sample if metric else None for metric in (old, new)]
    if any(each is None or each.encoding != "bits" for each in packed) or packed[0].count != packed[1].count:
        return 0, 0
    was, now = (each.values() for each in packed)
    return int((was & ~now).sum()), int((~was & now).sum())
