"""What operations of Keras 3 are in TensorFlow, for models that are rebuilt in Keras 2: one table.

Its counterpart is `compress.legacy.tf_operations`, by which they come back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def find_function(operation: Any) -> Callable[..., Any] | None:
    """Return the function of TensorFlow that computes what an operation of Keras does, or `None`."""
    make = _table().get(type(operation).__name__)
    return None if make is None else make(operation)


@cache
def activation_functions() -> dict[str, Callable[..., Any]]:
    """Return what activations of Keras 3 that Keras 2 does not have are in TensorFlow, by name."""
    import tensorflow as tf

    def hard_sigmoid(x: Any) -> Any:
        return tf.nn.relu6(x + 3.0) * (1 / 6)

    def hard_silu(x: Any) -> Any:
        return tf.multiply(x, hard_sigmoid(x))

    return {
        "hard_sigmoid": hard_sigmoid,
        "hard_silu": hard_silu,
        "hard_swish": hard_silu,
        "log_softmax": tf.nn.log_softmax,
    }


@cache
def _table() -> dict[str, Callable[[Any], Callable[..., Any]]]:
    """Return, by class, what makes the function from an operation with its options."""
    import tensorflow as tf

    activations = activation_functions()
    plain = {
        "Absolute": tf.abs, "Add": tf.add, "Divide": tf.math.divide, "Exp": tf.exp, "HardSigmoid":
        activations["hard_sigmoid"], "HardSilu": activations["hard_silu"], "Log": tf.math.log, "Matmul": tf.matmul,
        "Maximum": tf.maximum, "Minimum": tf.minimum, "Multiply": tf.multiply, "Negative": tf.negative, "Power": tf.pow,
        "Relu": tf.nn.relu, "Relu6": tf.nn.relu6, "Rsqrt": tf.math.rsqrt, "Selu": tf.nn.selu, "Sigmoid": tf.sigmoid,
        "Silu": tf.nn.silu, "Softplus": tf.nn.softplus, "Sqrt": tf.sqrt, "Square": tf.square, "Subtract": tf.subtract,
        "Tanh": tf.tanh, "TrueDivide": tf.math.truediv,
    }  # fmt: skip
    reductions = {"Max": tf.reduce_max, "Mean": tf.reduce_mean, "Min": tf.reduce_min, "Sum": tf.reduce_sum}
    return {
        **{kind: lambda _, function=function: function for kind, function in plain.items()},
        **{
            kind: lambda op, function=function: lambda x: function(x, axis=op.axis, keepdims=op.keepdims)
            for kind, function in reductions.items()
        },
        "ExpandDims": lambda op: lambda x: tf.expand_dims(x, op.axis),
        "Gelu": lambda op: lambda x: tf.nn.gelu(x, approximate=op.approximate),
        "GetItem": lambda op: lambda x, key: x[key],
        "LeakyRelu": lambda op: lambda x: tf.nn.leaky_relu(x, alpha=op.negative_slope),
        "LogSoftmax": lambda op: lambda x: tf.nn.log_softmax(x, axis=op.axis),
        "Reshape": lambda op: lambda x: tf.reshape(x, op.newshape),
        "Softmax": lambda op: lambda x: tf.nn.softmax(x, axis=op.axis),
        "Squeeze": lambda op: lambda x: tf.squeeze(x, axis=op.axis),
        "Stack": lambda op: lambda xs: tf.stack(xs, axis=op.axis),
        "Transpose": lambda op: lambda x: tf.transpose(x, perm=op.axes),
    }
