"""Public data sets: digits (Alpaydin and Kaynak 1998) out of scikit-learn, and those that Keras downloads."""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from typing import Any

import numpy as np

from compress.data.samples import Samples
from compress.data.split import first_line
from compress.errors import DataError, SetupError


def read_built_in(name: str, wanted: str, labels: bool, cache: dict[Any, Any]) -> Samples:
    """Return images as stored, `(samples, height, width)` or `(samples, height, width, 3)`, and their labels.

    Raises:
        DataError: the set is neither here nor could it be downloaded.
        SetupError: scikit-learn, which brings the digits, is not installed.
    """
    part = {"unlabelled": "train"}.get(wanted, wanted)
    key = (name, "all" if name == "digits" else part)
    if key not in cache:
        cache[key] = _read_digits() if name == "digits" else _read_keras(name, part)
    x, y = cache[key]
    names = ("images", "labels") if labels else ("images",)
    return Samples(name, x, y if labels else None, names=names, whole=name == "digits")


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 1797 images `(8, 8)` of float32 in 0..16, and int64 labels 0..9."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SetupError(
            "the digits come with scikit-learn, which is not installed",
            'pip install "bmcompress[quickstart]"',
        ) from None
    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int64)


def _read_keras(name: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    dataset = import_module(f"keras.datasets.{name}")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Keras announces downloads on stdout, which is for results
            splits = dict(zip(("train", "test"), dataset.load_data(), strict=True))
    except Exception as error:  # get_file raises plain Exception when there is no network
        raise DataError(
            f"the data set {name} is not on this machine and could not be downloaded: {first_line(error)}",
            f"Call keras.datasets.{name}.load_data() once where there is a network, "
            "or save the arrays in a file and write npz:FILE.",
        ) from error
    chosen = list(splits.values()) if part == "all" else [splits[part]]
    x, y = (np.concatenate([split[i] for split in chosen]) for i in (0, 1))
    return x, y.reshape(-1)  # CIFAR's labels are stored as a column
