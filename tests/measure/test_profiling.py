"""Profiles of exported files: operators in order, times that add up, and layers by their names."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from compress.deploy.exporting import export_models
from compress.errors import UsageError
from compress.measure.profiling import place_labels, profile_file

L = keras.layers


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    x = keras.Input((24, 24, 8), name="image")
    small = L.Conv2D(8, 3, padding="same", activation="relu", name="small")(x)
    y = L.Conv2D(64, 5, padding="same", activation="relu", name="large")(small)
    y = L.Add(name="sum")([small, L.Conv2D(8, 1, name="back")(y)])
    model = keras.Model(x, L.Dense(3, name="head")(L.GlobalAveragePooling2D(name="pool")(y)), name="net")
    model.save(folder / "net.keras")
    paths = {name: folder / f"net.{name}" for name in ("tflite", "onnx")}
    export_models(model, paths)
    return folder


@pytest.mark.parametrize("kind", ["tflite", "onnx"])
@pytest.mark.parametrize("known", [True, False])
def test_times_belong_to_layers_and_the_largest_costs_most(files, kind, known):
    found = profile_file(files / f"net.{kind}", model=files / "net.keras" if known else None, runs=20)
    assert [each.index for each in found.operators] == list(range(len(found.operators)))
    by_layer = {}
    for each in found.operators:
        assert each.time_ms is not None, each.reasons
        by_layer[each.layer] = by_layer.get(each.layer, 0.0) + each.time_ms
    assert {"small", "large", "back", "head"} <= set(by_layer)
    assert max(by_layer, key=by_layer.get) == "large"
    assert sum(each.share for each in found.operators) == pytest.approx(1)
    assert found.operators_ms == pytest.approx(sum(by_layer.values()))
    assert found.whole_ms > 0.3 * by_layer["large"]
    assert json.loads(found.model_dump_json(by_alias=True))["schema"] == "bmcompress/profile/v1"


def test_rows_by_layer_and_type_add_up(files):
    found = profile_file(files / "net.tflite", runs=3, batch=2, threads=2)
    assert (found.batch, found.threads) == (2, 2)
    for by in ("layer", "type"):
        _, rows = found.rows(by)
        assert sum(int(row[1]) for row in rows) == len(found.operators)
    assert {"CONV_2D", "FULLY_CONNECTED"} <= {row[0] for row in found.rows("type")[1]}


def test_layers_of_a_model_that_was_traced_before():
    labels = [["net_1/conv2d_1/convolution"], ["net_1/conv2d_1_1/Relu"], ["net_1/dense_1/MatMul"], []]
    layers = ["conv2d", "conv2d_1", "dense"]
    assert place_labels(labels, ("net", layers)) == ["conv2d", "conv2d_1", "dense", None]
    assert place_labels([["net/conv2d_1/convolution"]], ("net", layers)) == ["conv2d_1"]


def test_a_recurrent_net_and_integers(tmp_path):
    """What cannot be run alone is said, and does not stop the rest."""
    x = keras.Input((6, 4))
    model = keras.Model(x, L.Dense(2)(L.LSTM(8)(x)))
    export_models(model, {"tflite": tmp_path / "net.tflite"})
    found = profile_file(tmp_path / "net.tflite", runs=3)
    for each in found.operators:
        assert (each.time_ms is None) == ("time_ms" in each.reasons)
    assert any(each.type == "FULLY_CONNECTED" and each.time_ms for each in found.operators)


def test_bad_options(files):
    with pytest.raises(UsageError, match=r"expected a \.tflite or \.onnx file"):
        profile_file(files / "net.keras")
    with pytest.raises(UsageError, match="runs must be at least 1"):
        profile_file(files / "net.onnx", runs=0)
    assert np.isfinite(profile_file(files / "net.onnx", runs=1).whole_ms)
