"""Splits and what Python users may hand over as data."""

from __future__ import annotations

import numpy as np
import pytest

from compress.data.split import Data, Split, array_split, as_data, digest_arrays
from compress.errors import DataError


class Batches:
    """A re-iterable stream; `fail` raises after that many batches."""

    def __init__(self, batches, fail=None):
        self.made, self.fail = batches, fail

    def __iter__(self):
        for number, batch in enumerate(self.made):
            if number == self.fail:
                raise RuntimeError("the disk is gone\nsecond line")
            yield batch


def test_batches_of_arrays_and_streams():
    x = np.arange(5.0)
    split = array_split("train", x, x * 2)
    assert [b[0].tolist() for b in split.batches(2)] == [[0, 1], [2, 3], [4]]
    stream = Split("train", stream=Batches([(x[:2], x[:2] * 2), (x[2:], x[2:] * 2)]))
    assert len(split) == len(stream) == 5
    assert split.has_labels
    assert stream.has_labels
    assert stream.head(3)[0].tolist() == [0, 1, 2]
    assert stream.all()[1].tolist() == [0, 2, 4, 6, 8]


def test_stream_that_fails_is_named_and_keeps_its_cause():
    stream = Split("train", stream=Batches([np.ones(2), np.ones(2)], fail=1))
    with pytest.raises(DataError, match=r"'train' failed after batch 1: RuntimeError: the disk is gone$") as caught:
        stream.all()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_empty_stream():
    with pytest.raises(DataError, match=r"'train' is empty. Received: 0 samples"):
        len(Split("train", stream=Batches([])))


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.ones(3), np.ones(2), r"differ in length. Received: \[3, 2\]"),
        (np.ones((0, 2)), None, "empty. Received: 0 samples"),
        ([], None, "needs arrays of samples"),
        ({}, None, "needs arrays of samples"),
        (np.float32(1), None, "needs arrays of samples"),
    ],
)
def test_arrays_that_are_no_samples(x, y, words):
    with pytest.raises(DataError, match=words):
        array_split("train", x, y)


def test_as_data():
    x, y = np.ones((4, 2)), np.zeros(4)
    assert as_data(None) == Data()
    assert as_data((x, y)).train.has_labels
    assert not as_data(x).train.has_labels
    assert len(as_data({"left": x, "right": x}).train) == 4
    both = as_data({"train": (x, y), "test": x[:1]})
    assert (len(both.train), len(both.test), both.validation) == (4, 1, None)
    assert both.test.name == "test"
    stream = Batches([x])
    assert as_data(stream).train.stream is stream


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "Received: int"),
        ("digits", "Received: str"),
        ((np.ones(2), np.ones(2), np.ones(2)), "Received: a tuple of 3"),
        (iter([np.ones(2)]), "readable more than once. Received: a list_iterator"),
    ],
)
def test_as_data_refuses(value, words):
    with pytest.raises(DataError, match=words):
        as_data(value)


def test_digest_tells_dtype_shape_and_structure():
    a, b = np.zeros(4, np.float32), np.zeros(4, np.int32)
    assert digest_arrays([a]) == digest_arrays([a.copy()])
    different = [
        digest_arrays([a]),
        digest_arrays([b]),
        digest_arrays([a.reshape(2, 2)]),
        digest_arrays([a, a]),
    ]
    assert len(set(different)) == 4
    assert array_split("t", a, a).digest != array_split("t", [a, a]).digest
    assert array_split("t", {"l": a, "r": a}).digest != array_split("t", {"l": a, "s": a}).digest
    assert array_split("t", np.array(["a", "b"])).digest != array_split("t", np.array(["a", "c"])).digest
