"""AdaRound for a whole model: the rounding of each layer is learned on what the layers before it give once rounded.

Nagel et al. 2020, arXiv:2004.10568. One sweep over the calls, with the float and the quantized value of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from compress.models.graph import Graph, Node
from compress.models.walking import Skipped
from compress.progress import track
from compress.quantization.arithmetic import spread_scale
from compress.quantization.refinement import RoundedLayer, RoundingTask, float_operation, plan_rounding, with_weight
from compress.quantization.rounding import learn_rounding
from compress.quantization.rules import kind_of
from compress.quantization.scale_search import drop_functions, search_scale, weight_values
from compress.quantization.stepwise import StepwiseRun, batches_for, take_samples


def learn_roundings(
    model: keras.Model,
    data: Any,
    *,
    samples: int = 256,
    steps: int = 500,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[list[RoundedLayer], list[Skipped]]:
    """Learn for each weight of a fake-quantized model whether to round up or down, in place.

    Each layer's outputs, behind the ReLU that is fused to it, come as close as they can to those of the float layer in
    the float model. Calibrate first: activations that are quantized are so while later layers learn. Float weights
    move no more than rounding needs; zeros stay zero. Samples are in memory with the outputs that later calls read.

    Args:
        model: what `fake_quantize` returned.
        data: inputs as `fit` takes them, a `tf.data.Dataset`, or a `compress.Split`; labels are not used.
        samples: how many are used; arrays are sampled at random, streams give their first ones.
        steps: training steps for each layer.
        batch_size: samples of a step.
        seed: chooses samples and their order; one seed, one result.

    Returns:
        What was learned, in order, and the quantized layers that are rounded to nearest instead, with the reason.

    Raises:
        UsageError: no layer can be rounded so, or an option is out of range.
        DataError: there are no samples, or values are not finite.
    """
    graph, tasks, skipped = plan_adaround(model)
    batches = batches_for(graph, take_samples(data, samples, seed), batch_size)
    sweep = _Sweep(graph, tasks, {"steps": steps, "batch_size": batch_size, "seed": seed})
    rounded = sweep.run(batches)
    if sweep.has_new_formats:
        drop_functions(model)
    return rounded, skipped


def plan_adaround(model: keras.Model) -> tuple[Graph, list[RoundingTask], list[Skipped]]:
    """Return the graph of a fake-quantized model, the layers that AdaRound can round, and the others with the reason.

    Raises:
        UsageError: there is no layer that it can round.
    """
    return plan_rounding(model, "AdaRound", lambda layer: None)


class _Sweep:
    def __init__(self, graph: Graph, tasks: list[RoundingTask], options: dict[str, int]):
        self._graph, self._options = graph, options
        self._tasks = {id(task.layer): task for task in tasks}
        self._seen: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.has_new_formats = False

    def run(self, batches: list[list[Any]]) -> list[RoundedLayer]:
        exact, quantized = StepwiseRun(self._graph, batches), StepwiseRun(self._graph, batches)
        rounded: list[RoundedLayer] = []
        with track("learn roundings", len(self._tasks)) as advance:
            for node in self._graph.nodes:
                outputs = exact.outputs(node, float_operation(node.operation))
                task = self._tasks.get(id(node.operation))
                if task:
                    self._remember(task, node, quantized.inputs(node), outputs)
                    if node is task.calls[-1]:
                        rounded.append(self._learn(task))
                        advance(note=task.path)
                exact.keep(node, outputs)
                quantized.keep(node, quantized.outputs(node))
        return rounded

    def _remember(self, task: RoundingTask, node: Node, inputs: list[Any], outputs: list[Any]) -> None:
        """Add a call to what a layer learns from, if its inputs have the shape of those of the first call."""
        activation = self._fused_activation(node)
        inputs, targets = _join(inputs), _join([activation(output) for output in outputs])
        seen = self._seen.setdefault(id(task), [])
        if not seen or seen[0][0].shape == inputs.shape:
            seen.append((inputs, targets))

    def _learn(self, task: RoundingTask) -> RoundedLayer:
        layer, form = task.layer, task.form
        kernel = weight_values(layer, task.weight)
        scale = search_scale(kernel, form)
        inputs, targets = (np.concatenate(arrays) for arrays in zip(*self._seen.pop(id(task)), strict=True))
        forward, activation = with_weight(layer, task.weight), self._fused_activation(task.calls[0])
        result = learn_rounding(
            lambda values, x: activation(forward(values, x)),
            kernel,
            spread_scale(scale, kernel.shape, form.group_size, form.axis),
            inputs,
            targets,
            bits=form.bits,
            name=task.path,
            **self._options,
        )
        self.has_new_formats |= layer.set_rounding(task.weight, result.kernel, scale)
        return RoundedLayer(task.path, result.error, result.nearest_error)

    def _fused_activation(self, node: Node) -> Callable[[Any], Any]:
        """Return the ReLU that alone reads the output of a call, or the identity."""
        reader = self._graph.only_consumer(node.output)
        if reader is not None and kind_of(reader) == "relu" and len(reader.args) == 1:
            return lambda x: reader.operation(x, **reader.kwargs)
        return lambda x: x


def _join(batches: list[Any]) -> np.ndarray:
    return np.concatenate([keras.ops.convert_to_numpy(keras.ops.cast(each, "float32")) for each in batches])
