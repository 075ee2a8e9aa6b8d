"""What a run will do, known before anything heavy is imported: its directory and the name of each file it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.recipe import Recipe

INPUT = "00-input"
FINAL_MODEL = "model.keras"


def run_directory(recipe: Recipe, output: str | Path | None) -> Path:
    """Return where the run of `recipe` is kept: `output`, or a folder under `runs/` named after the recipe."""
    return Path(output).expanduser() if output else Path("runs") / f"{recipe.name}-{recipe.digest()[:8]}"


def step_file(recipe: Recipe, position: int) -> str:
    """Return the file of the model after the pass at `position`, such as `"01-prune.keras"`."""
    return f"{position + 1:02d}-{recipe.passes[position].id}.keras"


def export_files(recipe: Recipe) -> dict[str, str]:
    """Return the exported file of each format."""
    return {export.format: f"model.{export.format}" for export in recipe.exports}


def baseline_files(recipe: Recipe) -> dict[str, str]:
    """Return, by format, the exports of the input model that latency is compared with: same runtime, no passes."""
    if not recipe.passes or not recipe.benchmark.enabled:
        return {}
    return {export.format: f"{INPUT}.{export.format}" for export in recipe.exports}


def plan_run(recipe: Recipe, output: str | Path | None = None) -> dict[str, Any]:
    """Return what running `recipe` would do, step by step; the input model is checked, nothing is written.

    Raises:
        ModelError: the input model cannot be opened safely.
    """
    from compress.data.loading import describe_data
    from compress.models.inspection import inspect_model

    summary = inspect_model(recipe.model.path)
    expectations: list[str] = []
    steps = [
        {
            "step": "input",
            "what": f"{summary.parameters:,} parameters, {summary.macs:,} MACs",
            "writes": f"{INPUT}.keras",
        }
    ]
    for position, item in enumerate(recipe.passes):
        options = item.model_dump(mode="json", exclude_defaults=True, exclude={"type", "id"})
        what = ", ".join(f"{name}={_spell(value)}" for name, value in options.items()) or "defaults"
        steps.append({"step": item.id, "what": f"{item.type}: {what}", "writes": step_file(recipe, position)})
        expectations += [f"{item.id}: {sentence}" for sentence in item.expectations()]
    baselines = baseline_files(recipe)
    for kind, name in export_files(recipe).items():
        writes = f"{name}, {baselines[kind]}" if kind in baselines else name
        steps.append({"step": f"export {kind}", "what": "convert, then compare with the model", "writes": writes})
    measured = "accuracy, size, memory, latency" if recipe.benchmark.enabled else "accuracy, size"
    steps.append({"step": "benchmark", "what": measured, "writes": "manifest.json"})
    if recipe.budgets:
        steps.append({"step": "budgets", "what": f"{len(recipe.budgets)} artifacts", "writes": "manifest.json"})
    return {
        "recipe": recipe.name,
        "directory": str(run_directory(recipe, output)),
        "data": describe_data(recipe.data),
        "steps": steps,
        "expectations": expectations,
    }


def _spell(value: Any) -> str:
    """Return an option as a plan shows it: a model file by its name."""
    return Path(value["path"]).name if isinstance(value, dict) and "path" in value else str(value)
