"""Schedules of TensorFlow Model Optimization, taken where ours are; times are training steps there.

tfmot is not imported: a schedule is known by its module, its class and its `get_config()`.
"""

from __future__ import annotations

from typing import Any

from compress.errors import UsageError
from compress.pruning.schedules import StepSchedule

_PACKAGE = "tensorflow_model_optimization"


def is_tfmot_schedule(schedule: Any) -> bool:
    """Return whether this is a schedule of tfmot."""
    return type(schedule).__module__.partition(".")[0] == _PACKAGE


def adopt_schedule(schedule: Any) -> StepSchedule:
    """Return what a `PolynomialDecay` or `ConstantSparsity` of tfmot says.

    Its end of -1 means that tfmot prunes on at every update; pruned weights stay at zero, so that changes nothing.

    Raises:
        UsageError: another class, such as a subclass, whose rule is not known.
    """
    kind = type(schedule).__name__
    options = schedule.get_config()["config"] if kind in ("PolynomialDecay", "ConstantSparsity") else {}
    if kind == "PolynomialDecay":
        return StepSchedule(**options)
    if kind == "ConstantSparsity":
        begin = options["begin_step"]
        return StepSchedule(final_sparsity=options["target_sparsity"], begin_step=begin, end_step=begin)
    raise UsageError(
        f"expected tfmot's PolynomialDecay or ConstantSparsity. Received: {kind}",
        "Write it as PolynomialSchedule, ConstantSchedule or IterativeSchedule of compress.",
    )
