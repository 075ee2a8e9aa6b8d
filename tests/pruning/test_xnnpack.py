"""Which layers LiteRT's sparse kernels accept, on nets of which one thing at a time is wrong."""

from __future__ import annotations

import keras
import pytest
from keras import layers

from compress.errors import UsageError
from compress.pruning.xnnpack import lint_xnnpack, select_xnnpack


def net(*, stem=None, body=(), activation="relu6", top=None, channels=3) -> keras.Model:
    x = keras.Input((32, 32, channels))
    y = layers.ZeroPadding2D(1)(x) if stem is None else x
    y = (stem or layers.Conv2D(8, 3, strides=2, use_bias=False, name="stem"))(y)
    y = layers.ReLU(6.0)(layers.BatchNormalization()(y))
    for layer in body:
        y = layer(y)
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = layers.Conv2D(16, 1, use_bias=False, name="expand")(y)
    y = layers.Activation(activation)(layers.BatchNormalization()(y))
    z = layers.DepthwiseConv2D(5, strides=2, name="strided")(layers.ZeroPadding2D(2)(y))
    y = layers.Conv2D(8, 1, name="project")(z)
    y = layers.Add()([y, layers.Conv2D(8, 1, name="side")(z)])
    y = (top or layers.GlobalAveragePooling2D())(y)
    return keras.Model(x, layers.Dense(4, name="head")(layers.Flatten()(y)))


def verdicts(model) -> dict[str, str]:
    return {verdict.path: "" if verdict.qualifies else verdict.reason for verdict in lint_xnnpack(model)}


def test_every_pointwise_convolution_of_a_fitting_net_qualifies():
    found = verdicts(net())
    assert [path for path, reason in found.items() if not reason] == ["expand", "project", "side"]
    assert found["stem"] == "is a convolution of 3x3 and stride 2, not of 1x1 and stride 1"
    assert found["depthwise"] == "is a DepthwiseConv2D; sparse kernels are for 1x1 convolutions"
    assert found["head"].startswith("is a Dense")
    assert select_xnnpack(net()) == ("expand", "project", "side")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stem": layers.Conv2D(8, 3, strides=2, padding="same", name="stem")}, "'stem', which is not padded by 1"),
        ({"stem": layers.Conv2D(8, 5, strides=2, name="stem")}, "'stem', which is a convolution of 5x5 and stride 2"),
        ({"channels": 1}, "'stem', which is a convolution of 3x3 and stride 2"),
        ({"body": (layers.MaxPooling2D(),)}, "which is a MaxPooling2D"),
        ({"body": (layers.Conv2D(8, 3, padding="same", name="full"),)}, "'full', which is a convolution of 3x3"),
        ({"body": (layers.ZeroPadding2D(((0, 1), (0, 1))),)}, "which pads what no convolution alone reads"),
        (
            {"body": (layers.DepthwiseConv2D(3, strides=2, padding="same", name="s"),)},
            "is not padded by 1 on all sides",
        ),
        ({"body": (layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),)}, "dilation or a depth multiplier"),
        ({"activation": "gelu"}, "has the activation gelu"),
        ({"top": layers.Reshape((-1,))}, "is a Reshape"),
        ({"body": (layers.ReLU(3.0),)}, "is a ReLU that takes several operators in LiteRT"),
        ({"body": (layers.ReLU(6.0, negative_slope=0.1),)}, "is a ReLU that takes several operators"),
        ({"body": (layers.ReLU(threshold=0.5),)}, "is a ReLU that takes several operators"),
        ({"body": (layers.ELU(alpha=2.0),)}, "is an ELU that takes several operators"),
        ({"body": (keras.ops.tanh,)}, "is a Tanh"),
        ({"body": (lambda y: y + 1.0,)}, "is an Add of a constant"),
    ],
    ids=[
        *("same", "five", "grey", "pooling", "full", "pads", "strided", "multiplier", "gelu", "top"),
        *("bound", "slope", "threshold", "alpha", "operation", "constant"),
    ],
)
def test_one_layer_keeps_its_part_of_the_net_dense(options, reason):
    found = verdicts(net(**options))
    assert found["expand"].startswith("its part of the net")
    assert reason in found["expand"]
    with pytest.raises(UsageError, match="expand: its part of the net"):
        select_xnnpack(net(**options))


def test_a_part_must_begin_with_its_entry_and_may_be_nested():
    x = keras.Input((8, 8, 8))
    inner = keras.Sequential([keras.Input((8, 8, 8)), layers.Conv2D(4, 1, name="conv")], name="inner")
    model = keras.Model(x, layers.GlobalAveragePooling2D()(inner(x)))
    assert verdicts(model) == {
        "inner/conv": "its part of the net begins with an input of the model at 'inner/conv', "
        "not with a 3x3 convolution of stride 2"
    }


@pytest.mark.parametrize("behind", [layers.Dropout(0.2), layers.ReLU(), layers.Activation("softmax")])
def test_what_follows_pooling_does_not_matter(behind):
    model = net(top=keras.Sequential([layers.GlobalAveragePooling2D(), behind]))
    assert select_xnnpack(model) == ("expand", "project", "side")


def test_pooling_inside_may_be_read_inside_only():
    x = keras.Input((32, 32, 3))
    y = layers.Conv2D(8, 3, strides=2, name="stem")(layers.ZeroPadding2D(1)(x))
    pooled = layers.GlobalAveragePooling2D(keepdims=True)(y)
    y = layers.Multiply()([y, layers.Conv2D(8, 1, activation="sigmoid", name="excite")(pooled)])
    y = layers.GlobalAveragePooling2D()(y)
    assert select_xnnpack(keras.Model(x, y)) == ("excite",)
    found = verdicts(keras.Model(x, [y, layers.Flatten()(pooled)]))
    assert "is read by" in found["excite"]
    assert "is a Flatten" in found["excite"]


def test_mobilenet_of_keras_does_not_qualify_as_it_is():
    model = keras.applications.MobileNetV2((64, 64, 3), alpha=0.35, weights=None, classes=4)
    found = verdicts(model)
    assert all(found.values())
    assert "'Conv1', which is not padded by 1 on all sides" in found["expanded_conv_project"]


def test_calls_that_are_known_to_python_alone():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Own()
    model(keras.ops.zeros((1, 3)))
    (reason,) = verdicts(model).values()
    assert reason.startswith("the calls of the model cannot be traced")
