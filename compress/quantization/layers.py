"""The two layers of a fake-quantized model: `FakeQuant` on activations and `QuantizedLayer` around layers with weights.

Both compute in float32 whatever the dtype policy, and a model that holds them is saved and loaded as any
other (import this module first). Jacob et al. 2018, arXiv:1712.05877; learned scales: arXiv:1902.08153.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from compress.errors import DataError, ModelError, UsageError
from compress.models.walking import path_inside
from compress.quantization.arithmetic import (
    activation_scale,
    fake_quantize_activation,
    fake_quantize_weight,
    learned_scale,
    nudged_range,
    quantize_weight,
    round_to_float,
    weights_that_round_to,
)
from compress.quantization.stored import StoredWeight
from compress.quantization.weight_format import WeightFormat

Ranges = Literal["moving", "frozen", "learned"]


@keras.saving.register_keras_serializable(package="bmcompress")
class FakeQuant(keras.layers.Layer):
    """Rounds a tensor to the integer grid of one range; what files turn into a quantize and dequantize pair.

    Until a range is known (`is_calibrated`) tensors pass unchanged. The Python attributes `enabled` and `ranges`
    are read when Keras traces a function: set them before `compile` and before the first `predict`.

    Args:
        bits: 2 to 8, or 16.
        symmetric: the zero point is 0.
        ranges: `"moving"`: the exponential moving average of each training batch's least and greatest value, which
            the first batch starts; `"frozen"`: as set; `"learned"`: trained (LSQ) once it is set.
        momentum: weight of the past in the moving average, at least 0 and less than 1.
        dynamic: the range is that of the tensor at hand; there are no variables.
        shared_axes: axes along which numbers share a dynamic range; `None` means all, the batch included.
        fixed_range: `(minimum, maximum)` that never changes, as of a softmax; there are no variables.
        enabled: `False` makes the layer the identity.

    Raises:
        UsageError: a value outside of what is said above.
    """

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = False,
        ranges: Ranges = "moving",
        momentum: float = 0.9,
        dynamic: bool = False,
        shared_axes: Sequence[int] | None = None,
        fixed_range: tuple[float, float] | None = None,
        enabled: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**{**kwargs, "autocast": False})
        if type(bits) is not int or bits not in (*range(2, 9), 16):
            raise UsageError(f"expected 2 to 8 or 16 bits for activations. Received: bits={bits!r}")
        if ranges not in ("moving", "frozen", "learned"):
            raise UsageError(f"expected ranges moving, frozen or learned. Received: ranges={ranges!r}")
        if not 0 <= momentum < 1:
            raise UsageError(f"expected momentum at least 0 and less than 1. Received: momentum={momentum!r}")
        if dynamic and fixed_range is not None:
            raise UsageError(f"expected dynamic or fixed_range, not both. Received: fixed_range={fixed_range}")
        if shared_axes is not None and not dynamic:
            raise UsageError(f"expected shared_axes with dynamic=True alone. Received: shared_axes={shared_axes}")
        self.bits = bits
        self.symmetric = bool(symmetric)
        self.ranges = ranges
        self.momentum = float(momentum)
        self.dynamic = bool(dynamic)
        self.shared_axes = None if shared_axes is None else tuple(shared_axes)
        self.fixed_range = None if fixed_range is None else _require_range(*fixed_range)
        self.enabled = enabled
        self.supports_masking = True
        self._has_variables = not dynamic and fixed_range is None
        if self._has_variables:  # scalars: they need no input shape, so a range can be set at once
            kinds = {"shape": (), "initializer": "zeros", "autocast": False}
            trained = ranges == "learned"
            self.minimum = self.add_weight(name="minimum", dtype="float32", trainable=trained, **kinds)
            self.maximum = self.add_weight(name="maximum", dtype="float32", trainable=trained, **kinds)
            self.seen = self.add_weight(name="seen", dtype="int32", trainable=False, **kinds)
        self.built = True

    def build(self, input_shape: Any = None) -> None:
        self.built = True

    @property
    def is_calibrated(self) -> bool:
        """Whether the range is known: set, observed, fixed or dynamic."""
        return not self._has_variables or int(ops.convert_to_numpy(self.seen)) > 0

    def set_range(self, minimum: float, maximum: float) -> None:
        """Set the range, which also makes the layer calibrated.

        Raises:
            DataError: not two finite numbers in order.
            UsageError: the layer's range is dynamic or fixed.
        """
        if not self._has_variables:
            raise UsageError(f"expected a layer with a range of its own. Received: {self.name!r}, dynamic or fixed")
        minimum, maximum = _require_range(minimum, maximum, self.name)
        self.minimum.assign(minimum)
        self.maximum.assign(maximum)
        self.seen.assign(ops.maximum(self.seen, 1))

    def current_range(self) -> tuple[float, float]:
        """Return the least and greatest real value of the integer grid, which always includes 0.

        Raises:
            ModelError: the range is dynamic, or the layer is not calibrated.
        """
        low, high = nudged_range(*self._known_range(), self.bits, self.symmetric)
        return float(low), float(high)

    def scale_and_zero_point(self) -> tuple[float, int]:
        """Return the scale, a float32 value, and the zero point for signed integers.

        Raises:
            ModelError: the range is dynamic, or the layer is not calibrated.
        """
        scale, zero_point = activation_scale(*self._known_range(), self.bits, self.symmetric)
        return float(scale), int(zero_point)

    def call(self, x: Any, training: bool | None = None) -> Any:
        dtype = keras.backend.standardize_dtype(x.dtype)
        if not self.enabled or "float" not in dtype:
            return x
        value = ops.cast(x, "float32")
        if not self._has_variables:
            return ops.cast(self._quantize(value, *self._range_of(value), training), dtype)
        if self.ranges == "moving" and training:
            return ops.cast(self._quantize(value, *self._observe(value), training), dtype)
        minimum, maximum, seen = (ops.convert_to_tensor(v) for v in (self.minimum, self.maximum, self.seen))
        # Not `where`, which costs more than quantization itself.
        quantized = ops.cond(seen > 0, lambda: self._quantize(value, minimum, maximum, training), lambda: value)
        return ops.cast(quantized, dtype)

    def compute_output_spec(self, x: Any, training: bool | None = None) -> keras.KerasTensor:
        return keras.KerasTensor(x.shape, x.dtype, sparse=False)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        names = ("bits", "symmetric", "ranges", "momentum", "dynamic", "enabled")
        config = {name: getattr(self, name) for name in names}
        lists = {name: getattr(self, name) for name in ("fixed_range", "shared_axes")}
        config |= {name: None if value is None else list(value) for name, value in lists.items()}
        return {**super().get_config(), **config}

    def _quantize(self, value: Any, minimum: Any, maximum: Any, training: bool | None) -> Any:
        learned = self.ranges == "learned" and self._has_variables
        return fake_quantize_activation(
            value,
            minimum,
            maximum,
            self.bits,
            self.symmetric,
            learned=learned,
            fused=bool(training) and self.shared_axes is None,
            masked=self._has_variables and self.ranges != "moving",
        )

    def _range_of(self, value: Any) -> tuple[Any, Any]:
        if self.fixed_range is not None:
            return self.fixed_range
        value = ops.stop_gradient(value)
        options = {"axis": self.shared_axes, "keepdims": self.shared_axes is not None}
        return ops.min(value, **options), ops.max(value, **options)

    def _observe(self, value: Any) -> tuple[Any, Any]:
        """Move the range towards that of `value` and return it; a batch with NaN or infinity is not counted."""
        value = ops.stop_gradient(value)
        low, high = ops.min(value), ops.max(value)
        finite = ops.isfinite(high - low)
        seen = ops.convert_to_tensor(self.seen)
        # At a first batch the past, which is 0, has no weight.
        share = ops.where(seen > 0, 1.0 - self.momentum, 1.0)
        moved = []
        for variable, batch in ((self.minimum, low), (self.maximum, high)):
            old = ops.convert_to_tensor(variable)
            new = ops.where(finite, old + share * (batch - old), old)
            variable.assign(new)
            moved.append(new)
        self.seen.assign(seen + ops.cast(finite, "int32"))
        return moved[0], moved[1]

    def _known_range(self) -> tuple[np.ndarray, np.ndarray]:
        if self.dynamic or not self.is_calibrated:
            state = "dynamic" if self.dynamic else "not calibrated"
            raise ModelError(
                f"expected a known range. Received: {state} at {self.name!r}",
                "Calibrate the model with data that reaches this layer, or train it first.",
            )
        ends = self.fixed_range or (ops.convert_to_numpy(self.minimum), ops.convert_to_numpy(self.maximum))
        return np.asarray(ends[0], "float32"), np.asarray(ends[1], "float32")


@dataclass
class _Variables:
    """The quantized weights of a layer, and the scales of some, by weight name; `held` are constants meanwhile."""

    weights: dict[str, keras.Variable]
    scales: dict[str, keras.Variable]
    held: dict[str, np.ndarray]


@keras.saving.register_keras_serializable(package="bmcompress")
class QuantizedLayer(keras.layers.Wrapper):
    """Runs any built layer with some of its weights on their integer grid; gradients go to the float weights.

    The wrapper has the name, the variables and the masks of the layer inside. Constraints, regularizers, added
    losses, random generators and statistics of that layer work as they did.

    Args:
        layer: a built layer.
        weights: formats by weight name as `weight_names` gives them, or their `get_config`.
        path: path of the layer in the model, for reports and files, such as `"encoder/conv1"`; default is its name.

    Raises:
        UsageError: the layer is not built, or `weights` names a weight that it does not have or that is not float.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        weights: Mapping[str, WeightFormat | Mapping[str, Any]],
        path: str | None = None,
        **kwargs: Any,
    ):
        if not layer.built:
            raise UsageError(
                f"expected a built layer. Received: {layer.name!r} of class {type(layer).__name__}",
                "Call the layer once, or give it build() and get_build_config().",
            )
        # A mixed policy would hand over weights that are cast before they are quantized, even without `autocast`.
        super().__init__(layer, **{"name": layer.name, **kwargs, "dtype": "float32", "autocast": False})
        self.path_in_model = path or layer.name
        self.formats = {
            name: each if isinstance(each, WeightFormat) else WeightFormat.from_config(each)
            for name, each in weights.items()
        }
        self.supports_masking = layer.supports_masking
        # Behind an attribute that Keras does not look into: it would save the variables inside a second time.
        self._inside = _Variables(_select_weights(layer, self.formats), {}, {})
        for name, each in self.formats.items():
            if each.has_variable:
                self._inside.scales[name] = self._add_scale(name, each)
        self.built = True

    def build(self, input_shape: Any = None) -> None:
        self.built = True

    def get_build_config(self) -> None:
        """Return nothing: the layer inside is built by its own configuration."""

    def call(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        quantized = {id(variable): name for name, variable in self._inside.weights.items()}
        # Every variable is handed over, not just the quantized ones: JAX traces what the scope returns.
        mapping = [
            (v, self._fake_quantize(quantized[id(v)]) if id(v) in quantized else v.value) for v in self.layer.variables
        ]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            before = dict(scope.state_mapping)
            outputs = self.layer(x, *args, **kwargs)
        for loss in scope.losses:
            self.add_loss(loss)
        for variable in self.layer.non_trainable_variables:  # seeds and moving statistics
            value = scope.get_current_value(variable)
            if value is not None and value is not before[id(variable)]:
                variable.assign(value)
        return outputs

    def compute_output_spec(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.layer.compute_output_spec(x, *args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return self.layer.compute_mask(inputs, previous_mask)

    def get_config(self) -> dict[str, Any]:
        formats = {name: each.get_config() for name, each in self.formats.items()}
        return {**super().get_config(), "weights": formats, "path": self.path_in_model}

    def stored_weights(self) -> list[StoredWeight]:
        """Return each weight as files are to hold it; `dequantize()` is bit for bit what the layer computes with.

        Raises:
            UsageError: a weight is NaN or infinite.
        """
        return [self._stored(name) for name in self._inside.weights]

    def scales(self) -> dict[str, np.ndarray]:
        """Return the scales that the integer weights have now, by weight name.

        Raises:
            UsageError: a weight is NaN or infinite.
        """
        return {name: self._stored(name).scale for name, each in self.formats.items() if each.dtype == "int"}

    def set_scales(self, scales: Mapping[str, np.ndarray]) -> None:
        """Set the scales of weights whose format keeps them in a variable, by weight name."""
        for name, scale in scales.items():
            self._inside.scales[name].assign(scale)

    @contextmanager
    def hold_scales(self, scales: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Compute with constant scales, in a third of the operations; a function traced meanwhile keeps them."""
        self._inside.held = dict(scales)
        try:
            yield
        finally:
            self._inside.held = {}

    def weight_variable(self, name: str) -> keras.Variable:
        """Return the float variable behind the weight `name` of `formats`."""
        return self._inside.weights[name]

    def set_rounding(self, name: str, values: np.ndarray, scale: np.ndarray) -> bool:
        """Round the weight `name` to `values`, which lie on the grid of `scale`, from now on.

        The float weights move no more than it takes for them to round so: training, or a layer that goes back to float,
        goes on from them. Where the format derives other scales from them, all integer weights of the layer get
        `"stored"` ones, and `True` is returned: drop the functions that Keras has traced of the model.
        """
        each, variable = self.formats[name], self._inside.weights[name]
        sharing = (each.bits, each.group_size, each.axis)
        variable.assign(weights_that_round_to(values, _to_float32(variable), scale, *sharing))
        is_new = not (name in self._inside.scales or np.array_equal(self._stored(name).scale, scale))
        if is_new:  # all at once, so that the variables have the order in which a saved layer makes them
            for other in [other for other, old in self.formats.items() if old.dtype == "int"]:
                found = self._stored(other).scale
                self.formats[other] = replace(self.formats[other], scale="stored")
                self._inside.scales[other] = self._add_scale(other, self.formats[other])
                self._inside.scales[other].assign(found)
        if name in self._inside.scales:
            self._inside.scales[name].assign(scale)
        return is_new

    def _add_scale(self, name: str, each: WeightFormat) -> keras.Variable:
        start = learned_scale(
            _to_float32(self._inside.weights[name]), each.channel_axes, each.bits, each.group_size, each.axis
        )
        return self.add_weight(
            name=f"{name.replace(':', '_')}_scale",
            shape=start.shape,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(start, dtype),
            dtype="float32",
            trainable=each.scale == "learned",
            autocast=False,
        )

    def _fake_quantize(self, name: str) -> Any:
        each, variable = self.formats[name], self._inside.weights[name]
        value = ops.cast(variable.value, "float32")
        if each.dtype != "int":
            value = round_to_float(value, each.dtype)
        elif name in self._inside.held:
            value = fake_quantize_weight(
                value, each.channel_axes, each.bits, each.group_size, each.axis, scale=self._inside.held[name]
            )
        else:
            value = fake_quantize_weight(
                value,
                each.channel_axes,
                each.bits,
                each.group_size,
                each.axis,
                scale=self._inside.scales[name].value if name in self._inside.scales else None,
                learned=each.scale == "learned",
            )
        return ops.cast(value, variable.dtype)

    def _stored(self, name: str) -> StoredWeight:
        each, array = self.formats[name], _to_float32(self._inside.weights[name])
        path = f"{self.path_in_model}/{path_inside(self._inside.weights[name], self.layer)}"
        if each.dtype != "int":
            values = round_to_float(array, each.dtype).astype("float16" if each.dtype == "float16" else "float32")
            return StoredWeight(path, self.name, values, None, 16, each.dtype)
        scale = _to_float32(self._inside.scales[name]) if name in self._inside.scales else None
        values, scale = quantize_weight(array, each.channel_axes, each.bits, each.group_size, each.axis, scale)
        return StoredWeight(path, self.name, values, scale, each.bits, "int", each.group_size, each.axis)


def weight_names(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Return the weights of a built layer under names that survive saving, in the order of `layer.weights`.

    The name is the variable's own, such as `"kernel"`. Where several have the same name, as in a
    `Bidirectional` or `MultiHeadAttention`, all of them are numbered in order: `"kernel:0"`, `"kernel:1"`.
    Names of sublayers play no part: Keras makes them up anew in every process.
    """
    names = [variable.name for variable in layer.weights]
    found: dict[str, keras.Variable] = {}
    for i, variable in enumerate(layer.weights):
        repeated = names.count(variable.name) > 1
        found[f"{variable.name}:{names[:i].count(variable.name)}" if repeated else variable.name] = variable
    return found


def _select_weights(layer: keras.layers.Layer, formats: Mapping[str, WeightFormat]) -> dict[str, keras.Variable]:
    named = weight_names(layer)
    for name in formats:
        if name not in named or "float" not in keras.backend.standardize_dtype(named[name].dtype):
            raise UsageError(f"expected float weights among {list(named)}. Received: {name!r} of layer {layer.name!r}")
    return {name: named[name] for name in formats}


def _require_range(minimum: float, maximum: float, name: str = "") -> tuple[float, float]:
    low, high = float(minimum), float(maximum)
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        of = f" of {name!r}" if name else ""
        raise DataError(f"expected a finite range{of}, least value first. Received: minimum={low}, maximum={high}")
    return low, high


def _to_float32(variable: keras.Variable) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(variable), "float32")
