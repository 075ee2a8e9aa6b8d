"""bmcompress: compression of trained Keras 3 models.

The public names below are loaded when they are first used: importing this package imports no framework and changes
nothing in the environment.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BenchmarkReport": "compress.measure.results",
    "BlockPruning": "compress.passes.prune_blocks",
    "BmcompressError": "compress.errors",
    "ChannelPruning": "compress.passes.prune_channels",
    "Clustering": "compress.clustering.callback",
    "Comparison": "compress.measure.comparison",
    "ConstantSchedule": "compress.pruning.schedules",
    "Data": "compress.data.split",
    "Distillation": "compress.passes.distill",
    "Factorization": "compress.passes.factorize",
    "FineTuning": "compress.passes.finetune",
    "GroupSparsity": "compress.channels.group_sparsity",
    "IterativeSchedule": "compress.pruning.schedules",
    "MagnitudePruning": "compress.passes.prune",
    "Migration": "compress.legacy.migrating",
    "Pass": "compress.passes.base",
    "PolynomialSchedule": "compress.pruning.schedules",
    "PostTrainingQuantization": "compress.passes.ptq",
    "Pruner": "compress.pruning.pruner",
    "Pruning": "compress.pruning.callback",
    "QuantizationAwareTraining": "compress.passes.qat",
    "QuantizationSummary": "compress.quantization.description",
    "Recipe": "compress.recipe",
    "Regrowth": "compress.pruning.schedules",
    "Run": "compress.runner",
    "Score": "compress.pruning.scores",
    "Tracking": "compress.tracking.callback",
    "WeightClustering": "compress.passes.cluster",
    "as_data": "compress.data.split",
    "assign_bit_widths": "compress.quantization.mixed_precision",
    "benchmark_files": "compress.measure.benchmarking",
    "calibrate": "compress.quantization.calibration",
    "check_budgets": "compress.checking",
    "cluster_weights": "compress.clustering.clustered_weights",
    "compare_models": "compress.measure.comparing",
    "copy_model": "compress.models.copying",
    "describe_quantization": "compress.quantization.description",
    "distill": "compress.distillation",
    "export_model": "compress.deploy.exporting",
    "export_models": "compress.deploy.exporting",
    "fake_quantize": "compress.quantization.fake_quantization",
    "factorize": "compress.low_rank.factorizing",
    "find_blocks": "compress.depth.blocks",
    "find_channel_groups": "compress.channels.groups",
    "fine_tune": "compress.finetuning",
    "fold_batch_norm": "compress.quantization.folding",
    "inspect_model": "compress.models.inspection",
    "load_data": "compress.data.loading",
    "load_model": "compress.models.opening",
    "load_recipe": "compress.recipe",
    "measure_sensitivity": "compress.quantization.model_sensitivity",
    "measure_widths": "compress.quantization.mixed_precision",
    "migrate_model": "compress.legacy.migrating",
    "prune_blocks": "compress.depth.pruning",
    "prune_channels": "compress.channels.pruning",
    "prune_weights": "compress.pruning.magnitude",
    "pruning_sensitivity": "compress.pruning.sensitivity",
    "reestimate_batch_norm": "compress.training.batch_norm",
    "register_rule": "compress.channels.rules",
    "run": "compress.runner",
    "snap_biases": "compress.quantization.deployment",
    "weight_gradients": "compress.models.gradients",
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
    from compress.channels.group_sparsity import GroupSparsity
    from compress.channels.groups import find_channel_groups
    from compress.channels.pruning import prune_channels
    from compress.channels.rules import register_rule
    from compress.checking import check_budgets
    from compress.clustering.callback import Clustering
    from compress.clustering.clustered_weights import cluster_weights
    from compress.data.loading import load_data
    from compress.data.split import Data, as_data
    from compress.deploy.exporting import export_model, export_models
    from compress.depth.blocks import find_blocks
    from compress.depth.pruning import prune_blocks
    from compress.distillation import distill
    from compress.errors import BmcompressError
    from compress.finetuning import fine_tune
    from compress.legacy.migrating import Migration, migrate_model
    from compress.low_rank.factorizing import factorize
    from compress.measure.benchmarking import benchmark_files
    from compress.measure.comparing import compare_models
    from compress.measure.comparison import Comparison
    from compress.measure.results import BenchmarkReport
    from compress.models.copying import copy_model
    from compress.models.gradients import weight_gradients
    from compress.models.inspection import inspect_model
    from compress.models.opening import load_model
    from compress.passes.base import Pass
    from compress.passes.cluster import WeightClustering
    from compress.passes.distill import Distillation
    from compress.passes.factorize import Factorization
    from compress.passes.finetune import FineTuning
    from compress.passes.prune import MagnitudePruning
    from compress.passes.prune_blocks import BlockPruning
    from compress.passes.prune_channels import ChannelPruning
    from compress.passes.ptq import PostTrainingQuantization
    from compress.passes.qat import QuantizationAwareTraining
    from compress.pruning.callback import Pruning
    from compress.pruning.magnitude import prune_weights
    from compress.pruning.pruner import Pruner
    from compress.pruning.schedules import ConstantSchedule, IterativeSchedule, PolynomialSchedule, Regrowth
    from compress.pruning.scores import Score
    from compress.pruning.sensitivity import pruning_sensitivity
    from compress.quantization.calibration import calibrate
    from compress.quantization.deployment import snap_biases
    from compress.quantization.description import QuantizationSummary, describe_quantization
    from compress.quantization.fake_quantization import fake_quantize
    from compress.quantization.folding import fold_batch_norm
    from compress.quantization.mixed_precision import assign_bit_widths, measure_widths
    from compress.quantization.model_sensitivity import measure_sensitivity
    from compress.recipe import Recipe, load_recipe
    from compress.runner import Run, run
    from compress.tracking.callback import Tracking
    from compress.training.batch_norm import reestimate_batch_norm
