"""What functions of TensorFlow that were called on symbolic tensors of Keras 2 are in Keras 3: one table.

Keras 2 saved such calls as layers of class `TFOpLambda` and `SlicingOpLambda` that name the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

CLASSES = frozenset(("TFOpLambda", "SlicingOpLambda"))
_KERAS2_HARD_SIGMOID = 0.2, 0.5


def hard_sigmoid(x: Any) -> Any:
    """Return what Keras 2 called so: `clip(0.2 x + 0.5, 0, 1)`."""
    slope, offset = _KERAS2_HARD_SIGMOID
    return ops.clip(x * slope + offset, 0.0, 1.0)


def _named(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Return `function` with arguments that are called `names`, in order, or given in that order."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, *(kwargs.pop(name) for name in names[len(args) :] if name in kwargs), **kwargs)

    return call


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda input_tensor, axis=None, keepdims=False: function(input_tensor, axis=_axes(axis), keepdims=keepdims)


def _axes(axis: Any) -> Any:
    return tuple(axis) if isinstance(axis, list) else axis


def _matmul(a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False) -> Any:
    a = ops.swapaxes(a, -1, -2) if transpose_a else a
    return ops.matmul(a, ops.swapaxes(b, -1, -2) if transpose_b else b)


def _slice(tensor: Any, slice_spec: Any) -> Any:
    parts = [_part(item) for item in (slice_spec if isinstance(slice_spec, list) else [slice_spec])]
    return tensor[tuple(parts)]


def _part(item: Any) -> Any:
    if isinstance(item, dict) and ("start" in item or "stop" in item):
        return slice(item.get("start"), item.get("stop"), item.get("step"))
    if isinstance(item, dict):  # {"value": "..."} or an ellipsis
        return Ellipsis
    return item


def _transpose(a: Any, perm: Any = None, name: str | None = None, conjugate: bool = False) -> Any:
    return ops.transpose(a, axes=_axes(perm))


def _squeeze(input: Any, axis: Any = None) -> Any:
    return ops.squeeze(input, _axes(axis))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "__operators__.add": lambda x, y: x + y,
    "__operators__.radd": lambda x, y: y + x,
    "__operators__.getitem": _slice,
    "math.add": lambda x, y: x + y,
    "math.subtract": lambda x, y: x - y,
    "math.multiply": lambda x, y: x * y,
    "math.truediv": lambda x, y: x / y,
    "math.divide": lambda x, y: x / y,
    "math.maximum": _named(ops.maximum, "x", "y"),
    "math.minimum": _named(ops.minimum, "x", "y"),
    "math.pow": _named(ops.power, "x", "y"),
    "math.negative": _named(ops.negative, "x"),
    "math.abs": _named(ops.absolute, "x"),
    "math.square": _named(ops.square, "x"),
    "math.sqrt": _named(ops.sqrt, "x"),
    "math.rsqrt": _named(ops.rsqrt, "x"),
    "math.exp": _named(ops.exp, "x"),
    "math.log": _named(ops.log, "x"),
    "math.tanh": _named(ops.tanh, "x"),
    "math.sigmoid": _named(ops.sigmoid, "x"),
    "math.reduce_mean": _reduce(ops.mean),
    "math.reduce_sum": _reduce(ops.sum),
    "math.reduce_max": _reduce(ops.max),
    "math.reduce_min": _reduce(ops.min),
    "nn.relu": _named(ops.relu, "features"),
    "nn.relu6": _named(ops.relu6, "features"),
    "nn.elu": _named(ops.elu, "features"),
    "nn.selu": _named(ops.selu, "features"),
    "nn.gelu": lambda features, approximate=False: ops.gelu(features, approximate=approximate),
    "nn.silu": lambda features, beta=1.0: ops.silu(features * beta) / beta if beta != 1.0 else ops.silu(features),
    "nn.leaky_relu": lambda features, alpha=0.2: ops.leaky_relu(features, negative_slope=alpha),
    "nn.softmax": lambda logits, axis=-1: ops.softmax(logits, axis=-1 if axis is None else axis),
    "nn.log_softmax": lambda logits, axis=-1: ops.log_softmax(logits, axis=-1 if axis is None else axis),
    "nn.softplus": _named(ops.softplus, "features"),
    "math.softplus": _named(ops.softplus, "features"),
    "clip_by_value": _named(ops.clip, "t", "clip_value_min", "clip_value_max"),
    "linalg.matmul": _matmul,
    "concat": lambda values, axis: ops.concatenate(values, axis=axis),
    "stack": lambda values, axis=0: ops.stack(values, axis=axis),
    "reshape": lambda tensor, shape: ops.reshape(tensor, tuple(shape)),
    "transpose": _transpose,
    "compat.v1.transpose": _transpose,
    "expand_dims": _named(ops.expand_dims, "input", "axis"),
    "squeeze": _squeeze,
    "compat.v1.squeeze": _squeeze,
    "cast": _named(ops.cast, "x", "dtype"),
    "identity": lambda input: input,
}
"""Name of a function below `tf.` -> what computes the same; arguments have the names that TensorFlow gives them."""
