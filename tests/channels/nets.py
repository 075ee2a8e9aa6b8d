"""Small nets with everything that couples channels, with batch-norm statistics as after a training."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import layers as L
from keras import ops


def randomise(model: keras.Model, seed: int = 0) -> keras.Model:
    """Give every bias and every other vector of weights random values: zeros and ones would hide a wrong slice."""
    random = np.random.default_rng(seed)
    for variable in model.variables:
        if "float" not in variable.dtype or (len(variable.shape) > 1 and variable.name != "bias"):
            continue
        low, high = (0.5, 1.5) if "variance" in variable.name or "gamma" in variable.name else (-0.6, 0.6)
        variable.assign(random.uniform(low, high, variable.shape))
    return model


def conv(x, filters, size=3, **options):
    x = L.Conv2D(filters, size, padding="same", use_bias=False, **options)(x)
    return L.ReLU()(L.BatchNormalization()(x))


def residual():
    x = keras.Input((8, 8, 3))
    y = conv(x, 16)
    y = L.Add()([y, conv(conv(y, 24), 16)])
    z = conv(y, 32, strides=2)
    y = L.ReLU()(L.Add()([z, L.Conv2D(32, 1, strides=2)(y)]))
    return keras.Model(x, L.Dense(5)(L.GlobalAveragePooling2D()(y)))


def squeeze_excite():
    x = keras.Input((8, 8, 3))
    y = conv(x, 16)
    gate = L.GlobalAveragePooling2D(keepdims=True)(y)
    gate = L.Conv2D(16, 1, activation="sigmoid")(L.Conv2D(8, 1, activation="relu")(gate))
    y = L.Multiply()([y, gate])
    return keras.Model(x, L.Dense(3)(L.Flatten()(L.MaxPooling2D()(y))))


def u_net():
    x = keras.Input((16, 16, 3))
    a = conv(x, 8)
    b = conv(L.MaxPooling2D()(a), 16)
    c = conv(L.MaxPooling2D()(b), 32)
    y = L.Conv2DTranspose(16, 2, strides=2)(c)
    y = conv(L.Concatenate()([y, b]), 16)
    y = conv(L.Concatenate()([L.UpSampling2D()(y), a]), 8)
    return keras.Model(x, L.Conv2D(2, 1)(L.ZeroPadding2D()(L.Cropping2D()(y))))


def mobile():
    x = keras.Input((8, 8, 3))
    y = L.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="relu6")(conv(x, 16))
    y = L.SeparableConv2D(24, 3, depth_multiplier=2)(y)
    y = L.PReLU(shared_axes=[1, 2])(y)
    y = L.Conv2D(24, 3, groups=24, padding="same")(y)
    y = L.Conv2D(48, 3, groups=24, padding="same")(y)
    return keras.Model(x, L.Dense(3)(L.GlobalMaxPooling2D()(conv(y, 16, 1))))


def joined():
    """Concatenations that are summed, as in DenseNet and NASNet."""
    x = keras.Input((8, 8, 3))
    a, b = conv(x, 8), conv(x, 16)
    y = L.Add()([L.Concatenate()([a, b]), conv(x, 24)])
    y = L.Concatenate()([y, a])
    return keras.Model(x, L.Dense(3)(L.Flatten()(y)))


def two_towers():
    tower = keras.Sequential(
        [keras.Input((12,)), L.Dense(16, activation="relu", name="hidden"), L.Dense(8, name="code")], name="tower"
    )
    left, right = keras.Input((12,), name="left"), keras.Input((12,), name="right")
    a, b = tower(left), tower(right)
    y = L.Concatenate()([a * b, L.Subtract()([a, b])])
    return keras.Model({"left": left, "right": right}, L.Dense(1)(L.Dense(16, activation="tanh")(y)))


def recurrent():
    x = keras.Input((6,), dtype="int32")
    y = L.Embedding(20, 16)(x)
    y = L.LSTM(16, return_sequences=True)(y)
    y = L.GRU(24, return_sequences=True)(L.Conv1D(16, 3, padding="same", activation="relu")(y))
    y = L.GRU(8, reset_after=False, return_sequences=True)(y)
    y = L.SimpleRNN(16)(L.Bidirectional(L.LSTM(8, return_sequences=True))(y))
    return keras.Model(x, L.Dense(4)(y))


def attention(norm=L.LayerNormalization):
    x = keras.Input((8, 12))
    y = L.Dense(16)(x)
    z = norm()(y)
    y = L.Add()([y, L.MultiHeadAttention(8, 4)(z, z)])
    z = L.EinsumDense("abc,cd->abd", output_shape=(None, 32), bias_axes="d", activation="gelu")(norm()(y))
    y = L.Add()([y, L.Dense(16)(z)])
    return keras.Model(x, L.Dense(3)(L.GlobalAveragePooling1D()(y)))


def without_norm():
    return attention(lambda: L.Activation("tanh"))


def operations():
    """What people write with `keras.ops` and operators."""
    x = keras.Input((8, 8, 3))
    y = L.Conv2D(16, 3, padding="same")(x) * 2.0 + 0.5
    y = ops.relu(y) + ops.transpose(ops.transpose(y, (0, 3, 1, 2)), (0, 2, 3, 1))
    y = ops.concatenate([y, ops.sigmoid(y)], axis=-1)
    y = ops.reshape(ops.mean(y, axis=(1, 2), keepdims=True), (-1, 32))
    z = L.Dense(16)(L.Reshape((32,))(y))
    return keras.Model(x, L.Dense(2)(ops.maximum(z, 0.1 * z)))


def one_and_three():
    x = keras.Input((6, 6, 6, 2))
    y = L.Conv3D(16, 3, activation="elu")(x)
    y = L.Conv3DTranspose(8, 2)(L.BatchNormalization()(y))
    y = L.Reshape((125, 8))(y)
    y = L.Conv1DTranspose(16, 3)(L.DepthwiseConv1D(3)(L.SpatialDropout1D(0.2)(y)))
    return keras.Model(x, L.Dense(3)(L.Permute((2, 1))(L.AveragePooling1D(125)(y))))


def detection():
    x = keras.Input((16, 16, 3))
    a = conv(x, 16, strides=2)
    b = conv(a, 32, strides=2)
    heads = {}
    for name, y in (("fine", a), ("coarse", b)):
        z = conv(y, 16)
        heads[f"{name}_box"] = L.Reshape((-1, 4))(L.Conv2D(8, 1, name=f"{name}_box")(z))
        heads[f"{name}_class"] = L.Conv2D(3, 1, activation="softmax", name=f"{name}_class")(z)
    return keras.Model(x, heads)


class Unknown(L.Layer):
    """A layer of a user's own, which mixes neighbouring channels."""

    def call(self, x):
        return x + ops.roll(x, 1, axis=-1)


def with_unknown():
    x = keras.Input((8, 8, 3))
    y = Unknown(name="own")(conv(x, 16))
    y = conv(conv(y, 16), 16)
    shuffled = L.Reshape((8, 8, 16))(L.Permute((1, 2, 4, 3))(L.Reshape((8, 8, 4, 4))(conv(y, 16))))
    return keras.Model(x, L.Dense(3)(L.GlobalAveragePooling2D()(conv(shuffled, 16))))


NETS: dict[str, Callable[[], keras.Model]] = {
    function.__name__: function
    for function in (
        residual,
        squeeze_excite,
        u_net,
        mobile,
        joined,
        two_towers,
        recurrent,
        attention,
        without_norm,
        operations,
        one_and_three,
        detection,
        with_unknown,
    )
}
