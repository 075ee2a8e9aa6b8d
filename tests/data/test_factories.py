"""Functions of the user's that return data: who may run them, what they may return, streams."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from compress.data.loading import describe_data, load_data
from compress.data.references import DataOptions
from compress.errors import DataError, RecipeError

MODULE = """
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

Path("imported").touch()
X = np.arange(10, dtype=np.float32)
Y = np.arange(10)


def pair(n=10):
    return X[:n], Y[:n]


def inputs():
    return {"left": X, "right": X + 1}


def parts():
    return {"train": (X, Y), "test": (X[:3], Y[:3])}


def by_split(split, scale=1):
    return X * scale if split == "train" else X[:2] * scale


def dataset():
    return tf.data.Dataset.from_tensor_slices((X.astype("uint8"), Y)).batch(4)


def for_ever():
    return dataset().repeat()


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return X[2 * index : 2 * index + 2], Y[2 * index : 2 * index + 2]


def batches():
    return Batches()


def labels_out_of_range():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


def raises():
    raise KeyError("no such column")


def junk():
    return 3


def nothing():
    return None


def nan():
    return np.where(X == 4, np.nan, X)


def late():
    def generate():
        yield X[0], Y[0]
        raise OSError("the disk is gone")

    signature = (tf.TensorSpec((), tf.float32), tf.TensorSpec((), tf.int64))
    return tf.data.Dataset.from_generator(generate, output_signature=signature).batch(1)
"""


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("current")
    (folder / "user_data_sets").mkdir()
    (folder / "user_data_sets" / "__init__.py").write_text("")
    (folder / "user_data_sets" / "made.py").write_text(MODULE)
    (folder / "user_data_sets" / "broken.py").write_text("raise ValueError('in import')\n")
    (folder / "user_data_sets" / "needs.py").write_text("import a_package_that_is_not_there\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def load(name, query="", allow=("user_data_sets",), **section):
    text = f"user_data_sets.made:{name}{query}"
    return load_data(DataOptions.model_validate(section or text), allow_imports=allow)


def source(name, **options):
    return {"type": "python", "factory": f"user_data_sets.made:{name}", **options}


def test_not_allowed_runs_nothing(package):
    (package / "imported").unlink(missing_ok=True)
    for allow in ((), ("numpy", "user_data_sets.made"), "all my user_data_sets"):
        with pytest.raises(RecipeError) as caught:
            load("pair", allow=allow)
        assert "--allow-import user_data_sets" in caught.value.help
        assert caught.value.exit_code == 3
    with pytest.raises(RecipeError):
        describe_data(DataOptions.model_validate("user_data_sets.made:pair"))
    assert not (package / "imported").exists()


def test_arrays_are_divided():
    data = load("pair")
    assert (len(data.train), len(data.test)) == (8, 2)
    np.testing.assert_array_equal(data.train.x, data.train.y)
    assert load(None, train=source("pair", args={"n": 4})).train.x.tolist() == [0, 1, 2, 3]


def test_other_things_to_return():
    assert set(load("inputs").train.x) == {"left", "right"}
    parts = load("parts")
    assert (len(parts.train), len(parts.test)) == (10, 3)
    split = load("by_split", "?scale=2")
    assert (len(split.train), split.test.x.tolist()) == (10, [0, 2])
    with pytest.raises(DataError, match=r"gives no 'validation' split. Received: train, test"):
        load(None, validation=source("parts"))


@pytest.mark.parametrize(
    ("factory", "error", "words"),
    [
        ("user_data_sets.made:raises", DataError, "calling it raised KeyError: 'no such column'"),
        ("user_data_sets.made:junk", DataError, "returned no usable data: data must be .* Received: int"),
        ("user_data_sets.made:nothing", DataError, "returned no usable data: .* Received: None"),
        ("user_data_sets.made:nan", DataError, r"'x' must be finite. Received: nan at index \[4\]"),
        ("user_data_sets.made:pair?m=1", DataError, "calling it raised TypeError: .*'m'"),
        ("user_data_sets.made:for_ever?split=1", DataError, "TypeError"),
        ("user_data_sets.made:pairs", RecipeError, "no function 'pairs'; did you mean `pair`"),
        ("user_data_sets.made:X", RecipeError, "no function 'X'"),
        ("user_data_sets.mode:pair", RecipeError, "no module 'user_data_sets.mode'"),
        ("user_data_sets.broken:pair", DataError, "importing it raised ValueError: in import"),
        ("user_data_sets.needs:pair", DataError, "ModuleNotFoundError: No module named 'a_package"),
    ],
)
def test_functions_that_fail(factory, error, words):
    with pytest.raises(error, match=words) as caught:
        load_data(factory, allow_imports=["user_data_sets"])
    if "raised" in words:
        assert caught.value.__cause__.__traceback__ is not None


def test_stream_cannot_be_divided_but_serves_one_split():
    with pytest.raises(DataError, match="gives one stream, which cannot be divided"):
        load("dataset")
    data = load(None, train=source("dataset"))
    assert isinstance(data.train.stream, tf.data.Dataset)
    assert len(data.train) == 10
    assert data.train.digest == load(None, train=source("dataset")).train.digest
    assert data.train.digest != load(None, train=source("dataset", take=8)).train.digest


def test_tf_data_take_skip_and_steps():
    steps = [{"rescale": "1/2", "offset": 1}, {"expand_dims": -1}, {"one_hot": 10}]
    options = source("dataset", skip=1, take=6, preprocess=steps)
    x, y = load(None, train=options).train.all()
    np.testing.assert_array_equal(x, np.arange(1, 7, dtype=np.float32)[:, None] / 2 + 1)
    np.testing.assert_array_equal(y, np.eye(10, dtype=np.float32)[1:7])
    data = load(None, train=source("dataset"), validation={"type": "ref", "of": "train", "take": 3})
    assert data.validation.all()[1].tolist() == [0, 1, 2]
    unlabelled = load(None, unlabelled=source("dataset", preprocess=[{"flatten": True}])).unlabelled
    assert not unlabelled.has_labels
    assert next(unlabelled.batches())[0].shape == (4, 1)


def test_steps_on_streams_and_arrays_agree():
    x = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    y = np.array([[1], [0], [2], [1]])
    from compress.data.preprocessing import preprocess_arrays
    from compress.data.references import Step
    from compress.data.streams import preprocess_stream

    steps = [
        Step(offset=-3),
        Step(expand_dims=1),
        Step(rescale=0.5),
        Step(flatten=True),
        Step(cast="float16"),
        Step(one_hot=3),
    ]
    expected = preprocess_arrays(steps, x, y, "here")
    for drop in (False, True):
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4, drop_remainder=drop)
        found = next(iter(preprocess_stream(dataset, steps, True, "here")))
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.numpy().dtype


def test_pydataset_is_preprocessed_while_read():
    split = load(None, train=source("batches", preprocess=[{"rescale": 2}, {"one_hot": 10}])).train
    assert isinstance(split.stream, keras.utils.PyDataset)
    x, y = split.all()
    np.testing.assert_array_equal(x, np.arange(10) * 2)
    assert y.shape == (10, 10)
    unlabelled = load(None, unlabelled=source("batches")).unlabelled
    assert not unlabelled.has_labels
    for options in ({"take": 3}, {"skip": 1}, {"shuffle": True}):
        with pytest.raises(DataError, match="work"):
            load(None, train=source("batches", **options))


def test_streams_without_end_or_that_fail():
    with pytest.raises(DataError, match=r"must end. Received: one that repeats for ever"):
        load(None, train=source("for_ever"))
    assert len(load(None, train=source("for_ever", take=12)).train) == 12
    late = load(None, train=source("late")).train
    with pytest.raises(DataError, match="'train' failed after batch 1"):
        late.all()
    wrong = load(None, train=source("labels_out_of_range", preprocess=[{"one_hot": 5}])).train
    with pytest.raises(DataError, match="failed after batch 1"):
        wrong.all()
    with pytest.raises(DataError, match="expected an axis from -1 to 1"):
        load(None, train=source("dataset", preprocess=[{"expand_dims": -2}]))
