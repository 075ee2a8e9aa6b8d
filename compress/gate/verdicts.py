"""One line of a check: what was measured, what is allowed, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from compress.errors import BudgetError, InconclusiveError
from compress.gate.budgets import Budget, Level
from compress.measure.results import Count, Record
from compress.text import one_line

Outcome = Literal["pass", "fail", "inconclusive", "warn", "skipped"]
"""`warn` is a broken limit of level `warn`; `skipped` lacks what it is compared with, and its detail says why."""

HEADER = ("artifact", "limit", "baseline", "measured", "allowed", "verdict", "detail")


class Verdict(Record):
    """One line of a check."""

    artifact: str
    limit: str
    """Which limit, such as `"accuracy.max_drop"`."""
    value: float | None
    """What was measured, or nothing where it could not be."""
    allowed: float | None
    """The limit, or nothing where it follows from a number that is missing."""
    verdict: Outcome
    detail: str = ""
    """Why, where the value alone does not say."""
    baseline: float | None = None
    """What the baseline has in this place, or nothing."""
    level: Level = "error"
    place: tuple[str | int, ...] = ()
    """Where the limit stands in the file that sets it, such as `("budgets", 0, "accuracy", "max_drop")`."""
    line: Count | None = None
    """Line of that file, counted from 1."""

    @property
    def excess(self) -> float:
        """How far a broken limit is passed, as a share of it; infinity where nothing was measured."""
        if self.value is None or self.allowed is None:
            return math.inf
        return abs(self.value - self.allowed) / max(abs(self.allowed), 1e-9)


@dataclass(frozen=True)
class Line:
    """A limit that is being judged.

    Args:
        budget: the entry that it stands in.
        index: of the entry in the list.
        place: of the limit in the entry, such as `("accuracy", "max_drop")`.
        limit: what it is called.
    """

    budget: Budget
    index: int
    place: tuple[str, ...]
    limit: str

    def verdict(
        self,
        outcome: Outcome,
        value: float | None,
        allowed: float | None,
        detail: str = "",
        baseline: float | None = None,
    ) -> Verdict:
        """Return the verdict; what fails at level `warn` warns."""
        level = self.budget.level_of(self.place)
        return Verdict(
            artifact=self.budget.artifact,
            limit=self.limit,
            value=value,
            allowed=allowed,
            verdict="warn" if outcome == "fail" and level == "warn" else outcome,
            detail=detail,
            baseline=baseline,
            level=level,
            place=("budgets", self.index, *self.place),
        )

    def missing(self, allowed: float | None, reason: str, outcome: Outcome = "fail") -> Verdict:
        """Return the verdict on a number that there is not: it fails, unless something else is said."""
        return self.verdict(outcome, None, allowed, reason)


def overall(verdicts: Sequence[Verdict]) -> Literal["pass", "fail", "inconclusive"]:
    """Return the verdict on all of them; warnings and what was skipped count as passed."""
    if any(v.verdict == "fail" for v in verdicts):
        return "fail"
    return "inconclusive" if any(_undecided(v) for v in verdicts) else "pass"


def raise_for_verdicts(verdicts: Sequence[Verdict], strict: bool = False) -> None:
    """Raise BudgetError if a verdict is `fail`, and under `strict` InconclusiveError if one is `inconclusive`."""
    broken = [f"{v.artifact}: {v.limit}" for v in verdicts if v.verdict == "fail"]
    if broken:
        raise BudgetError(f"{len(broken)} of {len(verdicts)} limits are broken: {_first(broken)}")
    open_ones = [f"{v.artifact}: {v.limit}" for v in verdicts if _undecided(v)]
    if strict and open_ones:
        raise InconclusiveError(f"{len(open_ones)} of {len(verdicts)} limits are inconclusive: {_first(open_ones)}")


def worst_first(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts that are not `pass`: broken limits, warnings, undecided and skipped ones, each by excess."""
    order = ("fail", "warn", "inconclusive", "skipped")
    shown = [v for v in verdicts if v.verdict in order]
    return sorted(shown, key=lambda v: (order.index(v.verdict), -v.excess))


def verdict_rows(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of verdicts; columns in which nothing stands are left out."""
    rows = [
        [
            v.artifact,
            v.limit,
            show_number(v.baseline),
            show_number(v.value),
            show_number(v.allowed),
            v.verdict,
            v.detail,
        ]
        for v in verdicts
    ]
    kept = [index for index, name in enumerate(HEADER) if name != "baseline" or any(row[index] != "-" for row in rows)]
    return [HEADER[index] for index in kept], [[row[index] for index in kept] for row in rows]


def show_number(value: float | None) -> str:
    """Return a number as a table has it: bytes and counts whole, shares and ratios to four digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4f}"


def tell(verdict: Verdict) -> str:
    """Return one line about a verdict, without control characters."""
    parts = [f"{verdict.artifact}: {verdict.limit} is {show_number(verdict.value)}"]
    if verdict.allowed is not None:
        parts.append(f"allowed {show_number(verdict.allowed)}")
    if verdict.baseline is not None:
        parts.append(f"baseline {show_number(verdict.baseline)}")
    text = ", ".join(parts)
    return one_line(f"{text} ({verdict.detail})" if verdict.detail else text)


def _undecided(verdict: Verdict) -> bool:
    return verdict.verdict == "inconclusive" and verdict.level == "error"


def _first(names: Sequence[str], count: int = 10) -> str:
    more = f"; and {len(names) - count} more" if len(names) > count else ""
    return "; ".join(names[:count]) + more
