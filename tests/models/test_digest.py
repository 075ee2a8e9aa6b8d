"""Two saves of one model have one digest; any change of a weight or of the architecture has another."""

from __future__ import annotations

from pathlib import Path

import hostile_files
import keras
import numpy as np
import pytest
import sample_models

from compress.models.digest import content_digest


@pytest.mark.parametrize("name", ["image", "operations", "nested", "text", "mixed", "brain_float", "strings"])
def test_saving_again_keeps_the_digest(name: str, tmp_path: Path) -> None:
    model = sample_models.KERAS_ONLY[name]()
    first, second, third = (tmp_path / f"{name}{number}.keras" for number in range(3))
    model.save(first)
    model.save(second)
    keras.saving.load_model(second).save(third)
    assert content_digest(first) == content_digest(second) == content_digest(third)


def test_bytes_differ_where_the_digest_does_not(tmp_path: Path) -> None:
    first = hostile_files.write_archive(tmp_path / "a.keras", version="3.15.0")
    second = hostile_files.write_archive(tmp_path / "b.keras", version="3.15.1")
    assert first.read_bytes() != second.read_bytes()
    assert content_digest(first) == content_digest(second)
    assert len(content_digest(first)) == 64


def test_compiling_keeps_the_digest(tmp_path: Path) -> None:
    plain = hostile_files.write_archive(tmp_path / "plain.keras")
    compiled = hostile_files.write_archive(tmp_path / "compiled.keras", hostile_files.compiled())
    assert content_digest(plain) == content_digest(compiled)


def test_one_changed_weight_changes_the_digest(tmp_path: Path) -> None:
    def write(file: object) -> None:
        hostile_files.write_weights(file)  # type: ignore[arg-type]
        kernel = file["layers/dense/vars/0"]  # type: ignore[index]
        kernel[3, 2] = np.nextafter(kernel[3, 2], np.float32(9))

    good = hostile_files.write_archive(tmp_path / "good.keras")
    changed = hostile_files.write_archive(tmp_path / "changed.keras", weights=write)
    assert content_digest(good) != content_digest(changed)


def test_other_architecture_changes_the_digest(tmp_path: Path) -> None:
    good = hostile_files.write_archive(tmp_path / "good.keras")
    other = hostile_files.write_archive(tmp_path / "other.keras", hostile_files.in_slot(activation="relu"))
    assert content_digest(good) != content_digest(other)
