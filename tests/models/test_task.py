"""What a model is for: heads, kinds, losses, label forms."""

import keras
import numpy as np
import pytest

from compress.errors import DataError
from compress.models.heads import find_activations, probe_activation
from compress.models.task import infer_task

L = keras.layers
CLASSES = np.array([0, 1, 2, 1])
ONE_HOT = np.eye(3)[CLASSES]
NUMBERS = np.array([0.5, 1.5, -2.0, 0.0])


def net(*head: keras.Layer) -> keras.Sequential:
    return keras.Sequential([L.Input((4,)), L.Dense(5, activation="relu"), *head])


def dense(units: int, activation: str | None = None) -> keras.Sequential:
    return net(L.Dense(units, activation=activation))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = L.Dense(3, activation="softmax")

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (dense(3, "softmax"), "softmax"),
        (net(L.Dense(3), L.Softmax()), "softmax"),
        (net(L.Dense(3), L.Activation("softmax"), L.Activation("linear", dtype="float32")), "softmax"),
        (net(L.Dense(6, activation="sigmoid"), L.Dropout(0.5), L.Reshape((2, 3))), "sigmoid"),
        (net(L.Dense(4), dense(3, "softmax"), L.Flatten()), "softmax"),
        (net(L.Reshape((5, 1)), L.TimeDistributed(L.Dense(3, activation="softmax"))), "softmax"),
        (net(L.Dense(1, activation="tanh")), "linear"),
        (net(L.Dense(3), L.BatchNormalization()), "linear"),
    ],
)
def test_activation_is_found_behind_layers_that_pass_values_on(model, expected):
    assert find_activations(model) == [expected]


def test_activation_is_found_behind_operations_and_shared_layers():
    x = L.Input((4,))
    shared = L.Dense(3, activation="softmax")
    early, late = shared(x), L.Dense(4)(x)
    assert find_activations(keras.Model(x, [shared(late), L.Dense(2)(early)])) == ["softmax", "linear"]
    assert find_activations(keras.Model(x, keras.ops.sigmoid(late))) == ["sigmoid"]
    assert find_activations(keras.Model(x, L.Concatenate()([early, late]))) == [None]


def test_outputs_tell_where_the_config_does_not():
    assert probe_activation(np.array([[0.2, 0.8], [0.5, 0.5]])) == "softmax"
    assert probe_activation(np.array([[0.2, 0.3], [0.9, 0.9]])) == "sigmoid"
    assert probe_activation(np.array([[0.2], [1.0]])) == "sigmoid"
    assert probe_activation(np.array([[0.2, 1.8]])) == "linear"
    assert infer_task(Subclassed(), CLASSES, np.ones((4, 4), "float32")).outputs[0].head == "softmax"
    with pytest.raises(DataError, match="known only when it is called"):
        infer_task(Subclassed())


@pytest.mark.parametrize(
    ("model", "y", "kind", "head", "sparse", "loss"),
    [
        (dense(3, "softmax"), CLASSES, "classification", "softmax", True, "sparse_categorical_crossentropy"),
        (dense(3, "softmax"), ONE_HOT, "classification", "softmax", False, "categorical_crossentropy"),
        (dense(3, "softmax"), None, "classification", "softmax", True, "sparse_categorical_crossentropy"),
        (dense(3), CLASSES, "classification", "logits", True, "sparse_categorical_crossentropy"),
        (dense(3), ONE_HOT, "classification", "logits", False, "categorical_crossentropy"),
        (dense(1, "sigmoid"), CLASSES % 2, "binary", "sigmoid", None, "binary_crossentropy"),
        (dense(1), CLASSES % 2, "binary", "logits", None, "binary_crossentropy"),
        (dense(3, "sigmoid"), ONE_HOT, "multilabel", "sigmoid", None, "binary_crossentropy"),
        (dense(1), NUMBERS, "regression", "linear", None, "mean_squared_error"),
        (dense(3), ONE_HOT + 0.5, "regression", "linear", None, "mean_squared_error"),
        (dense(3), None, "regression", "linear", None, "mean_squared_error"),
    ],
)
def test_task_is_inferred_from_head_and_labels(model, y, kind, head, sparse, loss):
    output = infer_task(model, y).outputs[0]
    assert (output.kind, output.head, output.sparse) == (kind, head, sparse)
    assert getattr(output.loss, "name", output.loss) == loss
    assert output.from_logits == (head == "logits")
    assert not output.compiled


@pytest.mark.parametrize(
    ("loss", "kind", "sparse", "from_logits"),
    [
        ("sparse_categorical_crossentropy", "classification", True, False),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), "classification", True, True),
        (keras.losses.SparseCategoricalCrossentropy(name="mine"), "classification", True, False),
        (keras.losses.categorical_crossentropy, "classification", False, False),
        ("bce", "multilabel", None, False),
        ("mse", "regression", None, False),
    ],
)
def test_the_compiled_loss_decides(loss, kind, sparse, from_logits):
    model = dense(3)
    model.compile("sgd", loss, metrics=["accuracy"])
    output = infer_task(model, CLASSES).outputs[0]
    assert (output.kind, output.sparse, output.from_logits) == (kind, sparse, from_logits)
    assert output.loss is loss
    assert output.metrics == ("accuracy",)


def test_describe_says_what_was_taken_from_where():
    model = dense(3, "softmax")
    assert infer_task(model, CLASSES).describe() == [
        "task: classification, head: softmax, labels are class numbers",
        "loss: sparse_categorical_crossentropy (inferred from the head and the labels)",
        "metrics: sparse_categorical_accuracy (inferred from the head and the labels)",
    ]
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert infer_task(model, CLASSES).describe() == [
        "task: classification, head: softmax, labels are class numbers",
        "loss: sparse_categorical_crossentropy on logits (from the compiled model)",
        "warning: the head gives softmax, but sparse_categorical_crossentropy has from_logits=True",
    ]


def test_several_outputs_keep_their_names_losses_and_labels():
    x = L.Input((4,))
    heads = {"where": L.Dense(2)(x), "what": L.Dense(3, activation="softmax")(x)}
    model = keras.Model(x, heads)
    labels = {"what": CLASSES, "where": np.zeros((4, 2))}
    task = infer_task(model, labels)
    assert task.keyed
    assert [(o.name, o.kind) for o in task.outputs] == [("what", "classification"), ("where", "regression")]
    model.compile("sgd", loss={"what": "sparse_categorical_crossentropy", "where": "mae"}, metrics={"where": ["mse"]})
    task = infer_task(model, labels)
    assert [(o.loss, o.metrics) for o in task.outputs] == [
        ("sparse_categorical_crossentropy", ()),
        ("mae", ("mse",)),
    ]
    with pytest.raises(DataError, match=r"labels are named like outputs: what, where. Received: whom"):
        infer_task(model, {"whom": CLASSES})
    with pytest.raises(DataError, match=r"2 outputs .* Received: 1 label arrays"):
        infer_task(model, CLASSES)


def test_the_outputs_of_an_integer_softmax_are_recognised():
    logits = np.random.default_rng(0).normal(size=(500, 10))
    exact = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rounded = np.round(exact * 256) / 256
    assert np.abs(rounded.sum(-1) - 1).max() > 0.01
    assert probe_activation(rounded) == "softmax"
    assert probe_activation(np.clip(rounded * 1.5, 0, 1)) == "sigmoid"
