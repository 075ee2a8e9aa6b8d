"""Data that do not fit a model are refused in one line; a missing channel axis is added and said."""

import keras
import numpy as np
import pytest

from compress.errors import DataError
from compress.models.task import check_inputs, check_labels, infer_task

L = keras.layers
IMAGES = keras.Sequential([L.Input((4, 4, 1), name="image"), L.Flatten(), L.Dense(3, activation="softmax")])
TOKENS = keras.Sequential([L.Input((5,), name="tokens", dtype="int32"), L.Embedding(9, 2), L.Flatten(), L.Dense(1)])
X = np.zeros((6, 4, 4, 1), "float32")


def changed(array: np.ndarray, index: tuple, value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def test_missing_channel_axis_is_added_and_said():
    x, notes = check_inputs(IMAGES, X[..., 0], "train")
    assert x.shape == (6, 4, 4, 1)
    assert notes == ["train: the missing channel axis was added, (4, 4) -> (4, 4, 1)"]
    same, notes = check_inputs(IMAGES, X)
    assert same is X
    assert notes == []


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (
            IMAGES,
            np.zeros((2, 4, 4, 3)),
            r"takes \(4, 4, 1\) per sample. Received in data: \(4, 4, 3\): 3 channels",
        ),
        (IMAGES, np.zeros((2, 1, 4, 4)), "numpy.moveaxis"),
        (IMAGES, np.zeros((2, 16)), r"Received in data: \(16,\)"),
        (IMAGES, [X, X], "the model has 1 inputs .* Received in data: 2"),
        (IMAGES, X.astype("complex64"), "Received in data: dtype complex64"),
        (IMAGES, X[:0], "has no samples"),
        (
            IMAGES,
            changed(X, (5, 0, 0, 0), np.nan),
            "must be finite. Received: NaN or infinity, first at sample 5",
        ),
        (TOKENS, np.full((2, 5), 0.5), "fractions in float64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, x, message):
    with pytest.raises(DataError, match=message):
        check_inputs(model, x)


def test_whole_numbers_in_floats_and_bytes_fit():
    assert check_inputs(TOKENS, np.full((2, 5), 3.0))[1] == []
    assert check_inputs(IMAGES, X.astype("uint8"))[1] == []


def test_inputs_by_name_are_checked_by_name():
    a, b = L.Input((2,), name="a"), L.Input((3,), name="b")
    model = keras.Model([b, a], L.Concatenate()([a, b]))
    x = {"a": np.zeros((4, 2)), "b": np.zeros((4, 3))}
    assert set(check_inputs(model, x)[0]) == {"a", "b"}
    with pytest.raises(DataError, match=r"input 'a' takes \(2,\)"):
        check_inputs(model, {"a": x["b"], "b": x["a"]})
    with pytest.raises(DataError, match=r"the model's inputs are b, a. Received in data: a, c"):
        check_inputs(model, {"a": x["a"], "c": x["b"]})


def net(units: int, activation: str | None, loss: str) -> keras.Model:
    model = keras.Sequential([L.Input((4,)), L.Dense(units, activation=activation, name="out")])
    model.compile("sgd", loss)
    return model


SPARSE = net(3, "softmax", "sparse_categorical_crossentropy")
HOT = net(3, "softmax", "categorical_crossentropy")
BINARY = net(1, "sigmoid", "binary_crossentropy")
NUMBER = net(1, None, "mse")


@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (SPARSE, [0, 1, 7], "label 7 of a 3-class head, first at sample 2"),
        (SPARSE, [0, -1, 2], "label -1 of a 3-class head, first at sample 1"),
        (SPARSE, [1, 2, 3], "Class numbers start at 0"),
        (SPARSE, [0.0, 1.5], "label 1.5"),
        (SPARSE, [0.0, np.nan], "label nan"),
        (SPARSE, np.eye(3), r"look one-hot, .* Received: shape \(3, 3\)"),
        (SPARSE, np.zeros((3, 2), int), "one class number per sample"),
        (SPARSE, np.array(["cat", "dog"]), "must be numbers"),
        (SPARSE, None, "has no labels"),
        (HOT, [0, 1, 2], "Pass one-hot rows"),
        (HOT, np.eye(3) * 2, "between 0 and 1. Received: 2, first at sample 0"),
        (HOT, np.eye(4), r"must have shape \(3,\) per sample"),
        (BINARY, [0, 2, 1], "between 0 and 1. Received: 2, first at sample 1"),
        (BINARY, np.eye(3), r"must have shape \(1,\) per sample"),
        (NUMBER, [0.5, np.inf], "must be finite. Received: NaN or infinity, first at sample 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(model, y, message):
    with pytest.raises(DataError, match=message):
        check_labels(infer_task(model), None if y is None else np.asarray(y), "train")


def test_labels_that_fit_pass():
    for model, y in [
        (SPARSE, np.array([0, 1, 2])),
        (SPARSE, np.array([[0], [2]], "float32")),
        (HOT, np.full((2, 3), 1 / 3)),
        (BINARY, np.array([True, False])),
        (NUMBER, np.array([1e6, -5.0])),
    ]:
        check_labels(infer_task(model), y)


def test_missing_labels_are_allowed_only_where_asked_for():
    check_labels(infer_task(SPARSE), np.array([0, -1]), unlabelled=True)
    check_labels(infer_task(NUMBER), np.array([0.5, np.nan]), unlabelled=True)
    with pytest.raises(DataError, match=r"label -2"):
        check_labels(infer_task(SPARSE), np.array([0, -2]), unlabelled=True)
    with pytest.raises(DataError, match=r"must be finite"):
        check_labels(infer_task(NUMBER), np.array([0.5, np.inf]), unlabelled=True)
