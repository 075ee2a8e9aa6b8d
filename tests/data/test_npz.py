"""npz files: which array is meant, and files that are broken or hostile."""

from __future__ import annotations

import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from compress.data.loading import load_data
from compress.data.npz import choose_keys, read_members
from compress.data.references import DataOptions, NpzFile, parse_reference
from compress.errors import DataError

X = np.arange(20, dtype=np.float32).reshape(10, 2)
Y = np.arange(10)


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def load(reference, **section):
    return load_data(DataOptions.model_validate(section) if section else parse_reference(reference))


def npy_bytes(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_arrays_by_split(tmp_path):
    data = load(save(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X[:3] + 1, y_test=Y[:3]))
    np.testing.assert_array_equal(data.train.x, X)
    np.testing.assert_array_equal(data.train.y, Y)
    np.testing.assert_array_equal(data.test.x, X[:3] + 1)
    assert data.train.x.dtype == np.float32
    assert data.validation is None
    assert data.notes == ()


@pytest.mark.parametrize(
    ("options", "wanted", "members", "expected"),
    [
        ({}, "train", "x_train y_train x_test", ("x_train", "y_train", False)),
        ({}, "test", "x_train y_train x_test", ("x_test", None, False)),
        ({}, "validation", "x_train x_val y_val", ("x_val", "y_val", False)),
        ({}, "unlabelled", "x_train x_unlabeled", ("x_unlabeled", None, False)),
        ({}, "unlabelled", "x_train y_train x_test", ("x_train", "y_train", False)),
        ({}, "train", "x y", ("x", "y", True)),
        ({}, "all", "x", ("x", None, True)),
        ({"y": "spk"}, "test", "x_test y_test spk_test", ("x_test", "spk_test", False)),
        ({"x": "a"}, "train", "a x_train y_train", ("a", None, True)),
        ({"x": "x_train", "y": "y_train"}, "test", "x_train y_train", ("x_train", "y_train", True)),
        ({"x": ("l", "r"), "y": "y"}, "train", "l r y", (("l", "r"), "y", True)),
        ({"x": {"a": "l", "b": "r"}}, "test", "l_test r_test", ({"a": "l_test", "b": "r_test"}, None, False)),
    ],
)
def test_which_array_is_meant(tmp_path, options, wanted, members, expected):
    source = NpzFile(path="a.npz", **options)
    assert choose_keys(source, tmp_path / "a.npz", members.split(), wanted, labels=True) == expected


def test_several_inputs_keep_their_form(tmp_path):
    reference = save(tmp_path / "a.npz", left=X, right=X + 1, label=Y)
    listed = load(reference + "?x=left,right&y=label&split=all").test
    np.testing.assert_array_equal(listed.x[1], X + 1)
    assert isinstance(listed.x, (list, tuple))
    named = load(reference + "?x=a:left,b:right&y=label&split=all").test
    np.testing.assert_array_equal(named.x["b"], X + 1)
    np.testing.assert_array_equal(named.y, Y)


def test_headers_are_read_without_the_arrays(tmp_path):
    save(tmp_path / "a.npz", x=X, y=Y)
    assert read_members(tmp_path / "a.npz") == {"x": ((10, 2), np.dtype("float32")), "y": ((10,), Y.dtype)}


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?x=imges", r"no array 'imges'.*did you mean 'images'\? Received: 'images', 'labels'"),
        ("", r"no array 'x_train' and no 'x'\. Received: 'images', 'labels'"),
        ("?x=images&y=lables", "did you mean 'labels'"),
        ("?split=all", r"no array 'x'\. Received"),
    ],
)
def test_missing_array_lists_those_there(tmp_path, query, words):
    with pytest.raises(DataError, match=words):
        load(save(tmp_path / "a.npz", images=X, labels=Y) + query)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": X, "y": Y[:9]}, "equally many. Received: x 10, y 9"),
        ({"x": X[:0], "y": Y[:0]}, "Received: 0 samples in x, y"),
        ({"x": np.float32(3)}, "'x' must have one entry per sample"),
        ({"x": np.where(X == 7, np.nan, X)}, r"'x' must be finite. Received: nan at index \[3, 1\], 1 such"),
        ({"x": X, "y": np.where(Y == 4, -np.inf, Y)}, r"'y' must be finite. Received: -inf at index \[4\]"),
        ({"x": np.array([{}, {}], dtype=object)}, "'x' must hold numbers or text. Received: pickled"),
        ({"x": np.zeros(3, "datetime64[s]")}, "'x' must hold numbers or text. Received: datetime64"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, arrays, words):
    with pytest.raises(DataError, match=words) as caught:
        load(save(tmp_path / "a.npz", **arrays) + "?split=all")
    assert caught.value.message.startswith("a.npz: ")
    assert "\n" not in caught.value.message


def test_bad_row_is_counted_in_the_file_and_may_be_skipped(tmp_path):
    x = X.copy()
    x[1, 0] = np.nan
    reference = save(tmp_path / "a.npz", x=x)
    with pytest.raises(DataError, match=r"index \[1, 0\]"):
        load(reference + "?split=all&skip=1")
    assert len(load(reference + "?split=all&skip=2").test) == 8


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"hello, world", "something else"),
        (npy_bytes(X), r"a \.npy file"),
        (b"PK\x03\x04 and nothing more", "truncated"),
    ],
)
def test_files_that_are_no_npz(tmp_path, content, words):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=f"expected an npz file.*a.npz, .*{words}"):
        load(f"npz:{tmp_path}/a.npz")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"does not exist\. Received: .*/nothing\.npz"):
        load(f"npz:{tmp_path}/nothing.npz")
    with pytest.raises(DataError, match="a folder"):
        load(f"npz:{tmp_path}")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_file(tmp_path, share):
    save(tmp_path / "a.npz", x_train=X, x_test=X)
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"truncated|empty file|something else"):
        load(f"npz:{tmp_path}/a.npz")


def write_member(path, content, name="x.npy"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return f"npz:{path}?split=all"


def header(shape, descr="'<f4'"):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            header((2**40,)),
            r"header promises shape \(1099511627776,\) of float32, 4398046511104 bytes. Received: 0",
        ),
        (header((2, 3)) + b"\0" * 20, "24 bytes. Received: 20 bytes"),
        (header((2, 3)) + b"\0" * 30, "24 bytes. Received: 30 bytes"),
        (header((-1, -6)) + b"\0" * 24, "corrupt"),
        (header("__import__('os').system('touch pwned')"), "cannot be read"),
        (header((1,), descr="'|O'") + b"cos\nsystem\n(S'touch pwned'\ntR.", "pickled Python objects"),
        (b"not an array", "cannot be read"),
        (b"", "cannot be read"),
        (b"\x93NUMPY\x09\x00", "cannot be read"),
    ],
)
def test_hostile_members(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        load(write_member(tmp_path / "a.npz", content))
    assert not (tmp_path / "pwned").exists()


def test_promise_larger_than_memory(tmp_path, monkeypatch):
    reference = save(tmp_path / "a.npz", x=X)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=79))
    with pytest.raises(DataError, match="must fit in memory"):
        load(reference + "?split=all")


def test_any_changed_bits_give_a_data_error_or_the_arrays(tmp_path):
    save(tmp_path / "a.npz", x=X, y=Y)
    intact = (tmp_path / "a.npz").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(intact)
        for position in random.integers(len(content), size=random.integers(1, 8)):
            content[position] ^= 1 << random.integers(8)
        (tmp_path / "a.npz").write_bytes(content[: random.integers(len(content))] if random.random() < 0.1 else content)
        try:
            load(f"npz:{tmp_path}/a.npz")
        except DataError:
            refused += 1
    assert refused > 200


def test_changed_byte_is_found_by_the_checksum(tmp_path):
    save(tmp_path / "a.npz", x=X)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    position = content.index(X.tobytes()) + 5
    content[position] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(bytes(content))
    with pytest.raises(DataError, match="'x' cannot be read: Bad CRC-32"):
        load(f"npz:{tmp_path}/a.npz?split=all")
