"""Scales for few bits: clipping the largest weights of a channel makes the grid finer for all others.

At 8 bits the largest weight may set the scale; at 4 bits and fewer that wastes most of the grid (Banner et al. 2019,
arXiv:1810.05723). The scale with the smallest squared error of the weights is searched; no data is needed.
"""

from __future__ import annotations

from collections.abc import Collection

import keras
import numpy as np

from compress.errors import UsageError
from compress.models.graph import trace_graph
from compress.quantization.arithmetic import exact_scale, quantize_weight, reduce_groups, spread_scale, weight_scale
from compress.quantization.layers import QuantizedLayer
from compress.quantization.weight_format import WeightFormat

_FEW_BITS = 6
_SHRINKS = np.linspace(1.0, 0.2, 41, dtype="float32")


def search_scale(kernel: np.ndarray, form: WeightFormat) -> np.ndarray:
    """Return the scales of `form`, shaped as `weight_scale` has them, with the least squared error after rounding.

    Args:
        kernel: float weights.
        form: bits and which weights share a scale; from 7 bits on the largest weight sets the scale.
    """
    kernel = np.asarray(kernel, "float32")
    sharing = (form.channel_axes, form.group_size, form.axis)
    largest = weight_scale(kernel, form.channel_axes, form.bits, form.group_size, form.axis)
    if not _has_few_bits(form):
        return largest
    best, least = largest, np.full(largest.shape, np.inf, "float32")
    for shrink in _SHRINKS:
        scale = exact_scale(largest * shrink)
        error = reduce_groups(np.sum, np.square(round_weight(kernel, form, scale) - kernel), *sharing)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def round_weight(kernel: np.ndarray, form: WeightFormat, scale: np.ndarray) -> np.ndarray:
    """Return `kernel` on the grid of `scale`, each weight at its nearest point."""
    integers, scale = quantize_weight(kernel, form.channel_axes, form.bits, form.group_size, form.axis, scale)
    return integers * spread_scale(scale, kernel.shape, form.group_size, form.axis)


def search_scales(model: keras.Model, *, exclude: Collection[str] = ()) -> keras.Model:
    """Give the weights of a fake-quantized model that have 6 bits or fewer searched scales, in place.

    They are rounded to nearest; those with more bits or scales of their own, and float16, stay as they are.

    Args:
        model: what `fake_quantize` returned.
        exclude: paths of layers to leave alone, such as those that another method has rounded.

    Raises:
        UsageError: a weight is NaN or infinite.
    """
    is_new = False
    for layer in quantized_layers_of(model):
        for name, form in list(layer.formats.items()):
            if _has_few_bits(form) and form.scale == "absmax" and layer.path_in_model not in exclude:
                kernel = weight_values(layer, name)
                scale = search_scale(kernel, form)
                is_new |= layer.set_rounding(name, round_weight(kernel, form, scale), scale)
    return drop_functions(model) if is_new else model


def _has_few_bits(form: WeightFormat) -> bool:
    return form.dtype == "int" and form.bits <= _FEW_BITS


def quantized_layers_of(model: keras.Model) -> list[QuantizedLayer]:
    """Return the wrappers of a fake-quantized model, in the order of their first calls."""
    operations = {id(node.operation): node.operation for node in trace_graph(model).nodes}
    return [each for each in operations.values() if isinstance(each, QuantizedLayer)]


def weight_values(layer: QuantizedLayer, name: str) -> np.ndarray:
    """Return a float weight of a quantized layer as float32.

    Raises:
        UsageError: it is NaN or infinite.
    """
    values = np.asarray(keras.ops.convert_to_numpy(layer.weight_variable(name)), "float32")
    if not np.isfinite(values).all():
        raise UsageError(
            f"expected finite weights. Received: NaN or infinity in {name!r} of {layer.path_in_model!r}",
            "Training has diverged: lower the learning rate.",
        )
    return values


def drop_functions(model: keras.Model) -> keras.Model:
    """Return `model` without the functions that Keras has traced of it, because its layers compute otherwise now."""
    model.train_function = model.test_function = model.predict_function = None
    return model
