"""Small deploy models made by hand: floats on their grid, one fake-quantization op for each quantized activation."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from compress.quantization.stored import StoredWeight

L, ops = keras.layers, keras.ops


class Marker(L.Layer):
    """One fake-quantization op with a fixed range."""

    def __init__(self, low, high, bits=8, narrow=False, **options):
        super().__init__(**options)
        self.low, self.high, self.bits, self.narrow = float(low), float(high), bits, narrow

    def call(self, x):
        return tf.quantization.fake_quant_with_min_max_vars(x, self.low, self.high, self.bits, self.narrow)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)  # never sparse, which products with a number are said to be


class Builder:
    """Builds a functional model layer by layer, quantizing as it goes on the activations of `samples`."""

    def __init__(self, *samples, bits=8, weight_bits=8, activations=True, group_size=None, dtype="int"):
        self.samples, self.bits, self.weight_bits, self.activations = list(samples), bits, weight_bits, activations
        self.group_size, self.dtype = group_size, dtype
        self.inputs = [
            keras.Input(sample.shape[1:], name=f"x{i}" if len(samples) > 1 else "x", dtype=sample.dtype.name)
            for i, sample in enumerate(samples)
        ]
        self.weights: list[StoredWeight] = []
        self.steps: dict[int, float] = {}
        self._values = {id(tensor): sample for tensor, sample in zip(self.inputs, samples, strict=True)}
        self._kept = []

    def value(self, tensor):
        if id(tensor) not in self._values:
            known = keras.Model(self.inputs, tensor)
            self._values[id(tensor)] = np.asarray(known(self.samples))
            self._kept.append(tensor)  # ids stay unique
        return self._values[id(tensor)]

    def mark(self, x, low=None, high=None):
        """Quantize an activation; the range is that of the samples unless it is given."""
        if not self.activations:
            return x
        values = self.value(x)
        low = min(0.0, float(values.min())) if low is None else low
        high = max(0.0, float(values.max())) if high is None else high
        if self.bits == 16:
            high = max(-low, high)
            step, low = high / 32767, -high
        else:
            step = np.float32(high - low) / np.float32(255)
            zero = round(float(-low / step))
            low, high = -zero * step, (255 - zero) * step
        y = Marker(low, high, self.bits, self.bits == 16, name=f"mark_{len(self.steps)}")(x)
        self.steps[id(y)] = float(step)
        self._kept.append(y)
        return y

    def snap(self, layer, variable, axes, bits=None):
        """Put a variable on its grid, with one scale for each index of `axes`."""
        values = np.asarray(variable)
        if self.dtype != "int":
            halves = np.asarray(keras.ops.cast(keras.ops.cast(values, self.dtype), "float32"))
            weight = StoredWeight(variable.path, layer.name, halves, None, 16, self.dtype)
            variable.assign(weight.dequantize())
            self.weights.append(weight)
            return None
        if self.group_size and values.ndim == 2:
            return self._snap_groups(layer, variable)
        reduced = tuple(axis for axis in range(values.ndim) if axis not in [a % values.ndim for a in axes])
        top = 2 ** ((bits or self.weight_bits) - 1) - 1
        scale = (np.abs(values).max(reduced, keepdims=True) / top).astype("float32")
        scale[scale == 0] = 1
        weight = StoredWeight(
            variable.path, layer.name, np.round(values / scale).astype("int8"), scale, bits or self.weight_bits
        )
        variable.assign(weight.dequantize())
        self.weights.append(weight)
        return scale

    def _snap_groups(self, layer, variable):
        """Put a matrix on its grid, with one scale for each column of `group_size` rows."""
        values, top = np.asarray(variable), 2 ** (self.weight_bits - 1) - 1
        starts = range(0, len(values), self.group_size)
        scale = np.stack([np.abs(values[i : i + self.group_size]).max(0) / top for i in starts]).astype("float32")
        spread = np.repeat(scale, self.group_size, 0)[: len(values)]
        integers = np.round(values / spread).astype("int8")
        weight = StoredWeight(variable.path, layer.name, integers, scale, self.weight_bits, "int", self.group_size, 0)
        variable.assign(weight.dequantize())
        self.weights.append(weight)
        return scale

    def layer(self, layer, x, axes=(-1,), bits=None):
        """Call a layer with one kernel; a layer that was built before keeps its weights."""
        new = not layer.built
        y = layer(x)
        if new:
            kernel = layer.weights[0]
            scale = self.snap(layer, kernel, axes, bits)
            step = self.steps.get(id(x))
            if getattr(layer, "bias", None) is not None:
                bias = np.asarray(np.random.default_rng(7).normal(0, 0.1, layer.bias.shape), "float32")
                if step is not None:
                    grid = np.float32(step) * scale.reshape(bias.shape if scale.size > 1 else (1,) * bias.ndim)
                    bias = (np.round(bias / grid) * grid).astype("float32")
                layer.bias.assign(bias)
        return y

    def model(self, outputs, name="net"):
        return keras.Model(self.inputs, outputs, name=name)


def images(count=64, size=12, channels=3, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (count, size, size, channels)).astype("float32")


def cnn(**options):
    """Convolutions of all kinds, pooling, a sum, concatenation and a classifier."""
    b = Builder(images(), **options)
    x = b.mark(b.inputs[0])
    x = b.mark(b.layer(L.Conv2D(8, 3, padding="same", activation="relu", name="stem"), x))
    y = b.layer(L.DepthwiseConv2D(3, strides=2, padding="same", name="depthwise"), x, axes=(-2, -1))
    y = b.mark(L.ReLU(6.0, name="relu6")(y))
    y = b.mark(b.layer(L.Conv2D(8, 1, name="point"), y))
    z = L.MaxPooling2D(2, name="max")(x)
    x = b.mark(L.ReLU(name="after")(L.Add(name="add")([y, z])))
    x = L.ZeroPadding2D(1, name="pad")(x)
    x = b.mark(b.layer(L.Conv2D(8, 3, activation="relu", name="padded"), x))
    y = b.mark(b.layer(L.Conv2D(4, 3, padding="same", name="branch"), x))
    x = b.mark(L.Concatenate(name="concat")([x, y]))
    x = L.AveragePooling2D(2, name="average")(x)
    x = b.mark(x, *_range(b, x))
    x = b.mark(L.GlobalAveragePooling2D(name="gap")(x))
    x = b.mark(b.layer(L.Dense(10, name="head"), x))
    return b, b.model(b.mark(L.Softmax(name="softmax")(x), 0.0, 255 / 256))


def _range(b, x):
    values = b.value(x)
    return min(0.0, float(values.min())), float(values.max())


def flat_cnn(**options):
    """Pooling, then Flatten into two dense layers."""
    b = Builder(images(), **options)
    x = b.mark(b.inputs[0])
    x = b.mark(b.layer(L.Conv2D(8, 3, activation="relu", name="conv"), x))
    x = L.Flatten(name="flatten")(L.MaxPooling2D(2, name="max")(x))
    x = b.mark(b.layer(L.Dense(16, activation="relu", name="hidden"), x))
    return b, b.model(b.mark(b.layer(L.Dense(5, name="head"), x)))


def conv1d(**options):
    b = Builder(np.random.default_rng(0).normal(0, 1, (64, 20, 4)).astype("float32"), **options)
    x = b.mark(b.inputs[0])
    x = b.mark(b.layer(L.Conv1D(8, 3, padding="same", activation="relu", name="conv"), x))
    x = L.MaxPooling1D(2, name="max")(x)
    x = b.mark(b.layer(L.Conv1D(8, 3, dilation_rate=2, padding="causal", activation="relu", name="causal"), x))
    x = b.mark(b.layer(L.DepthwiseConv1D(3, name="depthwise"), x, axes=(-2, -1)))
    x = b.mark(L.GlobalAveragePooling1D(name="gap")(x))
    return b, b.model(b.mark(b.layer(L.Dense(5, name="head"), x)))


def transposed(**options):
    b = Builder(images(size=6), **options)
    x = b.mark(b.inputs[0])
    x = b.mark(b.layer(L.Conv2D(6, 3, padding="same", activation="relu", name="conv"), x))
    x = b.mark(b.layer(L.Conv2DTranspose(4, 3, strides=2, padding="same", name="up"), x, axes=(-2,)))
    x = L.UpSampling2D(name="nearest")(x)
    return b, b.model(b.mark(b.layer(L.Conv2D(2, 1, name="head"), x)))


def volume(**options):
    b = Builder(np.random.default_rng(0).normal(0, 1, (16, 5, 5, 5, 2)).astype("float32"), **options)
    x = b.mark(b.inputs[0])
    x = b.mark(b.layer(L.Conv3D(4, 3, activation="relu", name="conv"), x))
    return b, b.model(b.mark(b.layer(L.Conv3D(4, 1, name="head"), x)))


def attention(**options):
    """Self-attention out of einsums as MultiHeadAttention computes it, and a feed-forward part with exact GELU."""
    b = Builder(np.random.default_rng(0).normal(0, 1, (32, 6, 16)).astype("float32"), **options)
    x = b.mark(b.inputs[0])
    make = lambda name: L.EinsumDense("abc,cde->abde", (6, 2, 8), bias_axes="de", name=name)  # noqa: E731
    q, k, v = (b.mark(b.layer(make(name), x, axes=(-2, -1))) for name in ("query", "key", "value"))
    q = b.mark(ops.multiply(q, 8**-0.5))
    scores = b.mark(ops.einsum("aecd,abcd->acbe", k, q))
    scores = b.mark(L.Softmax(name="softmax")(scores), 0.0, 255 / 256)
    mixed = b.mark(ops.einsum("acbe,aecd->abcd", scores, v))
    out = b.mark(b.layer(L.EinsumDense("abcd,cde->abe", (6, 16), bias_axes="e", name="output"), mixed, axes=(-1,)))
    x = b.mark(L.Add(name="residual")([x, out]))
    y = b.mark(L.LayerNormalization(name="norm")(x))
    y = b.mark(b.layer(L.Dense(32, name="up"), y))
    y = b.mark(L.Activation("gelu", name="gelu")(y))
    y = b.mark(b.layer(L.Dense(16, name="down"), y))
    x = b.mark(L.Add(name="residual_2")([x, y]))
    x = b.mark(L.GlobalAveragePooling1D(name="gap")(x))
    return b, b.model(b.mark(b.layer(L.Dense(4, name="head"), x)))


def recurrent(kind="LSTM", bidirectional=False, sequences=False, **options):
    b = Builder(np.random.default_rng(0).normal(0, 1, (16, 7, 6)).astype("float32"), **options)
    x = b.mark(b.inputs[0])
    layer = getattr(L, kind)(5, name="rnn", return_sequences=sequences)
    layer = L.Bidirectional(layer, name="both") if bidirectional else layer
    y = layer(x)
    for variable in layer.weights:
        if "kernel" in variable.path:
            b.snap(layer, variable, (-1,))
        else:
            variable.assign(np.random.default_rng(3).normal(0, 0.2, variable.shape))
    x = b.mark(y)
    if sequences:
        x = b.mark(L.GlobalAveragePooling1D(name="gap")(x))
    return b, b.model(b.mark(b.layer(L.Dense(3, name="head"), x)))


def several(**options):
    """Two inputs through one shared layer at different steps, a table, a scaled sum and two outputs."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (32, 6)).astype("float32"), rng.normal(0, 3, (32, 6)).astype("float32")
    b = Builder(first, second, rng.integers(0, 9, (32, 4)).astype("int32"), **options)
    shared = L.Dense(8, activation="relu", use_bias=False, name="shared")
    left, right = (b.mark(b.layer(shared, b.mark(x))) for x in b.inputs[:2])
    table = L.Embedding(9, 8, name="table")
    found = table(b.inputs[2])
    b.snap(table, table.weights[0], ())
    found = b.mark(L.GlobalMaxPooling1D(name="top")(b.mark(found)))
    x = b.mark(L.Add(name="sum")([left, right]))
    x = b.mark(L.Multiply(name="product")([x, found]))
    one = b.mark(b.layer(L.Dense(3, name="one"), x))
    two = b.mark(L.Activation("sigmoid", name="sigmoid")(b.layer(L.Dense(1, name="two"), x)), 0.0, 255 / 256)
    return b, b.model([one, two])


def partly_float(**options):
    """A convolution and a classifier that were left out, between quantized activations."""
    b = Builder(images(size=6), **options)
    x = b.mark(b.inputs[0])
    x = b.mark(b.layer(L.Conv2D(4, 3, activation="relu", name="first"), x))
    x = b.mark(L.Conv2D(4, 3, activation="relu", name="left_out")(x))
    x = b.mark(L.Dense(3, name="float_head")(L.Flatten(name="flatten")(x)))
    return b, b.model(x)


def tiny(activation=None, **options):
    """One dense layer."""
    b = Builder(np.random.default_rng(0).normal(0, 1, (16, 8)).astype("float32"), **options)
    return b, b.model(b.mark(b.layer(L.Dense(4, activation=activation, name="only"), b.mark(b.inputs[0]))))
