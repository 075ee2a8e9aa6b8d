"""From a data section to splits: parts of a set, what is taken, preprocessing, notes, digests."""

from __future__ import annotations

import numpy as np
import pytest

from compress.data.loading import describe_data, load_data
from compress.data.references import DataOptions
from compress.errors import DataError

X = np.arange(10, dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "whole.npz", x=X, y=np.arange(10))
    np.savez(tmp_path / "parts.npz", x_train=X, y_train=np.arange(10), x_test=X + 100, y_test=np.arange(10))
    images = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2) * 15
    np.savez(tmp_path / "images.npz", x=images, y=np.array([0, 2, 1, 0]))
    return tmp_path


def load(folder, section, **options):
    return load_data(DataOptions.model_validate(section), base_folder=folder, **options)


def test_digits_as_stored_in_two_parts():
    data = load_data("digits", seed=1)
    again = load_data("digits", seed=2)
    assert (data.train.x.shape, data.test.x.shape) == ((1437, 8, 8), (360, 8, 8))
    assert data.train.x.dtype == np.float32
    assert (data.train.x.min(), data.train.x.max()) == (0, 16)
    assert (data.train.digest, data.test.digest) == (again.train.digest, again.test.digest)
    rows = {row.tobytes() for row in data.train.x.reshape(1437, -1)}
    assert not rows & {row.tobytes() for row in data.test.x.reshape(360, -1)}
    assert len(data.notes) == 1
    assert "a fixed random 80 % of its 1797 samples are train" in data.notes[0]


def test_only_what_is_needed_is_loaded(folder):
    section = {"train": "npz:missing.npz", "test": "npz:whole.npz"}
    data = load(folder, section, needs=("test", "validation"))
    assert data.train is None
    assert len(data.test) == 10


def test_undivided_set_is_divided_when_two_splits_read_it(folder):
    data = load(folder, "npz:whole.npz")
    assert sorted([*data.train.x, *data.test.x]) == X.tolist()
    assert (len(data.train), len(data.test)) == (8, 2)
    same = load(folder, {"train": "npz:whole.npz", "test": "npz:whole.npz"})
    assert same.test.digest == data.test.digest
    assert same.train.digest == data.train.digest
    np.testing.assert_array_equal(data.train.x, data.train.y)


def test_undivided_set_is_whole_when_one_split_reads_it(folder):
    data = load(folder, {"train": "npz:parts.npz", "test": "npz:whole.npz"})
    np.testing.assert_array_equal(data.test.x, X)
    assert data.notes == ()


def test_skip_divides_by_hand(folder):
    data = load(folder, {"train": "npz:whole.npz?take=7", "test": "npz:whole.npz?skip=7"})
    assert data.train.x.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert data.test.x.tolist() == [7, 8, 9]
    assert data.notes == ()


def test_validation_out_of_the_train_part_leaves_test_alone(folder):
    section = {
        "train": "npz:whole.npz?split=train&skip=3",
        "validation": "npz:whole.npz?split=train&take=3",
        "test": "npz:whole.npz",
    }
    data = load(folder, section)
    assert sorted([*data.train.x, *data.validation.x, *data.test.x]) == X.tolist()
    assert [len(data.train), len(data.validation), len(data.test)] == [5, 3, 2]


def test_overlap_of_train_and_test_is_noted(folder):
    data = load(folder, {"train": "npz:whole.npz?take=7", "test": "npz:whole.npz?skip=5"})
    assert data.notes == ("2 of 5 test samples are also in train: accuracy will look too good",)


def test_unlabelled_is_never_test(folder):
    data = load(folder, {"train": "npz:whole.npz", "test": "npz:whole.npz", "unlabelled": "npz:whole.npz"})
    assert data.unlabelled.y is None
    assert not set(data.unlabelled.x) & set(data.test.x)
    parts = load(folder, {"unlabelled": "npz:parts.npz"})
    np.testing.assert_array_equal(parts.unlabelled.x, X)
    assert not load_data(DataOptions(unlabelled="digits")).unlabelled.has_labels


def test_validation_is_not_invented(folder):
    section = {"train": "npz:whole.npz", "validation": "npz:whole.npz"}
    with pytest.raises(DataError, match="no validation samples of its own"):
        load(folder, section)


def test_reference_takes_of_another_split(folder):
    section = {
        "train": "npz:parts.npz?skip=2",
        "validation": {"type": "ref", "of": "train", "skip": 1, "take": 2, "preprocess": [{"rescale": 2}]},
        "unlabelled": {"type": "ref", "of": "train"},
    }
    data = load(folder, section, needs=("validation", "unlabelled"))
    assert data.train is None
    assert data.validation.x.tolist() == [6, 8]
    assert data.validation.y.tolist() == [3, 4]
    assert data.unlabelled.y is None
    assert len(data.unlabelled) == 8


def test_shuffle_then_skip_then_take(folder):
    shuffled = load(folder, {"train": "npz:parts.npz?shuffle=true&take=6"}, seed=3).train
    again = load(folder, {"train": "npz:parts.npz?shuffle=true&take=6"}, seed=3).train
    other = load(folder, {"train": "npz:parts.npz?shuffle=true&take=6"}, seed=4).train
    rest = load(folder, {"train": "npz:parts.npz?shuffle=true&skip=6"}, seed=3).train
    assert shuffled.digest == again.digest != other.digest
    assert sorted([*shuffled.x, *rest.x]) == X.tolist()
    np.testing.assert_array_equal(shuffled.x, shuffled.y)


def test_take_more_than_there_is(folder):
    data = load(folder, {"train": "npz:parts.npz?take=50"})
    assert len(data.train) == 10
    assert "take 50 was asked for, 10 samples are left and used" in data.notes[0]
    with pytest.raises(DataError, match="Received: 0 of 10 samples after skip 10"):
        load(folder, {"train": "npz:parts.npz?skip=10"})


def test_steps_in_order(folder):
    query = "?split=all&rescale=1/255&offset=-1&expand_dims=-1&one_hot=3"
    test = load(folder, "npz:images.npz" + query).test
    assert test.x.shape == (4, 2, 2, 1)
    assert test.x.dtype == np.float32
    np.testing.assert_allclose(test.x[3, 1, 1, 0], 225 / 255 - 1, rtol=1e-6)
    np.testing.assert_array_equal(test.y, np.eye(3, dtype=np.float32)[[0, 2, 1, 0]])
    flat = load(folder, "npz:images.npz?split=all&flatten=true&cast=int32").test
    assert (flat.x.shape, flat.x.dtype) == ((4, 4), np.int32)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("one_hot=2", "`one_hot 2`: expected labels from 0 to 1. Received: 2 at sample 1"),
        ("expand_dims=5", "`expand_dims 5`: expected an axis from"),
        ("expand_dims=-4", "`expand_dims -4`"),
    ],
)
def test_step_that_does_not_fit(folder, query, words):
    with pytest.raises(DataError, match=words):
        load(folder, f"npz:images.npz?split=all&{query}")


def test_integer_images_are_noted_and_left_alone(folder):
    data = load(folder, "npz:images.npz?split=all")
    assert data.test.x.dtype == np.uint8
    assert data.notes == ("images.npz: x is uint8 in 0..225, given to the model as stored; --rescale 1/255 scales it",)
    assert load(folder, "npz:images.npz?split=all&rescale=1/255").notes == ()
    assert len(load(folder, "npz:images.npz").notes) == 2, "how it is divided, and the range once for both splits"


def test_digest_is_of_what_the_model_sees(folder):
    plain = load(folder, {"test": "npz:parts.npz"}).test.digest
    np.savez(folder / "copy.npz", x_test=X + 100, y_test=np.arange(10))
    assert load(folder, {"test": "npz:copy.npz"}).test.digest == plain
    changed = [
        load(folder, {"test": f"npz:parts.npz?{q}"}).test.digest for q in ("take=9", "rescale=2", "labels=false")
    ]
    assert len({plain, *changed}) == 4


def test_description_reads_headers_only(folder):
    section = {
        "train": "npz:parts.npz?take=5&rescale=1/2",
        "validation": {"type": "ref", "of": "train", "skip": 1},
        "test": "npz:whole.npz",
        "unlabelled": "digits",
    }
    assert describe_data(DataOptions.model_validate(section), base_folder=folder) == [
        "train: parts.npz: x_train (10,) float32, y_train (10,) int64, take 5, rescale 0.5",
        "validation: samples of train, skip 1",
        "test: whole.npz: x (10,) float32, y (10,) int64",
        "unlabelled: digits, its train part",
    ]
    divided = describe_data(DataOptions.model_validate("npz:whole.npz"), base_folder=folder)
    assert divided[1] == "test: whole.npz: x (10,) float32, y (10,) int64, 20 % of it"
    with pytest.raises(DataError, match="does not exist"):
        describe_data(DataOptions.model_validate("npz:nothing.npz"), base_folder=folder)
