"""Ordinary models of every kind pass the gate, and what is read back is what was saved."""

from __future__ import annotations

import zipfile
from pathlib import Path

import hostile_files
import keras
import numpy as np
import pytest
import sample_models

from compress.errors import ModelError
from compress.models.archive import check_archive, read_archive


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[keras.Model, Path]]:
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for name, make in {**sample_models.KERAS_ONLY, **sample_models.CUSTOM}.items():
        model = make()
        model.save(folder / f"{name}.keras")
        found[name] = (model, folder / f"{name}.keras")
    return found


@pytest.mark.parametrize("name", sample_models.KERAS_ONLY)
def test_model_without_custom_classes_passes(name: str, saved: dict[str, tuple[keras.Model, Path]]) -> None:
    check_archive(saved[name][1])


@pytest.mark.parametrize("name", sample_models.CUSTOM)
def test_custom_model_needs_its_package(name: str, saved: dict[str, tuple[keras.Model, Path]]) -> None:
    path = saved[name][1]
    with pytest.raises(ModelError, match="is not part of Keras") as caught:
        check_archive(path)
    assert caught.value.help == "If you trust it, pass --allow-import sample_models."
    check_archive(path, allow_imports=("sample_models",))
    check_archive(path, allow_imports=("samples",))


def test_application_passes(tmp_path: Path) -> None:
    keras.applications.MobileNetV3Small(weights=None).save(tmp_path / "model.keras")
    check_archive(tmp_path / "model.keras")


def test_layer_of_an_application_passes(tmp_path: Path) -> None:
    """ConvNeXt saves a layer that has no public name."""
    config = {"name": "scale", "init_values": 1e-6, "projection_dim": 2}
    layer = hostile_files.keras_object("LayerScale", config, "keras.src.applications.convnext")
    check_archive(hostile_files.write_archive(tmp_path / "model.keras", hostile_files.after_good(layer)))


def test_lambda_of_keras_itself_is_refused(tmp_path: Path) -> None:
    def double(values: keras.KerasTensor) -> keras.KerasTensor:
        return values * 2

    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(double, name="twice")])
    model.save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match=r"'twice' \(Lambda\) holds a Lambda, which can run any code"):
        check_archive(tmp_path / "model.keras")


def test_weights_are_read_as_saved(saved: dict[str, tuple[keras.Model, Path]]) -> None:
    model, path = saved["image"]
    with read_archive(path) as archive:
        group = archive.weights.children["layers"].children["conv2d"]
        assert (group.path, group.name) == ("layers/conv2d", "conv1")
        (kernel,) = group.weights
        assert (kernel.key, kernel.shape, kernel.dtype, kernel.size_bytes) == (
            "0",
            (3, 3, 3, 4),
            "float32",
            432,
        )
        np.testing.assert_array_equal(kernel.read(), model.get_layer("conv1").get_weights()[0])


def test_bfloat16_is_read_as_float32(saved: dict[str, tuple[keras.Model, Path]]) -> None:
    model, path = saved["brain_float"]
    with read_archive(path) as archive:
        kernel = archive.weights.children["layers"].children["dense"].weights[0]
        assert (kernel.dtype, kernel.size_bytes) == ("bfloat16", 24)
        values = kernel.read()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.asarray(model.get_weights()[0], np.float32))


def test_more_than_ten_weights_keep_their_order(saved: dict[str, tuple[keras.Model, Path]]) -> None:
    with read_archive(saved["operations"][1]) as archive:
        keys = [weight.key for weight in archive.weights.children["optimizer"].weights]
    assert keys == [str(number) for number in range(len(keys))]
    assert len(keys) > 10


def test_assets_are_listed_and_read(saved: dict[str, tuple[keras.Model, Path]]) -> None:
    with read_archive(saved["strings"][1]) as archive:
        assert archive.assets
        assert b"a" in archive.read_asset(archive.assets[0])
        with pytest.raises(ModelError):
            archive.read_asset("assets/none")


def test_repacked_archive_is_the_same_model(saved: dict[str, tuple[keras.Model, Path]], tmp_path: Path) -> None:
    """A file that was unpacked and zipped again is compressed; its weights are read all the same."""
    model, path = saved["image"]
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(tmp_path / "new.keras", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    check_archive(tmp_path / "new.keras")
    with read_archive(tmp_path / "new.keras") as archive:
        values = archive.weights.children["layers"].children["conv2d"].weights[0].read()
    np.testing.assert_array_equal(values, model.get_layer("conv1").get_weights()[0])


def test_only_the_reason_of_a_broken_tensor_is_named(tmp_path: Path) -> None:
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, name="first"), keras.layers.Dense(1, name="last")]
    )
    model.get_layer("last").set_weights([np.array([[np.nan], [1.0]]), np.zeros(1)])
    model.save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match="1 tensor contains NaN or infinity: last/0"):
        check_archive(tmp_path / "model.keras")


def test_name_of_the_file_does_not_matter(tmp_path: Path) -> None:
    check_archive(hostile_files.write_archive(tmp_path / "model.zip"))
    check_archive(str(hostile_files.write_archive(tmp_path / "ümläut model")))
