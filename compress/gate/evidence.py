"""What a check knows besides the numbers of the files: the baseline, and results sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.gate.baseline import Baseline, BaselineArtifact
from compress.gate.verdicts import Outcome
from compress.measure.results import SplitSummary

if TYPE_CHECKING:
    from compress.measure.quality import Quality


@dataclass(frozen=True)
class Lack:
    """A baseline, or an artifact of it, that is not there.

    Args:
        outcome: of a limit that needs it.
        reason: for the user.
    """

    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Evidence:
    """What limits are judged by, besides what was measured of each file.

    Args:
        baseline: what was measured when it was last agreed.
        baseline_expected: whether one is named, so that its absence must be said wherever it would count.
        has_reference: whether drops from the reference count.
        qualities: quality sample by sample, by artifact.
        data: the samples that it was measured on.
        fingerprint_id: of this machine and its runtimes.
        absent: outcome of a limit that needs a baseline where there is none.
        incomplete: outcome of a limit that needs a number which the baseline does not have.
    """

    baseline: Baseline | None = None
    baseline_expected: bool = False
    has_reference: bool = True
    qualities: Mapping[str, Quality] = field(default_factory=dict)
    data: SplitSummary | None = None
    fingerprint_id: str | None = None
    absent: Outcome = "skipped"
    incomplete: Outcome = "fail"

    def find(self, artifact: str) -> tuple[BaselineArtifact | None, Lack | None]:
        """Return what the baseline has of an artifact, or what is lacking."""
        if self.baseline is None:
            return None, Lack(self.absent, "there is no baseline: `bmcompress baseline update` writes one")
        kept = self.baseline.artifacts.get(artifact)
        if kept is None:
            reason = "the baseline does not have this artifact: `bmcompress baseline update` adds it"
            return None, Lack(self.incomplete, reason)
        return kept, None

    @property
    def same_samples(self) -> bool:
        """Whether the baseline was measured on the samples that are measured now."""
        before = self.baseline.data if self.baseline else None
        return before is not None and self.data is not None and before.digest == self.data.digest
