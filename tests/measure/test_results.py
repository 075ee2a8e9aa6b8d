"""The report as JSON, as a table and as HTML."""

from __future__ import annotations

import json
import math

import jsonschema
import pytest
from pydantic import ValidationError

from compress.measure import results, tables


def _metric(value, drop=None, **parts):
    return results.Metric(
        **{"value": value, "n": 100, "ci95": (0.8, 0.9), "higher_is_better": True, "drop": drop, **parts}
    )


def _size(**parts):
    numbers = dict.fromkeys(("parameters", "nonzero_parameters", "kernel_weights", "distinct_weights", "macs"), 5)
    base = {
        "file_bytes": 61440,
        "gzip_bytes": 1234,
        "zstd_bytes": 1111,
        "nonzero_kernel_weights": 3,
        "sparsity": 0.4,
        "macs_partial": False,
    }
    return results.FileSize(**{**numbers, **base, **parts})


def _latency(**parts):
    base = {
        "threads": 1,
        "batch": 1,
        "reference": "base.onnx",
        "n": 600,
        "processes": 3,
        "p50_ms": 1.93456,
        "p50_ci95_ms": (1.92, 1.95),
        "p90_ms": 2.0,
        "p99_ms": None,
        "mean_ms": 1.95,
        "min_ms": 1.9,
        "stdev_ms": 0.1,
        "throughput_samples_s": 512.8,
        "reference_p50_ms": 6.2,
        "ratio": 0.3121,
        "ratio_ci95": (0.3081, 0.3134),
        "control_ratio": 1.0,
        "control_ci95": (0.9971, 1.0044),
        "noisy": False,
        "noise_reason": None,
    }
    return results.Latency(**{**base, **parts})


def _file(name="a.onnx", **parts):
    base = {
        "file": name,
        "format": "onnx",
        "sha256": "00",
        "runtime": None,
        "size": _size(),
        "quality": None,
        "startup": None,
        "memory": None,
        "latency": None,
    }
    return results.FileResult(**{**base, **parts})


def _report(*files):
    machine = results.Environment(
        fingerprint_id="fp1:0",
        cpu=None,
        cores_visible=2,
        affinity=[0, 1],
        memory_bytes=None,
        cpu_quota_cores=None,
        memory_limit_bytes=None,
        os="Linux",
        python="3.11",
        load_before=None,
        load_after=None,
        packages={},
        runtime_options={},
    )
    return results.BenchmarkReport(
        tool=results.Tool(version="0.1.0"),
        created="2026-11-23T15:30:00Z",
        environment=machine,
        reference="a.onnx",
        data=None,
        results=list(files),
        warnings=["<b>noisy</b>"],
    )


def test_json_matches_the_published_schema():
    change = results.Change(value=0.01, ci95=(-0.01, 0.03), lost=3, gained=2, mcnemar_p=1.0)
    report = _report(_file(quality={"accuracy": _metric(0.85, change)}, latency=[_latency()]), _file("b.onnx"))
    schema = results.BenchmarkReport.model_json_schema()
    data = json.loads(report.to_json(), parse_constant=pytest.fail)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(data, schema)
    assert data["schema"] == "bmcompress/benchmark/v1"
    assert results.BenchmarkReport.model_validate(data) == report
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "schema": "bmcompress/benchmark/v2"}, schema)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_cannot_hold_are_refused(value):
    with pytest.raises(ValidationError):
        _metric(value)
    with pytest.raises(ValidationError):
        _latency(ratio_ci95=(1.0, value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (tables.format_points(-0.0003), "-0.03 pp"),
        (tables.format_points(-0.00003), "-0.003 pp"),
        (tables.format_points(0.0125), "+1.25 pp"),
        (tables.format_points(0.0), "0.00 pp"),
        (tables.format_points(-1e-14), "-1.0e-12 pp"),
        (tables.format_percent(0.8731), "87.31 %"),
        (tables.format_percent(0.99996), "99.996 %"),
        (tables.format_percent(1.0), "100.00 %"),
        (tables.format_ratio(1.0004), "1.0004"),
        (tables.format_ratio(0.3121), "0.312"),
        (tables.format_ms(1.93456), "1.93"),
        (tables.format_ms(0.006981), "0.00698"),
        (tables.format_ms(1234.56), "1234.6"),
        (tables.format_ms(None), "-"),
    ],
)
def test_numbers_are_not_rounded_into_better_ones(text, expected):
    assert text == expected


def test_rows():
    drop = results.Change(value=0.0084, ci95=(0.001, 0.015), lost=3, gained=2)
    quality = {"accuracy": _metric(0.8647, drop), "agreement": _metric(0.964), "max_abs_diff": _metric(3.0)}
    header, rows = _report(_file(quality=quality, latency=[_latency()]), _file("b.onnx")).rows()
    assert dict(zip(header, rows[0], strict=True)) == {
        "file": "a.onnx",
        "quality": "86.47 % (80.00 % to 90.00 %)",
        "change": "-0.84 pp",
        "agreement": "96.40 %",
        "bytes": "61,440",
        "gzip -6": "1,234",
        "zstd -19": "1,111",
        "non-zero weights": "3",
        "distinct": "5",
        "p50 ms": "1.93",
        "ratio": "0.312 (0.308 to 0.313)",
        "against": "base.onnx",
        "A/A": "0.997 to 1.004",
    }
    assert rows[1] == ["b.onnx", "-", "-", "-", "61,440", "1,234", "1,111", "3", "5", "-", "-", "-", "-"]


def test_rows_of_several_settings_and_of_errors():
    rise = results.Change(value=0.25, ci95=None)
    quality = {"mse": _metric(1.5, rise, higher_is_better=False), "mae": _metric(1.0, higher_is_better=False)}
    latency = [_latency(), _latency(threads=2, noisy=True, noise_reason="noise")]
    rows = _report(_file(quality=quality, latency=latency)).rows()[1]
    assert [row[0] for row in rows] == ["a.onnx (1 threads, batch 1)", "a.onnx (2 threads, batch 1)"]
    assert rows[0][1:3] == ["mse 1.5 (0.8 to 0.9)", "mse +0.25"]
    assert rows[1][-1].endswith(" noisy")


def test_short_names_only_where_they_tell_files_apart():
    report = _report(_file("x/a.onnx", latency=[_latency(reference="x/base.onnx")]))
    short = report.model_copy(update={"reference": "x/b.onnx", "warnings": ["x/a.onnx is slow"]}).with_short_names()
    assert (short.results[0].file, short.reference, short.warnings) == (
        "a.onnx",
        "b.onnx",
        ["a.onnx is slow"],
    )
    assert short.results[0].latency[0].reference == "base.onnx"
    same = _report(_file("x/a.onnx"), _file("y/a.onnx"))
    assert same.with_short_names() == same


def test_html_is_escaped():
    page = _report(_file("<script>alert(1)</script>"))._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;noisy" in page
    assert page.count("<tr>") == 2
