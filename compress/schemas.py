"""JSON Schema of everything that we read and write, by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from compress.errors import UsageError

PUBLISHED = {
    "recipe": "compress.recipe:Recipe",
    "budget": "compress.gate.budgets:BudgetFile",
    "manifest": "compress.manifest:Manifest",
    "benchmark": "compress.measure.results:BenchmarkReport",
    "compare": "compress.measure.comparison:Comparison",
    "check": "compress.checking:CheckReport",
    "baseline": "compress.gate.baseline:Baseline",
    "inspect": "compress.models.inspection:ModelSummary",
}


def published_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) called `name`."""
    if name not in PUBLISHED:
        raise UsageError(f"expected one of {', '.join(PUBLISHED)}. Received: {name!r}")
    from compress.recipe import recipe_schema

    module, _, model = PUBLISHED[name].partition(":")
    return recipe_schema(getattr(import_module(module), model))
