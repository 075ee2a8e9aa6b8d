"""Budgets as tests: `bmcompress.budget.yaml` is collected, one item per limit, and a fixture checks single files.

pytest loads this through the entry point `bmcompress`; `-p no:bmcompress` keeps it out. The check of a file runs once,
when the first of its limits is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from compress.errors import BmcompressError

if TYPE_CHECKING:
    from compress.checking import CheckReport
    from compress.gate.verdicts import Verdict

_NAME = "bmcompress.budget.yaml"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("bmcompress", "budgets of model files")
    group.addoption("--bmcompress-strict", action="store_true", help="A limit that is inconclusive fails, not skips.")
    group.addoption("--bmcompress-size-only", action="store_true", help="Only bytes and weights; no model is executed.")
    group.addoption(
        "--bmcompress-allow-import",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="Trust this package: models, data and metrics may import it. Repeatable.",
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect budget files."""
    if file_path.name == _NAME or file_path.name.endswith(f".{_NAME}"):
        return _BudgetFile.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session")
def bmcompress_check(pytestconfig: pytest.Config) -> Callable[..., CheckReport]:
    """Return a function that fails the test when a file breaks a limit, and skips it where none can be told.

    `bmcompress_check("bmcompress.budget.yaml")` checks a budget file or the directory of a run;
    `bmcompress_check("m.tflite", file="110 KiB", accuracy={"min": 0.85}, data="npz:test.npz")` checks one file, with
    the limits of a budget entry, and with `reference` and `baseline` as in a budget file. It returns the report.
    """

    def check(
        model: str | Path,
        /,  # as `file` is a limit
        *,
        data: Any = None,
        reference: str | Path | None = None,
        baseline: str | Path | None = None,
        **limits: Any,
    ) -> CheckReport:
        __tracebackhide__ = True
        target: Any = model
        if limits:
            target = {"artifacts": {"model": str(model)}, "budgets": [{"artifact": "model", **limits}]}
            target |= {"data": data} if data is not None else {}
            target |= {"reference": str(reference), "references": {"model": str(reference)}} if reference else {}
        report = _check(pytestconfig, target, baseline)
        _conclude(pytestconfig, report.verdicts)
        return report

    return check


class _BudgetFile(pytest.File):
    """A budget file; its check runs once."""

    _found: CheckReport | None = None

    def collect(self) -> Iterator[pytest.Item]:
        from compress.checking import load_budget_file

        try:
            budgets = load_budget_file(self.path)
        except BmcompressError as error:
            raise self.CollectError(str(error)) from None
        for index, budget in enumerate(budgets.budgets):
            for place in budget.places():
                if self.config.getoption("bmcompress_size_only") and budget.needs_execution(place):
                    continue
                name = f"{budget.artifact}.{'.'.join(place)}"
                yield _Limit.from_parent(self, name=name, place=("budgets", index, *place))

    def verdicts(self) -> list[Verdict]:
        if self._found is None:
            self._found = _check(self.config, self.path)
        return self._found.verdicts


class _Limit(pytest.Item):
    """One limit of a budget file."""

    def __init__(self, *, place: tuple[str | int, ...], **arguments: Any):
        super().__init__(**arguments)
        self.place = place

    def runtest(self) -> None:
        # A verdict without a limit of its own, on an accuracy that fell, stands at the metric.
        found = [v for v in self.parent.verdicts() if self.place[: len(v.place)] == v.place]
        if not found:  # never a pass
            pytest.fail(f"{self.name} was not judged", pytrace=False)
        _conclude(self.config, found)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        lines = [v.line for v in self.parent._found.verdicts if v.place == self.place] if self.parent._found else []
        return self.path, lines[0] - 1 if lines and lines[0] else None, self.name


def _check(config: pytest.Config, target: Any, baseline: str | Path | None = None) -> CheckReport:
    from compress.checking import check_budgets

    try:
        return check_budgets(
            target,
            baseline=baseline,
            size_only=config.getoption("bmcompress_size_only"),
            allow_imports=tuple(config.getoption("bmcompress_allow_import")),
        )
    except BmcompressError as error:
        pytest.fail(str(error), pytrace=False)


def _conclude(config: pytest.Config, verdicts: list[Verdict]) -> None:
    """Fail for limits that are broken; skip where one could not be judged."""
    __tracebackhide__ = True
    from compress.gate.verdicts import tell

    undecided = [v for v in verdicts if v.verdict == "inconclusive"]
    broken = [v for v in verdicts if v.verdict == "fail"]
    if config.getoption("bmcompress_strict"):
        broken += [v for v in undecided if v.level == "error"]
    if broken:
        pytest.fail("\n".join(f"{v.verdict}: {tell(v)}" for v in broken), pytrace=False)
    if open_ones := [*undecided, *(v for v in verdicts if v.verdict == "skipped")]:
        pytest.skip("; ".join(f"{v.verdict}: {tell(v)}" for v in open_ones))
