"""bmcompress: compression of trained Keras 3 models.

The public names below are loaded when they are first used: importing this package imports no framework and changes
nothing in the environment.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BenchmarkReport": "compress.measure.results",
    "BmcompressError": "compress.errors",
    "ConstantSchedule": "compress.pruning.schedules",
    "Data": "compress.data.split",
    "Distillation": "compress.passes.distill",
    "FineTuning": "compress.passes.finetune",
    "MagnitudePruning": "compress.passes.prune",
    "Pass": "compress.passes.base",
    "PolynomialSchedule": "compress.pruning.schedules",
    "Pruning": "compress.pruning.callback",
    "Recipe": "compress.recipe",
    "Run": "compress.runner",
    "as_data": "compress.data.split",
    "benchmark_files": "compress.measure.benchmarking",
    "check_budgets": "compress.checking",
    "copy_model": "compress.models.copying",
    "distill": "compress.distillation",
    "export_model": "compress.deploy.exporting",
    "export_models": "compress.deploy.exporting",
    "fine_tune": "compress.finetuning",
    "inspect_model": "compress.models.inspection",
    "load_data": "compress.data.loading",
    "load_model": "compress.models.opening",
    "load_recipe": "compress.recipe",
    "prune_weights": "compress.pruning.magnitude",
    "run": "compress.runner",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if TYPE_CHECKING:
    from compress.checking import check_budgets
    from compress.data.loading import load_data
    from compress.data.split import Data, as_data
    from compress.deploy.exporting import export_model, export_models
    from compress.distillation import distill
    from compress.errors import BmcompressError
    from compress.finetuning import fine_tune
    from compress.measure.benchmarking import benchmark_files
    from compress.measure.results import BenchmarkReport
    from compress.models.copying import copy_model
    from compress.models.inspection import inspect_model
    from compress.models.opening import load_model
    from compress.passes.base import Pass
    from compress.passes.distill import Distillation
    from compress.passes.finetune import FineTuning
    from compress.passes.prune import MagnitudePruning
    from compress.pruning.callback import Pruning
    from compress.pruning.magnitude import prune_weights
    from compress.pruning.schedules import ConstantSchedule, PolynomialSchedule
    from compress.recipe import Recipe, load_recipe
    from compress.runner import Run, run
