"""GPTQ for a whole model: each layer is rounded with the second moments of what the rounded layers before it give.

Frantar et al. 2022, arXiv:2210.17323, for Dense, EinsumDense and, by their patches, convolutions.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from compress.models.graph import Graph
from compress.models.walking import Skipped
from compress.progress import track
from compress.quantization.gptq import round_by_gptq
from compress.quantization.hessian import Hessian, output_error
from compress.quantization.layer_matrices import LayerMatrix, matrix_of
from compress.quantization.layers import QuantizedLayer
from compress.quantization.matrix import round_matrix
from compress.quantization.refinement import RoundedLayer, RoundingTask, plan_rounding
from compress.quantization.scale_search import drop_functions, search_scale, weight_values
from compress.quantization.stepwise import StepwiseRun, batches_for, take_samples


def apply_gptq(
    model: keras.Model,
    data: Any,
    *,
    samples: int = 256,
    batch_size: int = 32,
    damping: float = 0.01,
    act_order: bool = True,
    seed: int = 0,
) -> tuple[list[RoundedLayer], list[Skipped]]:
    """Round the kernels of a fake-quantized model so that layers make up for their own rounding errors, in place.

    Calibrate first where activations are quantized. Float weights move no more than rounding needs; zeros
    stay zero. Samples are in memory, with the outputs that later calls read; of a layer's inputs only sums are kept.

    Args:
        model: what `fake_quantize` returned.
        data: inputs as `fit` takes them, a `tf.data.Dataset`, or a `compress.Split`; labels are not used.
        samples: how many are used; arrays are sampled at random, streams give their first ones.
        batch_size: samples that are computed at once.
        damping, act_order: see `round_by_gptq`.
        seed: chooses samples; one seed, one result.

    Returns:
        What was rounded, in order, with the error summed over outputs, and the quantized layers that are rounded to
        nearest instead, with the reason.

    Raises:
        UsageError: no layer can be rounded so, or an option is out of range.
        DataError: there are no samples, values are not finite, or a layer sees nothing but zeros.
    """
    graph, tasks, skipped = plan_gptq(model)
    run = StepwiseRun(graph, batches_for(graph, take_samples(data, samples, seed), batch_size))
    by_layer = {id(task.layer): task for task in tasks}
    hessians: dict[int, Hessian] = {}
    rounded: list[RoundedLayer] = []
    is_new = False
    with track("round by GPTQ", len(tasks)) as advance:
        for node in graph.nodes:
            if task := by_layer.get(id(node.operation)):
                matrix = matrix_of(task.layer.layer)
                hessian = hessians.setdefault(id(task), _new_hessian(task, matrix))
                for inputs in run.inputs(node):
                    hessian.update(matrix.rows(inputs))
                if node is task.calls[-1]:
                    changed, result = _round(task, matrix, hessians.pop(id(task)), damping, act_order)
                    is_new |= changed
                    rounded.append(result)
                    advance(note=task.path)
            run.keep(node, run.outputs(node))
    if is_new:
        drop_functions(model)
    return rounded, skipped


def plan_gptq(model: keras.Model) -> tuple[Graph, list[RoundingTask], list[Skipped]]:
    """Return the graph of a fake-quantized model, the layers that GPTQ can round, and the others with the reason.

    Raises:
        UsageError: there is no layer that it can round.
    """
    return plan_rounding(model, "GPTQ", _refuse)


def _round(
    task: RoundingTask, matrix: LayerMatrix, hessian: Hessian, damping: float, act_order: bool
) -> tuple[bool, RoundedLayer]:
    """Round one kernel; return whether the layer's format changed, and what was reached."""
    form, kernel = task.form, weight_values(task.layer, task.weight)
    scale = search_scale(kernel, form)
    flat = matrix.flatten(kernel)
    steps = np.broadcast_to(matrix.flatten(scale), (matrix.flatten(scale).shape[0], flat.shape[1]))
    values, _ = round_by_gptq(
        flat, hessian, form.bits, form.group_size, scale=steps, damping=damping, act_order=act_order, keep_zeros=True
    )
    products = hessian.mean_products()
    errors = [
        float(output_error(flat - each, products).sum())
        for each in (values, round_matrix(flat, steps, form.bits, form.group_size))
    ]
    is_new = task.layer.set_rounding(task.weight, matrix.restore(values, kernel.shape), scale)
    return is_new, RoundedLayer(task.path, *errors)


def _new_hessian(task: RoundingTask, matrix: LayerMatrix) -> Hessian:
    shape = task.layer.weight_variable(task.weight).shape
    return Hessian(int(np.prod([shape[axis] for axis in matrix.order[: matrix.summed]])), task.path)


def _refuse(layer: QuantizedLayer) -> str | None:
    matrix = matrix_of(layer.layer)
    if matrix is None:
        return f"is no matrix product that GPTQ knows: {type(layer.layer).__name__}"
    (form,) = layer.formats.values()
    is_grouped_matrix = matrix.summed == 1 and form.axis in (None, matrix.order[0])
    return None if form.group_size is None or is_grouped_matrix else "has groups along an axis that is not its input"
