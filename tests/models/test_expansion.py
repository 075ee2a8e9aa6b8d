from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from compress.models.expansion import Expansion, expand, expand_graph
from compress.models.graph import copy_graph, repeat, rewrite_graph


@keras.saving.register_keras_serializable(package="expansion")
class Feed(layers.Layer):
    """Two dense layers; held in a list, with names that Keras makes up."""

    def __init__(self, width: int, **options: object):
        super().__init__(**options)
        self.width = width
        self.steps = [
            layers.Dense(2 * width, activation="gelu", dtype=self.dtype_policy),
            layers.Dense(width, dtype=self.dtype_policy),
        ]

    def build(self, input_shape):
        self.steps[0].build(input_shape)
        self.steps[1].build((*input_shape[:-1], 2 * self.width))

    def call(self, inputs):
        for step in self.steps:
            inputs = step(inputs)
        return inputs

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="expansion")
class Block(layers.Layer):
    """A transformer block with a custom layer inside."""

    def __init__(self, width: int, heads: int = 2, rate: float = 0.1, causal: bool = False, **options: object):
        super().__init__(**options)
        self.settings = {"width": width, "heads": heads, "rate": rate, "causal": causal}
        self.attention = layers.MultiHeadAttention(heads, width // heads, name="mha", dtype=self.dtype_policy)
        self.feed = Feed(width, dtype=self.dtype_policy)
        self.norm1, self.norm2 = (layers.LayerNormalization(dtype=self.dtype_policy) for _ in range(2))
        self.dropout = layers.Dropout(rate, dtype=self.dtype_policy)
        self.supports_masking = True

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)
        for part in (self.feed, self.norm1, self.norm2):
            part.build(input_shape)

    def call(self, inputs, training=False):
        mixed = self.attention(inputs, inputs, use_causal_mask=self.settings["causal"])
        x = self.norm1(inputs + self.dropout(mixed, training=training))
        return self.norm2(x + self.feed(x))

    def get_config(self):
        return {**super().get_config(), **self.settings}


@keras.saving.register_keras_serializable(package="expansion")
class Residual(keras.Model):
    """A subclassed model that is used as a layer."""

    def __init__(self, channels: int, **options: object):
        super().__init__(**options)
        self.channels = channels
        self.conv = layers.Conv2D(channels, 3, padding="same", activation="relu", name="conv")
        self.norm = layers.BatchNormalization(name="norm")

    def call(self, inputs, training=None):
        return inputs + self.norm(self.conv(inputs), training=training)

    def get_config(self):
        return {"name": self.name, "channels": self.channels}


@keras.saving.register_keras_serializable(package="expansion")
class Tied(layers.Layer):
    """Reads its embedding twice, once as a layer and once as a matrix."""

    def __init__(self, **options: object):
        super().__init__(**options)
        self.embedding = layers.Embedding(7, 4)

    def build(self, input_shape):
        self.embedding.build(input_shape)

    def call(self, inputs):
        return ops.matmul(self.embedding(inputs), ops.transpose(self.embedding.embeddings))


@keras.saving.register_keras_serializable(package="expansion")
class Shift(layers.Layer):
    """A layer inside and a weight of its own."""

    def __init__(self, **options: object):
        super().__init__(**options)
        self.dense = layers.Dense(3)

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.shift = self.add_weight(shape=(3,), name="shift", initializer="ones")

    def call(self, inputs):
        return self.dense(inputs) + self.shift


@keras.saving.register_keras_serializable(package="expansion")
class Eager(layers.Layer):
    """Looks at values, which symbolic tensors do not have."""

    def __init__(self, **options: object):
        super().__init__(**options)
        self.dense = layers.Dense(3)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        keras.ops.convert_to_numpy(inputs)
        return self.dense(inputs)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 3)


@keras.saving.register_keras_serializable(package="expansion")
class Noisy(layers.Layer):
    """Does one thing more in training."""

    def __init__(self, **options: object):
        super().__init__(**options)
        self.dense = layers.Dense(3)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs, training=None):
        if training:
            inputs = ops.add(inputs, 1.0)
        return self.dense(inputs)


def _randomize(model: keras.Model) -> keras.Model:
    generator = np.random.default_rng(0)
    for variable in model.weights:
        low = 0.5 if "variance" in variable.path or "gamma" in variable.path else -0.5
        variable.assign(generator.uniform(low, 1.0, variable.shape))
    return model


def _values(model: keras.Model) -> object:
    generator = np.random.default_rng(1)

    def draw(tensor: keras.KerasTensor) -> np.ndarray:
        shape = (2, *(size or 6 for size in tensor.shape[1:]))
        if "int" in tensor.dtype:
            return generator.integers(0, 5, shape).astype("int32")
        return generator.normal(size=shape).astype("float32")

    return keras.tree.map_structure(draw, model.input)


def _assert_close(expected: object, received: object, tolerance: float = 1e-6) -> None:
    for pair in zip(keras.tree.flatten(expected), keras.tree.flatten(received), strict=True):
        a, b = (keras.ops.convert_to_numpy(keras.ops.cast(value, "float32")) for value in pair)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(a).max()))


def _check(model: keras.Model, tmp_path=None, tolerance: float = 1e-6) -> Expansion:
    """Expand a copy, and require the same outputs, the same number of trainable weights, and that it can be saved."""
    _randomize(model)
    values = _values(model)
    before = model(values)
    weights = [w.copy() for w in model.get_weights()]
    names = [layer.name for layer in model.layers]
    expansion = expand_graph(copy_graph(model))
    rebuilt = rewrite_graph(expansion.graph, repeat)
    _assert_close(before, rebuilt(values), tolerance)
    _assert_close(before, model(values), 0.0)
    assert names == [layer.name for layer in model.layers]
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert sum(np.size(w) for w in model.trainable_weights) == sum(np.size(w) for w in rebuilt.trainable_weights)
    assert sum(np.size(w) for w in model.weights) == sum(np.size(w) for w in rebuilt.weights)
    paths = [node.path for node in expansion.graph.nodes]
    operations = {id(node.operation) for node in expansion.graph.nodes}
    assert len(set(paths)) == len(operations)
    if tmp_path is not None:
        rebuilt.save(tmp_path / "model.keras")
        _assert_close(before, keras.saving.load_model(tmp_path / "model.keras")(values), tolerance)
    return expansion


def _kinds(expansion: Expansion) -> dict[str, str]:
    return {node.path: node.kind for node in expansion.graph.nodes}


def _single(layer: keras.Operation, shape: tuple[int | None, ...], dtype: str = "float32") -> keras.Model:
    start = keras.Input(shape, dtype=dtype)
    return keras.Model(start, layer(start))


def test_a_transformer_of_custom_layers_is_opened(tmp_path) -> None:
    words = keras.Input((6,), dtype="int32", name="words")
    x = layers.Embedding(9, 8, name="embedding")(words)
    block = Block(8, name="block")
    x = Block(8, causal=True, name="causal")(block(block(x)))
    model = keras.Model(words, layers.Dense(3, activation="softmax", name="head")(x))
    expansion = _check(model, tmp_path)
    kinds = _kinds(expansion)
    assert expansion.left == ()
    assert not {"Block", "Feed", "MultiHeadAttention", "EinsumDense"} & set(kinds.values())
    for path, kind in {
        "block/mha/query": "Dense",
        "block/mha/query/split": "Reshape",
        "block/mha/attention_output": "Dense",
        "block/mha/softmax": "Softmax",
        "block/mha/einsum": "Einsum",
        "block/feed/steps_0": "Dense",
        "block/feed/steps_0/gelu": "Activation",
        "block/norm1": "LayerNormalization",
        "block/dropout": "Dropout",
        "head": "Dense",
        "head/softmax": "Activation",
    }.items():
        assert kinds[path] == kind, path
    names = {node.path: node.operation.name for node in expansion.graph.nodes}
    assert names["block/mha/query"] == "block-mha-query"
    # The shared block has one set of weights.
    assert len({id(node.operation) for node in expansion.graph.nodes if node.path == "block/mha/key"}) == 1
    # Names do not depend on how many models there were before.
    again = expand(copy_graph(model))
    assert [node.path for node in again.nodes] == [node.path for node in expansion.graph.nodes]


def test_dropout_inside_opened_layers_switches_with_training() -> None:
    start = keras.Input((4, 8))
    model = keras.Model(start, Block(8, rate=0.5)(start))
    rebuilt = rewrite_graph(expand(copy_graph(model)), repeat)
    values = _values(model)
    _assert_close(rebuilt(values), rebuilt(values), 0.0)
    first, second = (keras.ops.convert_to_numpy(rebuilt(values, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize(
    "options",
    [{}, {"use_bias": False, "value_dim": 3}, {"output_shape": 5}, {"dropout": 0.5}, {"use_gate": True}],
    ids=["plain", "value_dim", "output_shape", "dropout", "gate"],
)
def test_attention_becomes_matrix_products(options) -> None:
    query, value = keras.Input((5, 8), name="query"), keras.Input((None, 8), name="value")
    model = keras.Model([query, value], layers.MultiHeadAttention(2, 4, name="mha", **options)(query, value))
    expansion = _check(model)
    kinds = list(_kinds(expansion).values())
    assert kinds.count("Dense") == 4 + ("use_gate" in options)
    assert kinds.count("Einsum") == 2
    assert expansion.left == ()


def test_attention_with_masks_scores_and_windows() -> None:
    query, mask = keras.Input((5, 8), name="query"), keras.Input((5, 5), dtype="int32", name="allowed")
    attention = layers.MultiHeadAttention(2, 4, name="mha", sliding_window=3)
    out, scores = attention(query, query, attention_mask=mask, use_causal_mask=True, return_attention_scores=True)
    grouped = layers.GroupQueryAttention(4, 4, 2, name="grouped")(query, query, use_causal_mask=True)
    expansion = _check(keras.Model([query, mask], [out, scores, grouped]))
    assert expansion.left == ()
    assert not {"MultiHeadAttention", "GroupedQueryAttention"} & set(_kinds(expansion).values())


def test_attention_over_several_axes() -> None:
    start = keras.Input((3, 4, 8))
    attention = layers.MultiHeadAttention(2, 4, attention_axes=(1, 2), name="mha")
    expansion = _check(keras.Model(start, attention(start, start)))
    assert expansion.left == ()


def test_padding_reaches_attention_and_pooling(tmp_path) -> None:
    words = keras.Input((6,), dtype="int32", name="words")
    x = layers.Embedding(9, 8, mask_zero=True, name="embedding")(words)
    x = Block(8, name="block")(x)
    x = layers.EinsumDense("abc,cd->abd", (6, 4), name="einsum")(x)  # has no masks, unlike a dense layer
    y = layers.Dense(4, activation="silu", name="dense")(
        Block(8, name="second")(layers.Embedding(9, 8, mask_zero=True)(words))
    )
    outputs = [layers.GlobalAveragePooling1D()(x), layers.GlobalAveragePooling1D()(y), layers.LSTM(3, name="lstm")(y)]
    model = keras.Model(words, outputs)
    expansion = _check(model, tmp_path, tolerance=2e-6)
    assert not {"Block", "MultiHeadAttention"} & set(_kinds(expansion).values())
    padded = np.array([[1, 2, 3, 0, 0, 0]])
    rebuilt = rewrite_graph(expansion.graph, repeat)
    _assert_close(model(padded), rebuilt(padded), 2e-6)
    assert not np.allclose(model(padded)[1], model(np.array([[1, 2, 3, 4, 4, 4]]))[1])


def test_subclassed_models_inside_functional_ones(tmp_path) -> None:
    start = keras.Input((6, 6, 3))
    residual = Residual(3, name="residual")
    model = keras.Model(start, residual(residual(start)))
    expansion = _check(model, tmp_path)
    assert {path: kind for path, kind in _kinds(expansion).items() if "add" not in path} == {
        "residual/conv": "Conv2D",
        "residual/norm": "BatchNormalization",
    }
    rebuilt = rewrite_graph(expansion.graph, repeat)
    _assert_close(model(_values(model), training=True), rebuilt(_values(model), training=True), 1e-5)


def test_dicts_of_inputs_and_outputs(tmp_path) -> None:
    left, right = keras.Input((4, 8), name="left"), keras.Input((4, 8), name="right")
    x = Block(8, name="block")(left)
    y = layers.MultiHeadAttention(2, 4, name="cross")(x, right)
    model = keras.Model({"left": left, "right": right}, {"sum": x + y, "gate": layers.Dense(1, "sigmoid", name="g")(y)})
    expansion = _check(model, tmp_path)
    assert sorted(expansion.graph.outputs) == ["gate", "sum"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Tied(name="tied"), "weights outside of layers"),
        (Shift(name="shift"), "uses the weight"),
        (Eager(name="eager"), "cannot be traced"),
    ],
    ids=["tied", "own weight", "eager"],
)
def test_what_cannot_be_opened_stays_and_is_listed(layer, reason, tmp_path) -> None:
    dtype = "int32" if isinstance(layer, Tied) else "float32"
    model = _single(layer, (5,) if dtype == "int32" else (5, 4), dtype)
    expansion = _check(model, tmp_path if not isinstance(layer, Eager) else None)
    assert _kinds(expansion) == {layer.name: type(layer).__name__}
    assert [skipped.path for skipped in expansion.left] == [layer.name]
    assert reason in expansion.left[0].reason


def test_what_training_does_otherwise_is_listed() -> None:
    expansion = _check(_single(Noisy(name="noisy"), (4,)))
    assert list(_kinds(expansion).values()) == ["Dense"]  # Keras numbers copies of layers as it likes
    assert "opened as it predicts" in expansion.left[0].reason


def test_a_shared_layer_stays_closed_at_all_of_its_calls() -> None:
    a, b = keras.Input((4, 8), name="a"), keras.Input((None, 8), name="b")
    attention = layers.MultiHeadAttention(2, 4, name="mha")
    # A causal mask of unknown size cannot be traced, so that the second call stays closed, and the first with it.
    model = keras.Model([a, b], [attention(a, a), attention(b, b, use_causal_mask=True)])
    expansion = _check(model)
    assert _kinds(expansion) == {"mha": "MultiHeadAttention"}
    assert [skipped.path for skipped in expansion.left] == ["mha"]


def test_activations_that_runtimes_do_not_fuse_stand_alone(tmp_path) -> None:
    start = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, activation="relu6", name="fused")(start)
    x = layers.Conv2D(4, 1, activation="silu", name="swished")(x)
    x = layers.DepthwiseConv2D(3, activation=layers.LeakyReLU(0.3, name="leaky"), name="depthwise")(x)
    x = layers.Conv2DTranspose(4, 2, activation="tanh", activity_regularizer="l2", name="up")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = ops.silu(layers.Activation("swish", name="swish")(layers.Activation("gelu", name="gelu")(x)))
    x = layers.Dense(2, activation=ops.relu, name="relu")(layers.Flatten(name="flat")(x))
    model = keras.Model(start, layers.Dense(5, activation="softmax", name="head")(x))
    expansion = _check(model, tmp_path)
    kinds = _kinds(expansion)
    assert {
        "swished/silu/sigmoid": "Activation",
        "swished/silu/multiply": "Multiply",
        "depthwise/leaky": "LeakyReLU",
        "up/tanh": "Activation",
        "gelu": "Activation",
        "swish/sigmoid": "Activation",
        "swish/multiply": "Multiply",
        "head/softmax": "Activation",
    }.items() <= kinds.items()
    assert "Silu" not in kinds.values()
    assert list(kinds.values()).count("Multiply") == 3
    activations = {
        node.path: node.operation.activation.__name__
        for node in expansion.graph.nodes
        if getattr(node.operation, "activation", None) is not None
    }
    assert activations["fused"] == "relu6"
    assert activations["swished"] == "linear"
    assert activations["relu"] == "relu"
    assert activations["swished/silu/sigmoid"] == "sigmoid"
    assert activations["head"] == "linear"
    assert "silu" not in {name for path, name in activations.items()}
    rebuilt = rewrite_graph(expansion.graph, repeat)
    values = _values(model)
    model(values), rebuilt(values)
    _assert_close(sum(model.losses), sum(rebuilt.losses), 1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        layers.SeparableConv2D(5, 3, strides=2, padding="same", depth_multiplier=2, activation="relu", name="s"),
        layers.SeparableConv2D(4, (3, 2), dilation_rate=2, use_bias=False, depthwise_regularizer="l2", name="s"),
        layers.SeparableConv1D(5, 3, strides=2, depth_multiplier=2, activation="sigmoid", name="s"),
        layers.SeparableConv1D(5, 2, dilation_rate=2, padding="same", name="s"),
    ],
)
def test_separable_convolutions_are_two_layers(layer, tmp_path) -> None:
    two_d = isinstance(layer, layers.SeparableConv2D)
    model = _single(layer, (9, 8, 3) if two_d else (9, 3))
    layer.depthwise_kernel.trainable = False
    expansion = _check(model, tmp_path)
    kinds = _kinds(expansion)
    assert kinds["s/depthwise"] == f"DepthwiseConv{1 + two_d}D"
    assert kinds["s/pointwise"] == f"Conv{1 + two_d}D"


@pytest.mark.parametrize(
    ("equation", "output", "bias", "shape", "dense"),
    [
        ("ab,bc->ac", 4, "c", (3,), True),
        ("abc,cd->abd", (None, 4), "d", (5, 3), True),
        ("...x,xy->...y", 4, "y", (5, 3), True),
        ("abc,cde->abde", (None, 2, 4), "de", (5, 3), True),
        ("abcd,cde->abe", (None, 4), "e", (5, 2, 3), True),
        ("abc,cde->abde", (None, 2, 4), "e", (5, 3), False),
        ("abc,bcd->abd", (5, 4), None, (5, 3), False),
        ("abc,cd->adb", (4, 5), None, (5, 3), False),
    ],
)
def test_einsum_layers_that_are_matrix_products_become_dense(equation, output, bias, shape, dense) -> None:
    layer = layers.EinsumDense(equation, output, bias_axes=bias, activation="tanh", kernel_regularizer="l2", name="e")
    kinds = _kinds(_check(_single(layer, shape)))
    assert kinds["e"] == ("Dense" if dense else "EinsumDense")
    assert kinds["e/tanh"] == "Activation"


def test_hard_activations_are_split_only_where_runtimes_need_it(tmp_path) -> None:
    start = keras.Input((6,))
    x = layers.Dense(4, activation="hard_sigmoid", name="gate")(start)
    x = layers.Activation("hard_silu", name="swish")(ops.hard_sigmoid(x) + x)
    kinds = _kinds(_check(keras.Model(start, x), tmp_path))
    assert kinds["gate/hard_sigmoid/relu6"] == "Relu6"
    assert kinds["gate/hard_sigmoid/add"] == "Add"
    assert kinds["gate/hard_sigmoid/multiply"] == "Multiply"
    assert kinds["swish"] == "Activation"
    assert list(kinds.values()).count("Relu6") == 2


def test_rescaling_by_one_number_is_a_product_and_a_sum(tmp_path) -> None:
    x = layers.Rescaling(1 / 127.5, offset=-1, name="centre")(start := keras.Input((4,)))
    x = layers.Rescaling(3.0, name="widen")(layers.Rescaling([1.0, 2.0, 3.0, 4.0], offset=0.5, name="each")(x))
    kinds = _kinds(_check(keras.Model(start, x), tmp_path))
    assert kinds == {
        "centre/multiply": "Multiply",
        "centre/add": "Add",
        "each": "Rescaling",
        "widen/multiply": "Multiply",
    }


def test_attention_to_nothing_among_tensors_of_unknown_length_stays() -> None:
    query, allowed = keras.Input((None, 8), name="query"), keras.Input((None, None), dtype="int32", name="allowed")
    out = layers.MultiHeadAttention(2, 4, name="mha")(query, query, attention_mask=allowed)
    expansion = _check(keras.Model([query, allowed], out))
    assert "leave nothing to attend to" in expansion.left[0].reason


def test_time_distributed_dense_layers_lose_their_loop(tmp_path) -> None:
    start = keras.Input((4, 6, 3))
    x = layers.TimeDistributed(layers.Dense(5, activation="tanh", name="dense"), name="each")(start)
    x = layers.TimeDistributed(layers.Conv1D(2, 3), name="convs")(x)
    kinds = _kinds(_check(keras.Model(start, x), tmp_path))
    assert kinds == {"each/dense": "Dense", "each/dense/tanh": "Activation", "convs": "TimeDistributed"}


def test_recurrent_layers_and_lambdas_stay() -> None:
    start = keras.Input((4, 3))
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True), name="both")(start)
    x = layers.Lambda(lambda value: value * 2, name="double")(layers.GRU(3, return_sequences=True, name="gru")(x))
    model = keras.Model(start, layers.TimeDistributed(layers.LayerNormalization(), name="norms")(x))
    assert set(_kinds(_check(model))) == {"both", "gru", "double", "norms"}


def test_mixed_precision_is_kept() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = _single(Block(8, name="block"), (4, 8))
    finally:
        keras.config.set_dtype_policy("float32")
    expansion = _check(model, tolerance=2e-3)
    assert keras.tree.flatten(expansion.graph.outputs)[0].dtype == "float16"
    query = next(node.operation for node in expansion.graph.nodes if node.path == "block/mha/query")
    assert (query.compute_dtype, query.variable_dtype) == ("float16", "float32")


def test_frozen_layers_stay_frozen() -> None:
    model = _single(Block(8, name="block"), (4, 8))
    model.get_layer("block").attention.trainable = False
    expansion = _check(model)
    frozen = {node.path for node in expansion.graph.nodes if _is_frozen(node.operation)}
    assert frozen == {f"block/mha/{name}" for name in ("query", "key", "value", "attention_output")}


def _is_frozen(operation: keras.Operation) -> bool:
    return bool(getattr(operation, "weights", ())) and not operation.trainable_weights


@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNetV3Small", "EfficientNetB0"])
def test_known_networks(name) -> None:
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=4)
    values = np.random.default_rng(0).uniform(0, 255, (1, 32, 32, 3)).astype("float32")
    expansion = expand_graph(copy_graph(model))
    _assert_close(model(values), rewrite_graph(expansion.graph, repeat)(values), 1e-6)
    assert expansion.left == ()
    kept = {layer.name for layer in model.layers if layer.weights}
    assert kept <= {node.path for node in expansion.graph.nodes}
