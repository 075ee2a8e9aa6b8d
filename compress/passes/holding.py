"""What earlier passes made of a model and later training must not undo: zeros, and weights that share a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras
    import numpy as np


def hold_structure(model: keras.Model, exclude: Sequence[str] = ()) -> list[keras.callbacks.Callback]:
    """Return callbacks that keep the zeros and clusters of `model` while it trains; none where there are none.

    Args:
        model: the model that is trained, or the one that it is a copy of.
        exclude: shell patterns over layers or kernels that something else holds.
    """
    return hold_zeros(model, exclude) + hold_clusters(model, exclude)


def hold_zeros(model: keras.Model, exclude: Sequence[str] = ()) -> list[keras.callbacks.Callback]:
    """Return the callback that keeps zeros where they are, or none where there are none to keep."""
    from compress.pruning.callback import Pruning
    from compress.pruning.magnitude import has_pruned_kernels
    from compress.pruning.schedules import ConstantSchedule

    if not has_pruned_kernels(model, exclude):
        return []
    return [Pruning(0.0, schedule=ConstantSchedule(), exclude=exclude)]


def hold_clusters(model: keras.Model, exclude: Sequence[str] = ()) -> list[keras.callbacks.Callback]:
    """Return the callback that keeps weights together that share a value, or none; it belongs behind that for zeros.

    The kernels of a fake-quantized model are held as its integers see them: batch norm, folded into a kernel, has
    given each channel a factor, which its scale has too.
    """
    from compress.clustering.callback import Clustering, has_clusters

    unit_of = _units(model)
    if not has_clusters(model, unit_of, exclude):
        return []
    return [Clustering(None, granularity="per_channel", unit_of=unit_of, exclude=exclude)]


def _units(model: keras.Model) -> Callable[[keras.Variable], np.ndarray | None]:
    """Return what tells of a kernel what to divide it by to see its clusters: a factor where it is fake-quantized."""
    from compress.quantization.clustered import cluster_unit
    from compress.quantization.layers import QuantizedLayer

    units = {
        id(layer.weight_variable(name)): cluster_unit(layer, name)
        for layer in model.layers
        if isinstance(layer, QuantizedLayer)
        for name in layer.formats
    }
    return lambda variable: units.get(id(variable))
