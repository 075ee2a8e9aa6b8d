"""Deploy models by hand, as the quantization package makes them: activations pass one fake-quantization op each, and
weights lie on the grid that their `StoredWeight` says."""

from __future__ import annotations

import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from compress.deploy.conversion import Places
from compress.deploy.litert import LiteRtRuntime
from compress.deploy.signature import read_signature
from compress.deploy.tflite_conversion import to_tflite
from compress.deploy.tflite_flatbuffer import INTEGER_TYPES, Op, TfliteFile, Type, read_grid
from compress.deploy.tracing import write_saved_model
from compress.quantization.stored import StoredWeight

L = keras.layers

CHANNEL_AXES = {
    L.Conv2D: (3,), L.DepthwiseConv2D: (2, 3), L.Dense: (1,), L.Conv1D: (2,), L.Conv2DTranspose: (2,), L.LSTM: (1,),
    L.GRU: (1,), L.Embedding: (0,), L.Conv3D: (4,),
}  # fmt: skip


class Marker(L.Layer):
    """One activation quantizer: 8 bits around the range from `low` to `high`, or 16 bits, symmetric.

    Zero is a whole number of steps from the ends of the range, so nothing is left to be rounded to that.
    """

    def __init__(self, low, high, bits=8, **options):
        super().__init__(**options)
        self.bits = bits
        if bits == 16:
            self.step, first = max(-low / 32768, high / 32767), -32768
        else:
            self.step = (high - low) / 255
            first = -round(-low / self.step)
        self.low, self.high = first * self.step, (first + 2**bits - 1) * self.step

    def call(self, x):
        return tf.quantization.fake_quant_with_min_max_vars(x, self.low, self.high, num_bits=self.bits)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)  # never sparse, which products with a number are said to be


def marker(bits=8):
    """Return `mark(x, low, high)`; without bits it leaves `x` alone."""
    return lambda x, low=-2.0, high=2.0: x if bits is None else Marker(low, high, bits)(x)


def snap(values, axes, bits=8, shrink=1.0):
    """Return integers and the scales of `values` per index of `axes`; `shrink` makes scales other than absmax / 127."""
    limit = 2 ** (bits - 1) - 1
    reduced = tuple(i for i in range(values.ndim) if i not in axes)
    scale = (np.abs(values).max(reduced, keepdims=True) * shrink / limit).astype("float32")
    return np.clip(np.rint(values / scale), -limit, limit).astype("int8"), scale


def quantize(model, bits=8, shrink=1.0, axes=None, steps=0.02 / 127):
    """Put the weights of `model` on their grids and return them as they are to be stored."""
    stored = []
    generator = np.random.default_rng(1)
    for layer in model.layers:
        kind = (axes or {}).get(layer.name) or CHANNEL_AXES.get(type(layer))
        if kind is None:
            continue
        for variable in layer.trainable_variables:
            if variable.name == "bias":
                variable.assign(np.rint(generator.normal(0, 0.1 / steps, variable.shape)) * steps)
                continue
            chosen = bits[layer.name] if isinstance(bits, dict) else bits
            values, scale = snap(np.asarray(variable), kind, chosen, shrink)
            stored.append(StoredWeight(variable.path, layer.name, values, scale, chosen))
            variable.assign(stored[-1].dequantize())
    return stored


def places(model):
    return Places([layer.name for layer in model.layers], model.name)


def to_float_file(model, single=True):
    """Return the float `.tflite` file of a model, for one sample or for any number."""
    signature = read_signature(model)
    with tempfile.TemporaryDirectory() as folder:
        saved = write_saved_model(model, signature, Path(folder) / "saved")
        endpoints = saved.endpoints[::-1] if single else saved.endpoints
        names = [info.name for info in signature.inputs]
        return to_tflite(str(saved.folder), endpoints, names, saved.outputs, places(model))[0]


def run(content, folder, arrays):
    path = Path(folder) / "m.tflite"
    path.write_bytes(content)
    return LiteRtRuntime(path, threads=1).run(arrays)


def output_grids(content):
    """Return `(scale, zero_point)` of the integers that each output is or is made of, `None` where it is in float."""
    file = TfliteFile(content)
    graph, codes = file.graphs[0], [*INTEGER_TYPES, Type.UINT8]
    back = {int(op.outputs[0]): int(op.inputs[0]) for op in graph.operators if file.code(op) == Op.DEQUANTIZE}
    tensors = [graph.tensors[back.get(int(index), int(index))] for index in graph.outputs]
    return [read_grid(tensor) if tensor.type in codes else None for tensor in tensors]


def samples(model, count=100, seed=0):
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, 10, (count, *tensor.shape[1:])).astype("int32")
        if "int" in tensor.dtype
        else generator.normal(size=(count, *tensor.shape[1:])).astype("float32")
        for tensor in model.inputs
    ]


def outputs(model, arrays):
    return [np.asarray(value) for value in keras.tree.flatten(model(arrays if len(arrays) > 1 else arrays[0]))]


def convolutional(bits=8):
    """Every weighted layer of images, one shared tensor, pooling and a head, without a float operator in between."""
    mark, keras_input = marker(bits), keras.Input((8, 8, 3), name="image")
    x = mark(keras_input, -3, 3)
    skip = x = mark(L.Conv2D(8, 3, padding="same", activation="relu", name="conv")(x), 0, 2)
    x = mark(L.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(x), 0, 2)
    x = mark(L.Conv2D(8, 1, name="pointwise")(x), -2, 2.2)
    x = L.MaxPooling2D(name="pool")(mark(L.Add(name="add")([skip, x]), -1.5, 3.1))
    x = mark(L.Conv2DTranspose(4, 2, strides=2, name="transposed")(x), -1, 1.3)
    x = mark(L.GlobalAveragePooling2D(name="mean")(x), -0.4, 0.5)
    x = mark(L.Dense(7, activation="relu", name="hidden")(x), 0, 1.3)
    x = mark(L.Dense(5, name="head")(x), -1.2, 1.2)
    return keras.Model(keras_input, mark(L.Softmax(name="softmax")(x), *unit(bits)), name="net")


def unit(bits):
    """Return the range of a probability, whose grid the kernels fix."""
    return (0, 255 / 256) if bits != 16 else (-1, 32767 / 32768)


def attention(bits=8):
    """Self-attention of two heads written out, as the planner expands it."""
    mark, keras_input = marker(bits), keras.Input((6, 8), name="x")
    x = mark(keras_input, -3, 3)
    dense = {
        name: L.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="de", name=name)
        for name in ("query", "key", "value")
    }
    query, key, value = (mark(layer(x), -3, 3) for layer in dense.values())
    scores = mark(keras.ops.einsum("aecd,abcd->acbe", key, query), -4, 4)
    weights = mark(L.Softmax(name="softmax")(scores), *unit(bits))
    mixed = mark(keras.ops.einsum("acbe,aecd->abcd", weights, value), -2, 2)
    x = mark(x + mark(L.EinsumDense("abcd,cde->abe", (None, 8), bias_axes="e", name="out")(mixed)), -3, 3)
    return keras.Model(keras_input, mark(L.Dense(4, name="head")(x), -3, 3), name="net")


ATTENTION_AXES = {"query": (1, 2), "key": (1, 2), "value": (1, 2), "out": (2,)}


def recurrent(bits=8, kind=L.LSTM):
    mark, keras_input = marker(bits), keras.Input((6, 4), name="x")
    x = mark(L.Dense(4, name="before")(mark(keras_input)))
    x = mark(kind(5, name="recurrent")(x), -1, 1)
    return keras.Model(keras_input, mark(L.Dense(3, name="head")(x)), name="net")


def several(bits=8):
    """A shared layer that is called on two grids, a concatenation of two more, and two outputs."""
    mark, left, right = marker(bits), keras.Input((6,), name="left"), keras.Input((6,), name="right")
    shared = L.Dense(5, activation="relu", name="shared")
    joined = [mark(shared(mark(left)), 0, 2), mark(shared(mark(right, -3, 3)), 0, 2.5)]
    x = mark(L.Concatenate(name="join")(joined), 0, 2.5)
    first = mark(L.Dense(3, name="first")(x))
    second = mark(L.Activation("sigmoid", name="sigmoid")(mark(L.Dense(2, name="second")(x))), *unit(bits))
    return keras.Model([left, right], [first, second], name="net")
