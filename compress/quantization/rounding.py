"""AdaRound: learn for each weight whether to round up or down, from a few hundred unlabelled inputs.

Nagel et al. 2020, arXiv:2004.10568. A soft rounding in [0, 1] per weight is trained so that the layer's outputs stay
those of the float layer, and is pushed to 0 or 1 by a regulariser that sharpens over the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from compress.errors import DataError, UsageError
from compress.progress import track
from compress.quantization.arithmetic import exact_scale
from compress.quantization.matrix import largest_integer

Forward = Callable[[Any, Any], Any]
"""`forward(kernel, inputs) -> outputs`: a layer run on a batch with another kernel; in `keras.ops`, without dropout."""

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1  # a sigmoid stretched beyond [0, 1] and clipped reaches 0 and 1
_WARM_UP = 0.2  # the part of the run without regulariser
_SHARP_FROM, _SHARP_TO = 20.0, 2.0  # exponent of the regulariser: from nearly flat to a tent


@dataclass(frozen=True, eq=False)
class LearnedRounding:
    """A rounded kernel and what it costs.

    Args:
        kernel: float32 on the grid of the scale, of the shape of the float kernel.
        error: mean squared error of the layer's outputs on all inputs.
        nearest_error: the same with every weight rounded to nearest; never smaller.
    """

    kernel: np.ndarray
    error: float
    nearest_error: float


def learn_rounding(
    forward: Forward,
    kernel: np.ndarray,
    scale: np.ndarray,
    inputs: Any,
    targets: Any,
    *,
    bits: int = 8,
    steps: int = 500,
    batch_size: int = 32,
    learning_rate: float = 2e-2,
    strength: float = 10.0,
    seed: int = 0,
    name: str = "layer",
) -> LearnedRounding:
    """Return `kernel` rounded so that `forward(kernel, inputs)` comes closest to `targets`.

    Weights that lie on the grid already stay, so zeros of an earlier pruning stay zero. Nearest rounding is returned
    where learning does not beat it on all `inputs`. The layer behind `forward` is not
    changed if `forward` swaps the kernel in with `keras.StatelessScope(state_mapping=[(variable, kernel)])`.

    Args:
        forward: the layer as a function of its kernel and a batch of inputs; include the activation that is fused to
            it, whose flat parts forgive errors.
        kernel: float weights.
        scale: float32 that broadcasts against `kernel`; for groups, `arithmetic.spread_scale` repeats them.
        inputs: array, or nested arrays, with samples first: what the layer gets in the *quantized* model so far, so
            that its rounding also makes up for the errors of the layers before it.
        targets: array, or nested arrays: the outputs of the float layer in the *float* model.
        bits: of the grid; weights beyond its ends are clipped.
        steps: training steps; 0 only rounds to nearest and measures.
        batch_size: samples per step.
        learning_rate: of Adam.
        strength: of the regulariser, relative to the output error of nearest rounding.
        seed: of the order of samples; one seed, one result.
        name: what progress and errors call the layer.

    Raises:
        DataError: no samples, or inputs and targets differ in number or are not finite.
        UsageError: an option is out of range.
    """
    kernel, scale = np.asarray(kernel, "float32"), exact_scale(np.asarray(scale, "float32"))
    samples = _count_samples(inputs, targets, name)
    _check_options(steps, batch_size, learning_rate)
    top = largest_integer(bits)
    nearest = (np.clip(np.rint(kernel / scale), -top, top) * scale).astype("float32")
    nearest_error = _output_error(forward, nearest, inputs, targets, batch_size)
    if not np.isfinite(nearest_error):
        raise DataError(f"inputs, targets and outputs of layer {name!r} must be finite. Received: NaN or infinity")
    if steps == 0 or nearest_error == 0:
        return LearnedRounding(nearest, nearest_error, nearest_error)
    model = _SoftRounding(forward, kernel, scale, top, _Schedule(steps, strength, 1 / nearest_error))
    model.compile(optimizer=keras.optimizers.Adam(learning_rate))
    with track(f"learn rounding of {name}", total=steps) as advance:
        for indices in _batches(samples, min(batch_size, samples), steps, seed):
            model.train_on_batch({"inputs": _take(inputs, indices), "targets": _take(targets, indices)})
            advance()
    learned = model.rounded_kernel()
    error = _output_error(forward, learned, inputs, targets, batch_size)
    if error < nearest_error:
        return LearnedRounding(learned, error, nearest_error)
    return LearnedRounding(nearest, nearest_error, nearest_error)


@dataclass(frozen=True)
class _Schedule:
    steps: int
    strength: float
    error_weight: float


class _SoftRounding(keras.Model):
    """The float kernel with a learned rounding, trained by `train_on_batch` on every backend."""

    def __init__(self, forward: Forward, kernel: np.ndarray, scale: np.ndarray, top: int, schedule: _Schedule):
        super().__init__(name="soft_rounding", dtype="float32")
        self._forward = forward
        self._scale, self._top, self._schedule = scale, top, schedule
        self._floor = np.floor(kernel / scale)
        fraction = kernel / scale - self._floor
        self._live = (fraction > 0).astype("float32")
        stretched = (fraction - _STRETCH_LOW) / (_STRETCH_HIGH - _STRETCH_LOW)
        logits = np.log(stretched / (1 - stretched)).astype("float32")
        self.logits = self.add_weight(shape=kernel.shape, name="logits", initializer="zeros")
        self.logits.assign(logits)
        self.step = self.add_weight(shape=(), name="step", initializer="zeros", trainable=False)
        self.built = True

    def call(self, batch: dict[str, Any], training: bool = False) -> Any:
        up = self._soft_up()
        integers = ops.clip(ops.convert_to_tensor(self._floor) + up, -self._top, self._top)
        kernel = integers * ops.convert_to_tensor(self._scale)
        loss = _mean_squared_error(self._forward(kernel, batch["inputs"]), batch["targets"])
        self.add_loss(loss * self._schedule.error_weight + self._undecided(up))
        self.step.assign_add(1.0)
        return loss

    def _soft_up(self) -> Any:
        stretched = ops.sigmoid(self.logits) * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW
        return ops.clip(stretched, 0.0, 1.0) * ops.convert_to_tensor(self._live)

    def _undecided(self, up: Any) -> Any:
        """Return the regulariser: 1 per weight that is halfway, 0 per weight that is decided; none while warming up."""
        progress = self.step / self._schedule.steps
        late = ops.clip((progress - _WARM_UP) / (1 - _WARM_UP), 0.0, 1.0)
        exponent = _SHARP_TO + 0.5 * (_SHARP_FROM - _SHARP_TO) * (1 + ops.cos(late * np.pi))
        distance = ops.clip(ops.abs(2 * up - 1), 1e-6, 1.0)
        active = ops.cast(progress >= _WARM_UP, "float32")
        return (
            active
            * self._schedule.strength
            * ops.mean((1 - ops.power(distance, exponent)) * ops.convert_to_tensor(self._live))
        )

    def rounded_kernel(self) -> np.ndarray:
        up = ops.convert_to_numpy(self._soft_up()) >= 0.5
        return (np.clip(self._floor + up, -self._top, self._top) * self._scale).astype("float32")


def _mean_squared_error(outputs: Any, targets: Any) -> Any:
    outputs, targets = keras.tree.flatten(outputs), keras.tree.flatten(targets)
    errors = [
        ops.mean(ops.square(ops.cast(o, "float32") - ops.cast(t, "float32")))
        for o, t in zip(outputs, targets, strict=True)
    ]
    return sum(errors[1:], errors[0])


def _output_error(forward: Forward, kernel: np.ndarray, inputs: Any, targets: Any, batch_size: int) -> float:
    samples = len(keras.tree.flatten(targets)[0])
    total = 0.0
    for begin in range(0, samples, batch_size):
        indices = np.arange(begin, min(begin + batch_size, samples))
        outputs = forward(ops.convert_to_tensor(kernel), _take(inputs, indices))
        error = _mean_squared_error(outputs, _take(targets, indices))
        total += len(indices) * float(ops.convert_to_numpy(error))
    return total / samples


def _take(arrays: Any, indices: np.ndarray) -> Any:
    def take(array: Any) -> Any:
        values = np.asarray(array)[indices]
        return ops.convert_to_tensor(values.astype("float32") if values.dtype == "float64" else values)

    return keras.tree.map_structure(take, arrays)


def _batches(samples: int, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield indices of full batches, shuffled anew when too few samples are left for one."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, int)
    for _ in range(steps):
        if len(order) < batch_size:
            order = rng.permutation(samples)
        batch, order = order[:batch_size], order[batch_size:]
        yield batch


def _count_samples(inputs: Any, targets: Any, name: str) -> int:
    counts = {len(array) for array in keras.tree.flatten((inputs, targets))}
    if len(counts) != 1 or counts == {0}:
        raise DataError(
            f"layer {name!r} must have as many inputs as targets, at least one. Received: {sorted(counts)} samples"
        )
    return counts.pop()


def _check_options(steps: int, batch_size: int, learning_rate: float) -> None:
    if steps < 0 or batch_size < 1 or not 0 < learning_rate < float("inf"):
        raise UsageError(
            "expected steps of at least 0, batch_size of at least 1 and learning_rate above 0. "
            f"Received: steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}"
        )
