"""Batch norm in the layers beside it: the same outputs, and a report of what became of each."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from compress.models.graph import repeat, rewrite_graph, trace_graph
from compress.quantization.folding import fold_batch_norm, fold_graph

RNG = np.random.default_rng(0)


def norm(**options) -> layers.BatchNormalization:
    """A batch norm with weights as after training: gammas of both signs, one variance next to zero."""

    def draw(low, high):
        return keras.initializers.RandomUniform(low, high, seed=int(RNG.integers(1 << 30)))

    return layers.BatchNormalization(
        gamma_initializer=draw(-1.5, 1.5),
        beta_initializer=draw(-1, 1),
        moving_mean_initializer=draw(-1, 1),
        moving_variance_initializer=options.pop("moving_variance_initializer", draw(1e-9, 2)),
        **options,
    )


def samples(model: keras.Model, count: int = 3):
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(count, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]
    return arrays if len(arrays) > 1 else arrays[0]


def same(model: keras.Model, other: keras.Model, tolerance: float = 1e-5) -> bool:
    x = samples(model)
    pairs = zip(keras.tree.flatten(model(x)), keras.tree.flatten(other(x)), strict=True)
    return all(
        np.abs(a - b).max() <= tolerance * max(1, np.abs(a).max())
        for a, b in ((np.array(a), np.array(b)) for a, b in pairs)
    )


def fold(model: keras.Model, **options):
    """Fold, and check the promises that always hold."""
    weights = model.get_weights()
    result = fold_graph(trace_graph(model), **options)
    built = rewrite_graph(result.graph, repeat)
    assert same(model, built)
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    return result, built


def count_norms(model: keras.Model) -> int:
    return sum(isinstance(layer, layers.BatchNormalization) for layer in model.layers)


KINDS = {
    "conv1d": ((7, 3), lambda **o: layers.Conv1D(4, 3, **o)),
    "causal": ((7, 3), lambda **o: layers.Conv1D(4, 3, padding="causal", **o)),
    "conv2d": ((6, 5, 3), lambda **o: layers.Conv2D(4, 3, padding="same", strides=2, **o)),
    "grouped": ((6, 5, 4), lambda **o: layers.Conv2D(6, 3, groups=2, **o)),
    "conv3d": ((4, 4, 4, 2), lambda **o: layers.Conv3D(3, 2, **o)),
    "transposed1d": ((5, 3), lambda **o: layers.Conv1DTranspose(4, 3, strides=2, **o)),
    "transposed2d": ((4, 4, 3), lambda **o: layers.Conv2DTranspose(5, 3, strides=2, padding="same", **o)),
    "transposed3d": ((3, 3, 3, 2), lambda **o: layers.Conv3DTranspose(3, 2, **o)),
    "depthwise1d": ((6, 3), lambda **o: layers.DepthwiseConv1D(3, depth_multiplier=2, **o)),
    "depthwise2d": ((5, 5, 3), lambda **o: layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", **o)),
    "separable1d": ((6, 3), lambda **o: layers.SeparableConv1D(4, 3, **o)),
    "separable2d": ((5, 5, 3), lambda **o: layers.SeparableConv2D(4, 3, depth_multiplier=2, **o)),
    "dense": ((3,), lambda **o: layers.Dense(4, **o)),
    "dense of rank 3": ((5, 3), lambda **o: layers.Dense(4, **o)),
}


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer(kind, use_bias):
    shape, make = KINDS[kind]
    keras.utils.set_random_seed(0)
    layer = make(use_bias=use_bias, bias_initializer="random_normal", name="layer")
    model = keras.Sequential([keras.Input(shape), layer, norm(name="norm")])
    result, built = fold(model)
    assert (result.folded, result.replaced, result.left) == ((("norm", "layer"),), (), ())
    assert count_norms(built) == 0
    assert built.get_layer("layer").bias is not None


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize(
    ("equation", "shape", "bias"),
    [("abc,cde->abde", (4, 2, 6), None), ("abc,cde->abde", (4, 2, 6), "e"), ("abc,cde->abde", (4, 2, 6), "de"),
     ("...c,cd->...d", 6, None), ("...c,cd->...d", 6, "d"), ("abc,cd->abd", (4, 6), "d"), ("abc,bcd->abd", (4, 6), "bd")],
)  # fmt: skip
def test_einsum_dense(equation, shape, bias, axis):
    keras.utils.set_random_seed(0)
    einsum = layers.EinsumDense(equation, shape, bias_axes=bias, bias_initializer="random_normal", name="einsum")
    model = keras.Sequential([keras.Input((4, 3)), einsum, norm(axis=axis, name="norm")])
    result, _ = fold(model, replace=False)
    letters = equation.split("->")[1].replace("...", "bc" if len(model.output_shape) == 4 else "ab")
    takes = letters[axis] in equation.split("->")[0].split(",")[1]
    assert bool(result.folded) == takes
    assert bool(result.left) != takes


@pytest.mark.parametrize(
    "options",
    [
        {"scale": False},
        {"center": False},
        {"scale": False, "center": False},
        {"renorm": True},
        {"synchronized": True},
        {"epsilon": 1e-12},
    ],
)
def test_options_of_batch_norm(options):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, name="dense"), norm(**options)])
    result, built = fold(model)
    assert len(result.folded) == 1
    assert count_norms(built) == 0


def test_numbers_worked_out_by_hand():
    """gamma / sqrt(variance + epsilon) = 2 / sqrt(4) = 1 and -3 / sqrt(1) = -3."""
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(2, use_bias=False), layers.BatchNormalization(epsilon=1.0)]
    )
    model.set_weights(
        [
            np.array([[1.0, 2.0], [3.0, 4.0]]),
            np.array([2.0, -3.0]),
            np.array([10.0, 20.0]),
            np.array([5.0, 1.0]),
            np.array([3.0, 0.0]),
        ]
    )
    kernel, bias = fold_batch_norm(model).get_weights()
    assert kernel.tolist() == [[1.0, -6.0], [3.0, -12.0]]
    assert bias.tolist() == [5.0, 23.0]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8), st.floats(-8, 8), st.floats(0, 1e4)), min_size=3, max_size=3)
)
def test_any_statistics(rows):
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(3, kernel_initializer="ones"), layers.BatchNormalization()]
    )
    model.layers[-1].set_weights(list(np.array(rows, "float32").T))
    assert same(model, fold_batch_norm(model), 1e-4)  # Keras' own float32 cancels at means far above the deviation


def test_activation_between_becomes_a_convolution_that_keeps_the_name():
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3, activation="relu"), norm(name="norm"), layers.ReLU()]
    )
    result, built = fold(model)
    assert result.replaced == ("norm",)
    assert type(built.get_layer("norm")) is layers.DepthwiseConv2D
    result, built = fold(model, replace=False)
    assert [(each.path, each.reason[:11]) for each in result.left] == [("norm", "follows the")]
    assert count_norms(built) == 1


def test_rank_3_and_what_no_convolution_can_do():
    sequence = keras.Sequential([keras.Input((6, 2)), norm(name="norm"), layers.ReLU()])
    result, built = fold(sequence)
    assert type(built.get_layer("norm")) is layers.DepthwiseConv1D
    assert not result.left
    for model in (
        keras.Sequential([keras.Input((6,)), norm(name="norm"), layers.ReLU()]),  # rank 2
        keras.Sequential([keras.Input((6, 5, 2)), norm(name="norm", axis=1)]),  # channels first
        keras.Sequential([keras.Input((6, 2)), layers.Masking(), norm(name="norm")]),  # hands on a mask
    ):
        result, built = fold(model)
        assert [each.path for each in result.left] == ["norm"]
        assert count_norms(built) == 1


def test_before_dense_and_valid_convolutions_it_folds_forward():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), norm(name="n1"), layers.Conv2D(4, 3, groups=1, use_bias=False, activation="relu", name="conv"),
         norm(name="n2"), layers.DepthwiseConv2D(3, depth_multiplier=2, activation="relu", name="depthwise"),
         norm(name="n3"), layers.AveragePooling2D(2), layers.Flatten(), layers.Dropout(0.5), layers.Dense(3, name="dense")]
    )  # fmt: skip
    result, built = fold(model)
    assert result.folded == (("n1", "conv"), ("n2", "depthwise"), ("n3", "dense"))
    assert [layer.name for layer in built.layers if layer.weights] == ["conv", "depthwise", "dense"]


@pytest.mark.parametrize("layer", [lambda: layers.Conv2D(4, 3, padding="same"), lambda: layers.Conv2DTranspose(4, 3)])
def test_not_forward_where_borders_differ(layer):
    model = keras.Sequential([keras.Input((5, 5, 3)), norm(name="norm"), layer()])
    result, _ = fold(model)
    assert (result.folded, result.replaced) == ((), ("norm",))


def test_grouped_convolution_takes_a_batch_norm_before_it():
    model = keras.Sequential([keras.Input((5, 5, 4)), norm(name="norm"), layers.Conv2D(6, 3, groups=2, name="conv")])
    assert fold(model)[0].folded == (("norm", "conv"),)


def test_calls_between_and_batch_norms_in_a_row():
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3, name="conv"), layers.Dropout(0.5), norm(name="n1"),
         layers.AveragePooling2D(2), norm(name="n2"), layers.GlobalAveragePooling2D(), norm(name="n3")]
    )  # fmt: skip
    assert fold(model)[0].folded == (("n1", "conv"), ("n2", "conv"), ("n3", "conv"))
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(3, 3), layers.MaxPooling2D(), norm(name="norm")])
    assert fold(model)[0].replaced == ("norm",)  # a negative gamma would turn the maximum into the minimum
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(3, 3), layers.ZeroPadding2D(), norm(name="norm")])
    assert fold(model)[0].replaced == ("norm",)


def test_convolution_with_two_readers_stays():
    x = keras.Input((5, 5, 2))
    y = layers.Conv2D(2, 1, name="conv")(x)
    model = keras.Model(x, [layers.Add()([norm(name="norm")(y), y])])
    assert fold(model)[0].replaced == ("norm",)
    model = keras.Model(x, [norm(name="seen")(y), y])  # the convolution is an output too
    assert fold(model)[0].replaced == ("seen",)


def test_channels_first():
    """TensorFlow cannot run it on a CPU, so the weights are compared with those of channels last."""
    folded = []
    for layout, shape, axis in (("channels_last", (6, 6, 2), -1), ("channels_first", (2, 6, 6), 1)):
        keras.utils.set_random_seed(0)
        steps = [layers.Conv2D(3, 3, data_format=layout), layers.BatchNormalization(axis=axis), layers.ReLU()]
        model = keras.Sequential(
            [
                keras.Input(shape),
                *steps,
                layers.DepthwiseConv2D(3, data_format=layout),
                layers.BatchNormalization(axis=axis),
            ]
        )
        rng = np.random.default_rng(0)
        model.set_weights([rng.uniform(0.1, 1, value.shape) for value in model.get_weights()])
        folded.append(fold_batch_norm(model).get_weights())
    assert [value.shape for value in folded[0]] == [(3, 3, 2, 3), (3,), (3, 3, 3, 1), (3,)]
    assert all(np.array_equal(a, b) for a, b in zip(*folded, strict=True))


def test_inputs_by_keyword():
    x = keras.Input((5, 5, 2))
    model = keras.Model(x, norm(name="norm")(inputs=layers.Conv2D(2, 1, name="conv")(inputs=x)))
    assert fold(model)[0].folded == (("norm", "conv"),)
    model = keras.Model(x, norm(name="norm")(inputs=x, training=False))
    assert fold(model)[0].replaced == ("norm",)


def test_batch_norm_with_two_readers_folds():
    x = keras.Input((5, 5, 2))
    y = norm(name="norm")(layers.Conv2D(2, 1, name="conv")(x))
    model = keras.Model(x, {"sum": y + layers.ReLU()(y), "norm": y})
    assert fold(model)[0].folded == (("norm", "conv"),)


def test_shared_layers():
    a, b = keras.Input((5, 5, 2)), keras.Input((5, 5, 2))
    conv, one, two = layers.Conv2D(3, 3, name="conv"), norm(name="one"), norm(name="two")
    different = keras.Model([a, b], [one(conv(a)), two(conv(b))])
    result, built = fold(different)  # the weights stay shared
    assert set(result.replaced) == {"one", "two"}
    assert built.count_params() == conv.count_params() + 2 * (3 + 3)
    both = keras.Model([a, b], [one(conv(a)), one(conv(b))])
    result, built = fold(both)
    assert result.folded == (("one", "conv"), ("one", "conv"))
    assert built.count_params() == conv.count_params()
    other = layers.Conv2D(3, 3, name="other")
    result, built = fold(keras.Model([a, b], [one(conv(a)), one(other(b))]))
    assert set(result.folded) == {("one", "conv"), ("one", "other")}
    mixed = keras.Model([a, b], [one(conv(a)), one(layers.Conv2D(3, 3, activation="relu")(b))])
    result, built = fold(mixed)
    assert (result.folded, result.replaced) == ((("one", "conv"),), ("one",))


def test_batch_norm_that_normalizes_by_the_batch_stays():
    x = keras.Input((3,))
    model = keras.Model(x, norm(name="norm")(layers.Dense(4)(x), training=True))
    result = fold_graph(trace_graph(model))
    assert [each.reason for each in result.left] == ["is called with training=True"]
    x = keras.Input((5, 5, 3))
    shared = norm(name="shared")
    result = fold_graph(trace_graph(keras.Model(x, shared(shared(x, training=True)))))
    assert [each.path for each in result.left] == ["shared", "shared"]
    assert count_norms(rewrite_graph(result.graph, repeat)) == 1


def test_nested_models_keep_paths_and_frozen_layers_stay_frozen():
    inner = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3, name="conv"), norm(name="norm")], name="encoder"
    )
    inner.trainable = False
    x = keras.Input((8, 8, 1))
    model = keras.Model(x, layers.Conv2D(3, 1, name="head")(inner(layers.Conv2D(2, 3, name="stem")(x), training=False)))
    result, built = fold(model)
    assert result.folded == (("encoder/norm", "encoder/conv"),)
    assert [layer.trainable for layer in built.layers if layer.weights] == [True, False, True]
    assert len(built.trainable_weights) == 4


def test_users_model_is_untouched_and_the_result_reloads(tmp_path):
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3, use_bias=False, kernel_constraint="max_norm"), norm()]
    )
    folded = fold_batch_norm(model)
    assert folded.layers[-1] is not model.layers[0]
    assert count_norms(model) == 1
    assert folded.layers[-1].kernel_constraint is None
    folded.save(tmp_path / "folded.keras")
    assert same(keras.models.load_model(tmp_path / "folded.keras"), folded, 0)


def test_options_that_are_objects_of_the_user():
    class Half(keras.regularizers.Regularizer):
        def __call__(self, weights):
            return keras.ops.sum(weights) / 2

        def get_config(self):
            return {}

    regularizer = Half()
    model = keras.Sequential([keras.Input((2,)), layers.Dense(3, kernel_regularizer=regularizer), norm()])
    result = fold_graph(trace_graph(model))
    assert result.graph.nodes[-1].operation.kernel_regularizer is regularizer


def test_what_is_not_known_is_left():
    class Scaled(layers.Conv2D):
        def call(self, inputs):
            return super().call(inputs) ** 2

    model = keras.Sequential([keras.Input((5, 5, 2)), Scaled(2, 3, name="mine"), norm(name="norm")])
    assert fold(model)[0].replaced == ("norm",)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3), norm(name="norm")])
    model.layers[-1].gamma.assign([np.nan, 1, 1])
    assert [each.reason for each in fold_graph(trace_graph(model)).left] == ["has weights that are not finite"]


def test_mixed_precision():
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3, dtype="mixed_bfloat16", name="conv"), norm(dtype="mixed_bfloat16")]
    )
    result = fold_graph(trace_graph(model))
    assert len(result.folded) == 1
    built = rewrite_graph(result.graph, repeat)
    assert built.get_layer("conv").compute_dtype == "bfloat16"
    assert same(model, built, 0.03)
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3, dtype="mixed_bfloat16"), norm(dtype="float32", name="norm")]
    )
    assert fold_graph(trace_graph(model)).replaced == ("norm",)
