"""Built-in sets. Keras itself reads Fashion-MNIST from small files in its cache; nothing is downloaded."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys

import keras
import numpy as np
import pytest

from compress.data.loading import load_data
from compress.data.references import DataOptions
from compress.errors import DataError, SetupError

_READ_FASHION = """
import json
from compress.data.loading import load_data
data = load_data("fashion_mnist?take=3")
splits = (data.train, data.test)
print(json.dumps([[s.x.shape, str(s.x.dtype), int(s.x[2, 0, 0]), s.y.tolist()] for s in splits]))
"""


def test_fashion_mnist_through_keras(tmp_path):
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for name, count in (("train", 5), ("t10k", 4)):
        images = np.arange(count, dtype=np.uint8)[:, None, None] + np.full((1, 28, 28), count, np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">II", 2049, count)
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    done = subprocess.run(
        [sys.executable, "-c", _READ_FASHION],
        env={**os.environ, "KERAS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [[[3, 28, 28], "uint8", 7, [0, 1, 2]], [[3, 28, 28], "uint8", 6, [0, 1, 2]]]
    assert json.loads(done.stdout) == expected, "and nothing else on stdout"


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_parts_of_sets_that_keras_brings(monkeypatch, capsys, name):
    def fake():
        print("Downloading data")
        image = np.ones((32, 32, 3), np.uint8)
        return (np.stack([image] * 3), np.array([[3], [1], [2]])), (
            np.stack([image] * 2),
            np.array([[0], [5]]),
        )

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", fake)
    data = load_data(name)
    assert data.train.y.tolist() == [3, 1, 2]
    assert data.test.y.tolist() == [0, 5]
    assert load_data(f"{name}?split=all").test.y.tolist() == [3, 1, 2, 0, 5]
    assert load_data(DataOptions(unlabelled=name)).unlabelled.x.shape == (3, 32, 32, 3)
    assert capsys.readouterr().out == ""


def test_no_network(monkeypatch):
    def fail():
        raise Exception("URL fetch failure on https://example.org/mnist.npz: None -- no network\nmore")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail)
    with pytest.raises(
        DataError, match=r"mnist is not on this machine .*: URL fetch failure .* no network\n"
    ) as caught:
        load_data("mnist")
    assert "npz:FILE" in caught.value.help


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SetupError, match="scikit-learn") as caught:
        load_data("digits")
    assert caught.value.help == 'pip install "bmcompress[quickstart]"'
