"""The committed baseline: exact, small, and read strictly."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from compress.errors import RecipeError
from compress.gate.baseline import default_path, load_baseline, parse_baseline
from compress.gate.per_sample import MOST_CHARACTERS, PackedValues, pack_values
from compress.gate.units import ByteGrowth, CountGrowth, Milliseconds, grown

RIGHT = np.arange(10) % 4 != 0  # 7 of 10


def document(**changes) -> dict:
    packed = pack_values(RIGHT)
    metric = {
        "value": 0.7, "n": 10, "ci95": [0.39, 0.89], "higher_is_better": True,
        "per_sample": packed.model_dump(), "reasons": {},
    }  # fmt: skip
    artifact = {
        "sha256": "0" * 64, "file": 100, "gzip": 90, "parameters": 5, "nonzero": 4, "macs": None,
        "metrics": {"accuracy": metric}, "decisions": {}, "latency": [], "reasons": {"macs": "unknown"},
    }  # fmt: skip
    whole = {
        "schema": "bmcompress/baseline/v1", "created": "2026-11-24T00:00:00Z", "tool": "0.1.0",
        "machine": {"fingerprint_id": "fp1:0", "cpu": None, "cores": 2},
        "data": {"name": "test", "samples": 10, "labelled": True, "digest": "d"},
        "artifacts": {"net": artifact},
    }  # fmt: skip
    return whole | changes


def parse(value):
    return parse_baseline(value if isinstance(value, bytes) else json.dumps(value).encode(), "b.json")


def test_round_trip(tmp_path):
    kept = parse(document())
    kept.save(tmp_path / "b.json")
    again = load_baseline(tmp_path / "b.json")
    assert again == kept
    assert (tmp_path / "b.json").read_text() == again.to_json()
    assert (again.artifacts["net"].metrics["accuracy"].per_sample.values() == RIGHT).all()
    assert load_baseline(tmp_path / "none.json") is None


def _changed(path, value):
    whole = document()
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return whole


METRIC = ("artifacts", "net", "metrics", "accuracy")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[]", "expected a baseline with schema"),
        (b"[" * 100_000, "nested too deeply"),
        (document(schema="bmcompress/baseline/v9"), "bmcompress/baseline/v9"),
        (document(extra=1), "extra"),
        (json.dumps(document()).replace("0.7", "NaN").encode(), "NaN is not a number"),
        (json.dumps(document()).replace('"gzip"', '"file"').encode(), "stands twice"),
        (b"{\n<<<<<<< HEAD\n}", "b.json:2: .*unfinished merge"),
        (_changed(("artifacts", "net", "file"), "100"), "artifacts.net.file"),
        (_changed(("artifacts", "net", "file"), -1), "artifacts.net.file"),
        (_changed(("artifacts", "net", "sha256"), "x"), "sha256"),
        (_changed((*METRIC, "value"), 0.8), "not the mean of its per-sample results"),
        (_changed((*METRIC, "n"), 9), "expected 9 per-sample results"),
        (_changed((*METRIC, "per_sample", "data"), "AA=="), "expected 2 bytes"),
        (_changed((*METRIC, "per_sample", "data"), "?"), "not base64"),
        (_changed((*METRIC, "per_sample", "data"), "//8="), "must be zero"),
        (_changed((*METRIC, "per_sample", "encoding"), "pickle"), "encoding"),
        (_changed((*METRIC, "per_sample"), {"encoding": "int8", "count": 10, "data": "AAAA"}), "not compressed by zlib"),
    ],
)  # fmt: skip
def test_what_is_not_a_baseline_is_refused(value, message):
    with pytest.raises(RecipeError, match=message):
        parse(value)


@pytest.mark.parametrize(
    ("budget", "baseline"),
    [
        ("bmcompress.budget.yaml", "bmcompress.baseline.json"),
        ("a/b.budget.yml", "a/b.baseline.json"),
        ("c.yaml", "c.baseline.json"),
    ],
)
def test_each_budget_file_has_a_baseline_of_its_own(budget, baseline):
    assert default_path(Path(budget)) == Path(baseline)


def test_a_folder_in_its_place_is_no_missing_baseline(tmp_path):
    (tmp_path / "b.json").mkdir()
    with pytest.raises(RecipeError, match="cannot be read"):
        load_baseline(tmp_path / "b.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_baseline(tmp_path / "link.json")


@pytest.mark.parametrize(
    ("values", "encoding"),
    [
        (np.array([True, False, True]), "bits"),
        (np.array([1.0, 0.0, 1.0]), "bits"),
        (np.array([0.25, 1.0]), "float32"),
        (np.array([-1, 9]), "int8"),
        (np.array([[300], [-5]]), "int16"),
        (np.array([70_000]), "int32"),
        (np.zeros(0, bool), "bits"),
    ],
)
def test_values_are_packed_as_small_as_they_fit(values, encoding):
    packed = pack_values(values)
    assert packed.encoding == encoding
    assert (packed.values() == values.reshape(-1)).all()


def test_size_of_ten_thousand_samples():
    right = np.random.default_rng(0).random(10_000) < 0.9
    assert len(pack_values(right).data) == 1668
    assert pack_values(right).ones() == right.sum()
    assert "more than" in pack_values(np.random.default_rng(0).random(100_000))
    assert len(pack_values(np.random.default_rng(0).integers(0, 10, 10_000)).data) < 7000 < MOST_CHARACTERS


def test_a_bomb_is_not_unpacked():
    bomb = base64.b64encode(zlib.compress(bytes(10**8), 9)).decode()
    with pytest.raises(ValidationError, match="expected 4 bytes for 4 values. Received: 5"):
        PackedValues(encoding="int8", count=4, data=bomb)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (ByteGrowth, 0, 0), (ByteGrowth, "1 KiB", 1024), (ByteGrowth, "2.50 %", "2.50%"), (CountGrowth, "10%", "10%"),
        (CountGrowth, 7, 7), (Milliseconds, "250 us", 0.25), (Milliseconds, "1.5 s", 1500.0), (Milliseconds, 4, 4.0),
        (ByteGrowth, -1, None), (ByteGrowth, "x", None), (ByteGrowth, True, None), (CountGrowth, "1 KiB", None),
        (CountGrowth, 0.5, None), (Milliseconds, "4 min", None), (Milliseconds, 0, None),
    ],
)  # fmt: skip
def test_units(kind, text, expected):
    if expected is None:
        with pytest.raises(ValidationError):
            TypeAdapter(kind).validate_python(text)
    else:
        assert TypeAdapter(kind).validate_python(text) == expected


def test_growth_is_exact():
    assert grown(1000, 1) == 1001
    assert grown(1000, "2%") == 1020
    assert grown(999, "0.1%") == 999  # 999.999 bytes are not 1,000
    assert grown(10**18 + 1, "0%") == 10**18 + 1
