"""Budgets against files, as CI does it: a budget file, or the directory of a run whose recipe has budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.data.references import DataOptions
from compress.deploy.formats import detect_format
from compress.errors import ModelError, RecipeError, UsageError
from compress.gate.baseline import default_path, load_baseline
from compress.gate.budgets import BudgetFile
from compress.gate.evidence import Evidence
from compress.gate.judging import judge
from compress.gate.verdicts import Verdict, overall
from compress.manifest import FILE_NAME
from compress.measure.results import BenchmarkReport, FileResult, Record
from compress.measure.size import measure_size
from compress.plan import FINAL_MODEL, INPUT, baseline_files, export_files
from compress.recipe import load_recipe, validate_document
from compress.strict_yaml import Document, read_yaml

if TYPE_CHECKING:
    from compress.measure.quality import Quality


class CheckReport(Record):
    """The verdicts of a check and the measurements behind them."""

    schema_: Literal["bmcompress/check/v1"] = Field("bmcompress/check/v1", alias="schema")
    verdict: Literal["pass", "fail", "inconclusive"]
    """The worst of the verdicts; warnings and what was skipped count as passed."""
    budget_file: str
    """The file whose lines the verdicts name."""
    baseline: str | None
    """The baseline that was compared with, or nothing where there is none."""
    verdicts: list[Verdict]
    benchmark: BenchmarkReport | None
    """What was measured, or nothing where only sizes were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return self.model_dump(mode="json", by_alias=True)


@dataclass(frozen=True)
class Target:
    """What is to be checked.

    Args:
        budgets: with absolute paths.
        document: the file that holds the budgets, with its lines.
        baseline_path: where the baseline is, or would be.
        baseline_expected: whether somebody named it.
    """

    budgets: BudgetFile
    document: Document
    baseline_path: Path | None
    baseline_expected: bool


@dataclass(frozen=True)
class Measured:
    """What was measured of the artifacts, by their names.

    Args:
        results: of each.
        report: the benchmark that they come from.
        qualities: sample by sample.
    """

    results: dict[str, FileResult]
    report: BenchmarkReport
    qualities: dict[str, Quality]


def check_budgets(
    target: str | Path | Mapping[str, Any],
    *,
    baseline: str | Path | None = None,
    require_baseline: bool = False,
    size_only: bool = False,
    allow_imports: tuple[str, ...] = (),
) -> CheckReport:
    """Return the verdict on every budget that `target` sets.

    Args:
        target: a budget file, what such a file says as plain values, or a run directory.
        baseline: the file with the baseline; the one that the budget file names by default.
        require_baseline: whether limits that need a baseline fail where there is none; they are skipped otherwise.
        size_only: judge only bytes and weights; no model is executed and no data are read.
        allow_imports: top-level packages that models and data may import.

    Raises:
        RecipeError: the budget file or the baseline is invalid, or the run has no budgets.
        ModelError: an artifact is missing or broken.
    """
    found = open_target(target, baseline)
    kept = load_baseline(found.baseline_path) if found.baseline_path else None
    if kept is None and baseline is not None:
        raise RecipeError(f"there is no baseline. Received: {baseline}", "`bmcompress baseline update` writes one.")
    budgets = found.budgets
    evidence = Evidence(
        baseline=kept,
        baseline_expected=found.baseline_expected or require_baseline,
        has_reference=budgets.reference is not None,
        absent="fail" if require_baseline else "skipped",
    )
    report = None
    if size_only:
        results = {name: _size_of(file) for name, file in budgets.artifacts.items()}
        verdicts = judge(budgets.budgets, results, evidence, size_only=True)
    else:
        measured = measure_artifacts(budgets, allow_imports)
        verdicts = judge(budgets.budgets, measured.results, evidence_of(measured, evidence))
        report = measured.report.with_short_names()
    return CheckReport(
        verdict=overall(verdicts),
        budget_file=found.document.source,
        baseline=str(found.baseline_path) if kept is not None else None,
        verdicts=[v.model_copy(update={"line": found.document.line_of(v.place)}) for v in verdicts],
        benchmark=report,
    )


def open_target(target: str | Path | Mapping[str, Any], baseline: str | Path | None = None) -> Target:
    """Return the budgets that `target` sets; every artifact of theirs exists.

    Args:
        target: a budget file, what such a file says as plain values, or a run directory.
        baseline: the file with the baseline; the one that the budget file names by default.

    Raises:
        RecipeError: the budget file is invalid, or the run has no budgets.
        ModelError: an artifact is missing.
    """
    default = None
    if isinstance(target, Mapping):
        document = Document(dict(target), "<budget>")
        budgets = validate_document(document, BudgetFile).resolve(Path.cwd())
    elif (path := Path(target).expanduser()).is_dir():
        budgets, document = _budgets_of_run(path)
    else:
        document = read_yaml(path)
        budgets, default = _resolve(document, path), default_path(path.resolve())
    for name, file in budgets.artifacts.items():
        if not Path(file).exists():
            raise ModelError(
                f"the artifact `{name}` is missing. Received: {file}", "Export it first, or correct the path."
            )
    named = baseline or budgets.baseline
    return Target(budgets, document, Path(named).expanduser() if named else default, named is not None)


def load_budget_file(path: Path) -> BudgetFile:
    """Return a validated budget file whose paths are absolute."""
    return _resolve(read_yaml(path), path)


def measure_artifacts(budgets: BudgetFile, allow_imports: tuple[str, ...] = ()) -> Measured:
    """Return whatever the budgets need to know of their artifacts."""
    from compress.data.loading import load_data
    from compress.measure.benchmarking import benchmark_files
    from compress.measure.own_metrics import find_metrics

    needs_data = any(budget.needs_outputs for budget in budgets.budgets)
    data = load_data(budgets.data, allow_imports=allow_imports, needs=("test",)) if needs_data else None
    timed = {budgets.artifacts[budget.artifact] for budget in budgets.budgets if budget.latency}
    qualities: dict[str, Quality] = {}
    report = benchmark_files(
        list(budgets.artifacts.values()),
        data.require("test", "a quality budget") if data else None,
        reference=budgets.reference or next(iter(budgets.artifacts.values())),
        references={budgets.artifacts[name]: file for name, file in budgets.references.items()},
        metrics=find_metrics(budgets.metrics, allow_imports),
        latency=bool(timed),
        untimed=[file for file in budgets.artifacts.values() if file not in timed],
        memory=False,
        allow_imports=allow_imports,
        on_quality=qualities.__setitem__,
    )
    by_file = {result.file: result for result in report.results}
    return Measured(
        {name: by_file[file] for name, file in budgets.artifacts.items()},
        report,
        {name: qualities[file] for name, file in budgets.artifacts.items() if file in qualities},
    )


def evidence_of(measured: Measured, about: Evidence) -> Evidence:
    """Return `about` with what was measured."""
    return replace(
        about,
        qualities=measured.qualities,
        data=measured.report.data,
        fingerprint_id=measured.report.environment.fingerprint_id,
    )


def _resolve(document: Document, path: Path) -> BudgetFile:
    return validate_document(document, BudgetFile).resolve(path.resolve().parent)


def _budgets_of_run(directory: Path) -> tuple[BudgetFile, Document]:
    if not (directory / FILE_NAME).exists():
        raise UsageError(
            f"expected a budget file or the directory of a run. Received: {directory}, which holds no {FILE_NAME}"
        )
    recipe = load_recipe(directory / "recipe.yaml")
    if not recipe.budgets:
        raise RecipeError(
            f"{directory / 'recipe.yaml'}: the recipe of this run sets no budgets", "Add `budgets:` to it."
        )
    files = {**export_files(recipe), "keras": FINAL_MODEL}
    wanted = {budget.artifact for budget in recipe.budgets}
    baselines = {kind: name for kind, name in baseline_files(recipe).items() if kind in wanted}
    budgets = BudgetFile(
        artifacts={kind: str(directory / name) for kind, name in files.items() if kind in wanted},
        reference=str(directory / f"{INPUT}.keras"),
        references={kind: str(directory / name) for kind, name in baselines.items()},
        data=DataOptions(test=recipe.data.test) if recipe.data.test else DataOptions(),
        budgets=recipe.budgets,
    )
    return budgets.resolve(Path.cwd()), read_yaml(directory / "recipe.yaml")


def _size_of(file: str) -> FileResult:
    size, sha256 = measure_size(file)
    return FileResult(
        file=file,
        format=detect_format(Path(file)),
        sha256=sha256,
        runtime=None,
        size=size,
        quality=None,
        startup=None,
        memory=None,
        latency=None,
        reasons=dict.fromkeys(("quality", "startup", "memory", "latency"), "only sizes were asked for"),
    )
