"""Budgets against files, as CI does it: a budget file, or the directory of a run whose recipe has budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from compress.data.references import DataOptions
from compress.deploy.runtimes import detect_format
from compress.errors import ModelError, RecipeError, UsageError
from compress.gate.budgets import BudgetFile
from compress.gate.verdicts import Verdict, judge
from compress.manifest import FILE_NAME
from compress.measure.results import BenchmarkReport, FileResult, Record
from compress.measure.size import measure_size
from compress.plan import FINAL_MODEL, INPUT, baseline_files, export_files
from compress.recipe import load_recipe, validate_document
from compress.strict_yaml import read_yaml


class CheckReport(Record):
    """The verdicts of a check and the measurements behind them."""

    schema_: Literal["bmcompress/check/v1"] = Field("bmcompress/check/v1", alias="schema")
    verdicts: list[Verdict]
    benchmark: BenchmarkReport | None
    """What was measured, or nothing where only sizes were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return self.model_dump(mode="json", by_alias=True)


def check_budgets(target: str | Path, *, size_only: bool = False, allow_imports: tuple[str, ...] = ()) -> CheckReport:
    """Return the verdict on every budget that `target` sets.

    Args:
        target: a budget file, or a run directory.
        size_only: judge only bytes and weights; no model is executed and no data are read.
        allow_imports: top-level packages that models and data may import.

    Raises:
        RecipeError: the budget file is invalid, or the run has no budgets.
        ModelError: an artifact is missing or broken.
    """
    path = Path(target).expanduser()
    budgets = _budgets_of_run(path) if path.is_dir() else load_budget_file(path)
    for name, file in budgets.artifacts.items():
        if not Path(file).exists():
            raise ModelError(
                f"the artifact `{name}` is missing. Received: {file}", "Export it first, or correct the path."
            )
    if size_only:
        results = {name: _size_of(file) for name, file in budgets.artifacts.items()}
        return CheckReport(verdicts=judge(budgets.budgets, results, size_only=True), benchmark=None)
    report = _measure(budgets, allow_imports)
    measured = {result.file: result for result in report.results}
    results = {name: measured[file] for name, file in budgets.artifacts.items()}
    return CheckReport(verdicts=judge(budgets.budgets, results), benchmark=report.with_short_names())


def load_budget_file(path: Path) -> BudgetFile:
    """Return a validated budget file whose paths are absolute."""
    document = read_yaml(path)
    return validate_document(document, BudgetFile).resolve(path.resolve().parent)


def _budgets_of_run(directory: Path) -> BudgetFile:
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
    return BudgetFile(
        artifacts={kind: str(directory / name) for kind, name in files.items() if kind in wanted},
        reference=str(directory / f"{INPUT}.keras"),
        references={kind: str(directory / name) for kind, name in baselines.items()},
        data=DataOptions(test=recipe.data.test) if recipe.data.test else DataOptions(),
        budgets=recipe.budgets,
    ).resolve(Path.cwd())


def _measure(budgets: BudgetFile, allow_imports: tuple[str, ...]) -> BenchmarkReport:
    from compress.data.loading import load_data
    from compress.measure.benchmarking import benchmark_files

    quality = any(budget.metrics() for budget in budgets.budgets)
    data = load_data(budgets.data, allow_imports=allow_imports, needs=("test",)) if quality else None
    reference = budgets.reference or next(iter(budgets.artifacts.values()))
    return benchmark_files(
        list(budgets.artifacts.values()),
        data.require("test", "a quality budget") if data else None,
        reference=reference,
        references={budgets.artifacts[name]: file for name, file in budgets.references.items()},
        tasks="infer",
        latency=any(budget.latency for budget in budgets.budgets),
        memory=False,
        allow_imports=allow_imports,
    )


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
