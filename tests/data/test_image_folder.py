"""Image folders: the same pixels as Keras reads, and files that are broken, hidden or outside."""

from __future__ import annotations

import struct

import keras
import numpy as np
import pytest
import tensorflow as tf

from compress.data import image_folder
from compress.data.loading import describe_data, load_data
from compress.data.references import DataOptions
from compress.errors import DataError


def draw(path, value, size=(6, 4), encode=tf.io.encode_png):
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.arange(size[0] * size[1] * 3).reshape(*size, 3) % 50
    path.write_bytes(encode((ramp + value).astype(np.uint8)).numpy())


@pytest.fixture
def photos(tmp_path):
    """Two classes of six images each; image `i` of class `c` begins with brightness 100 c + 10 i."""
    root = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog")):
        for i in range(6):
            draw(root / name / f"{i}.png", 100 * label + 10 * i)
    return root


def load(root, query="size=6x4", **section):
    options = DataOptions.model_validate(section or f"folder:{root}?{query}")
    return load_data(options, base_folder=root)


def test_same_pixels_and_labels_as_keras(photos):
    draw(photos / "cat" / "deep" / "one.jpg", 20, encode=tf.io.encode_jpeg)
    ours = load(photos, "size=3x5&split=all").test
    keras_reads = keras.utils.image_dataset_from_directory(
        photos, image_size=(3, 5), shuffle=False, batch_size=None, verbose=False
    )
    theirs = [(x.numpy(), int(y)) for x, y in keras_reads]
    assert ours.x.shape == (13, 3, 5, 3)
    assert ours.x.dtype == np.float32
    key = lambda pair: (pair[1], pair[0].tobytes())  # noqa: E731
    for (x, y), (their_x, their_y) in zip(
        sorted(zip(ours.x, ours.y, strict=True), key=key), sorted(theirs, key=key), strict=True
    ):
        assert y == their_y
        np.testing.assert_array_equal(x, their_x)


def test_parts_hold_different_images_of_both_classes(photos):
    data = load(photos)
    assert (len(data.train), len(data.test)) == (9, 3)
    seen = [set(split.x[:, 0, 0, 0]) for split in (data.train, data.test)]
    assert not seen[0] & seen[1]
    assert set(data.train.y) == {0, 1}
    few = load(photos, "size=6x4&split=all&take=6").test
    assert set(few.y) == {0, 1}, "the first six files are all cats"


def test_grey_images_and_steps(photos):
    test = load(photos, "size=6x4&split=all&channels=1&rescale=1/255&one_hot=2").test
    assert test.x.shape == (12, 6, 4, 1)
    assert test.x.max() <= 1
    assert test.y.shape == (12, 2)


def test_folders_by_split(tmp_path, photos):
    root = tmp_path / "parts"
    root.mkdir()
    photos.rename(root / "train")
    for name in ("cat", "dog", "emu"):
        draw(root / "val" / name / "a.png", 7)
    data = load(root)
    assert (len(data.train), len(data.test)) == (12, 3)
    assert sorted(data.test.y) == [0, 1, 2]
    assert set(data.train.y) == {0, 1}
    assert any("no test folder: val is measured on" in note for note in data.notes)
    section = {"validation": {"type": "image_folder", "path": str(root), "size": [6, 4]}}
    assert len(load(root, **section).validation) == 3
    with pytest.raises(DataError, match="split: all"):
        load(root, "size=6x4&split=all")


def test_classes_in_given_order(photos):
    test = load(photos, "size=6x4&split=all&classes=dog,cat").test
    dog = test.x[:, 0, 0, 0] >= 100
    np.testing.assert_array_equal(test.y[dog], 0)
    with pytest.raises(DataError, match="has no class folder 'dgo'"):
        load(photos, "size=6x4&split=all&classes=dgo,cat")


def test_class_called_train_is_not_taken_for_a_split(photos):
    draw(photos / "train" / "0.png", 200)
    with pytest.raises(DataError, match="Received: train beside cat, dog"):
        load(photos)
    assert sorted(load(photos, "size=6x4&split=all&classes=train,cat,dog").test.y) == [0] + 6 * [1] + 6 * [2]
    fewer = load(photos, "size=6x4&split=all&classes=cat,dog")
    assert fewer.notes == (f"{photos}: folders that are not in `classes` are left out: train",)


def test_images_without_classes_are_unlabelled(tmp_path):
    draw(tmp_path / "plain" / "a.png", 1)
    section = {"unlabelled": {"type": "image_folder", "path": str(tmp_path / "plain"), "size": [6, 4]}}
    split = load(tmp_path, **section).unlabelled
    assert split.x.shape == (1, 6, 4, 3)
    assert split.y is None
    with pytest.raises(DataError, match="expected one folder per class"):
        load(tmp_path / "plain")


def test_large_folder_is_streamed(photos, monkeypatch):
    in_memory = load(photos, "size=6x4&split=all&rescale=1/255").test
    monkeypatch.setattr(image_folder, "_IN_MEMORY_BYTES", 100)
    streamed = load(photos, "size=6x4&split=all&rescale=1/255").test
    assert not streamed.in_memory
    assert len(streamed) == 12
    for ours, theirs in zip(streamed.all(), in_memory.all(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    model = keras.Sequential([keras.Input((6, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(streamed.stream, verbose=0)
    again = load(photos, "size=6x4&split=all&rescale=1/255").test
    assert streamed.digest == again.digest
    draw(photos / "cat" / "0.png", 90, size=(7, 4))
    assert load(photos, "size=6x4&split=all&rescale=1/255").test.digest != streamed.digest
    unlabelled = load(photos, "size=6x4&split=all&labels=false").test
    assert not unlabelled.has_labels


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Received: .*broken.png, an empty file"),
        (b"just text", "Received: .*broken.png, something else"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 50_000, 50_000), "broken.png, 50000 x 50000"),
        (b"GIF89a" + struct.pack("<HH", 60_000, 60_000), "broken.png, 60000 x 60000"),
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 5, 5) + b"\0" * 30,
            "cannot be decoded.*broken.png",
        ),
        (b"\xff\xd8\xff\xe0 no jpeg", "cannot be decoded.*broken.png"),
    ],
)
def test_broken_image_is_named(photos, content, words):
    (photos / "dog" / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load(photos, "size=6x4&split=all")
    assert "\n" not in caught.value.message


def test_folders_without_images(tmp_path):
    with pytest.raises(DataError, match="which does not exist"):
        load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected one folder per class"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "cat").mkdir()
    (tmp_path / "empty" / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"has no images. Received: 0 files"):
        load(tmp_path / "empty")


def test_files_that_are_no_images_are_counted(photos):
    (photos / "cat" / "notes.txt").write_text("x")
    (photos / "cat" / ".hidden").write_text("x")
    (photos / "stray.png").write_bytes(b"")
    assert load(photos, "size=6x4&split=all").notes == (f"{photos}: 2 files are no images of a class and are left out",)


def test_links_that_leave_the_folder(tmp_path, photos):
    draw(tmp_path / "outside" / "secret.png", 1)
    link = photos / "cat" / "link.png"
    link.symlink_to(tmp_path / "outside" / "secret.png")
    with pytest.raises(DataError, match=r"link\.png: links .* are not followed"):
        load(photos)
    link.unlink()
    link.symlink_to(photos / "dog" / "0.png")
    assert len(load(photos, "size=6x4&split=all").test) == 13
    (photos / "cat" / "loop").symlink_to(photos)
    with pytest.raises(DataError, match="loop: links to folders"):
        load(photos)
    (photos / "cat" / "loop").unlink()
    (photos / "emu").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="emu: links to folders"):
        load(photos)


def test_unicode_names(photos):
    draw(photos / "zèbre 斑马" / "é 1.png", 3)
    assert set(load(photos, "size=6x4&split=all").test.y) == {0, 1, 2}


def test_description(photos):
    options = DataOptions.model_validate("folder:photos?size=6x4&take=2")
    assert describe_data(options, base_folder=photos.parent)[0] == (
        f"train: {photos}: 12 images as 6x4x3, 2 classes, 80 % of it, take 2"
    )
