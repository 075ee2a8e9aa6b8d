"""Verdicts worked out by hand: what passes, what fails, and what a small sample cannot tell."""

from __future__ import annotations

import pytest

from compress.errors import BudgetError, InconclusiveError
from compress.gate.budgets import Budget
from compress.gate.judging import judge
from compress.gate.verdicts import raise_for_verdicts
from compress.measure.quality import evaluate_outputs
from compress.measure.results import FileResult, FileSize, Latency


def result(quality=None, ratio=None, control=(0.99, 1.01), file_bytes=1000):
    size = FileSize(
        file_bytes=file_bytes,
        gzip_bytes=800,
        zstd_bytes=750,
        parameters=200,
        nonzero_parameters=100,
        kernel_weights=180,
        nonzero_kernel_weights=90,
        sparsity=0.5,
        distinct_weights=90,
        macs=None,
        macs_partial=False,
    )
    latency = None
    if ratio:
        low, high = ratio * 0.98, ratio * 1.02
        latency = [
            Latency(
                threads=1, batch=1, reference="r", n=100, processes=3, p50_ms=1, p50_ci95_ms=None, p90_ms=None, p99_ms=None,
                mean_ms=1, min_ms=1, stdev_ms=0, throughput_samples_s=1, reference_p50_ms=1, ratio=ratio,
                ratio_ci95=(low, high), control_ratio=1.0, control_ci95=control, noisy=False, noise_reason=None,
            )
        ]  # fmt: skip
    return FileResult(
        file="m.tflite", format="tflite", sha256="0" * 64, runtime=None, size=size, quality=quality, startup=None,
        memory=None, latency=latency,
    )  # fmt: skip


def quality(right: int, n: int, lost: int = 0, gained: int = 0):
    """Return metrics of `right` of `n` samples; the reference was right on `lost` others and wrong on `gained` of them."""
    import numpy as np

    labels = np.zeros(n, int)
    answers = np.array([0] * right + [1] * (n - right))
    reference = answers.copy()
    reference[:gained] = 1
    reference[right : right + lost] = 0
    return evaluate_outputs([np.eye(2)[answers]], [labels], ["classification"], [np.eye(2)[reference]]).metrics


def verdicts(budget: dict, measured: FileResult, **options):
    return [(v.limit, v.verdict) for v in judge([Budget(artifact="tflite", **budget)], {"tflite": measured}, **options)]


def test_bytes_are_exact():
    assert verdicts({"file": 1000, "gzip": 799, "nonzero": 90}, result()) == [
        ("file", "pass"),
        ("gzip", "fail"),
        ("nonzero", "pass"),
    ]
    assert verdicts({"file": 999}, result()) == [("file", "fail")]
    assert verdicts({"zstd": 750}, result()) + verdicts({"zstd": 749}, result()) == [("zstd", "pass"), ("zstd", "fail")]


@pytest.mark.parametrize(
    ("right", "n", "expected"),
    [
        (950, 1000, "pass"),
        (850, 1000, "fail"),
        (905, 1000, "inconclusive"),
        (9, 10, "inconclusive"),
        (930, 1000, "pass"),
    ],
)
def test_accuracy_floor(right, n, expected):
    assert verdicts({"accuracy": {"min": "90%"}}, result(quality(right, n))) == [("accuracy.min", expected)]


@pytest.mark.parametrize(
    ("lost", "gained", "n", "expected"),
    [
        (0, 0, 1000, "pass"),  # the same model
        (5, 5, 5000, "pass"),
        (15, 15, 1000, "pass"),  # bound 0.9 pp
        (20, 20, 1000, "inconclusive"),  # bound 1.05 pp
        (60, 20, 1000, "fail"),  # 4 pp, at least 2.5
        (0, 0, 100, "inconclusive"),  # a hundred samples cannot show one point
    ],
)
def test_drop_is_compared_in_pairs(lost, gained, n, expected):
    measured = result(quality(n * 9 // 10, n, lost, gained))
    assert verdicts({"accuracy": {"max_drop": "1 pp"}}, measured) == [("accuracy.max_drop", expected)]


@pytest.mark.parametrize(
    ("ratio", "control", "expected"),
    [
        (0.9, (0.99, 1.01), "pass"),
        (1.2, (0.99, 1.01), "fail"),
        (1.05, (0.99, 1.01), "inconclusive"),
        (0.9, (0.8, 1.3), "inconclusive"),
        (0.3, (0.8, 1.3), "pass"),
    ],
)
def test_latency(ratio, control, expected):
    assert verdicts({"latency": {"ratio": 1.05}}, result(ratio=ratio, control=control)) == [("latency.ratio", expected)]


def test_what_was_not_measured_fails_and_says_why():
    (found,) = judge([Budget(artifact="tflite", accuracy={"min": 0.5})], {"tflite": result()})
    assert (found.verdict, found.value) == ("fail", None)
    assert "no such metric" in found.detail
    assert verdicts({"latency": {"ratio": 1}}, result()) == [("latency.ratio", "fail")]
    assert verdicts({"file": 1000, "latency": {"ratio": 1}}, result(), size_only=True) == [("file", "pass")]


def test_exit_codes():
    broken = judge([Budget(artifact="tflite", file=1)], {"tflite": result()})
    with pytest.raises(BudgetError, match="1 of 1 limits are broken: tflite: file") as caught:
        raise_for_verdicts(broken)
    assert caught.value.exit_code == 6
    unsure = judge([Budget(artifact="tflite", accuracy={"min": "90%"})], {"tflite": result(quality(9, 10))})
    raise_for_verdicts(unsure)
    with pytest.raises(InconclusiveError) as inconclusive:
        raise_for_verdicts(unsure, strict=True)
    assert inconclusive.value.exit_code == 7


def evidence(before: FileResult, quality_before, quality_now, **options):
    """Return evidence with a baseline of `before`, on the same samples as now."""
    from compress.gate.baseline import Baseline, Machine, make_artifact
    from compress.gate.evidence import Evidence
    from compress.measure.results import SplitSummary

    data = SplitSummary(name="test", samples=100, labelled=True, digest="d")
    kept = Baseline(
        created="now", tool="0", machine=Machine(fingerprint_id="fp1:a", cpu="cpu", cores=2), data=data,
        artifacts={"tflite": make_artifact(before, quality_before)},
    )  # fmt: skip
    return Evidence(baseline=kept, has_reference=False, qualities={"tflite": quality_now}, data=data, **options)


def regression(errors):
    import numpy as np

    return evaluate_outputs([np.asarray(errors, float)[:, None]], [np.zeros((len(errors), 1))], ["regression"])


def test_errors_are_paired_with_the_baseline():
    """Each sample is worse by 0.01 of errors between 1 and 2: seen in pairs, lost in the scatter otherwise."""
    import numpy as np

    errors = np.linspace(1, 2, 100)
    before, now = regression(errors), regression(errors + 0.01 * (1 + 0.1 * np.cos(np.arange(100))))
    old = result(quality=before.metrics)
    new = result(quality=now.metrics).model_copy(update={"sha256": "1" * 64})
    about = evidence(old, before, now)
    for allowed, expected in ((0.011, "pass"), (0.009, "fail")):
        budget = Budget(artifact="tflite", mae={"max_drop": allowed})
        (found,) = judge([budget], {"tflite": new}, about)
        assert (found.limit, found.verdict) == ("mae.max_drop from baseline", expected)
        assert found.value == pytest.approx(0.01, rel=1e-2)
    unpaired = Budget(artifact="tflite", mae={"max_drop": 0.02})
    stranger = about.data.model_copy(update={"digest": "other"})
    from dataclasses import replace

    (found,) = judge([unpaired], {"tflite": new}, replace(about, data=stranger))
    assert found.verdict == "inconclusive" and "unpaired" in found.detail


def test_what_a_baseline_lacks_fails_in_a_check_and_is_skipped_in_an_update():
    about = evidence(result(), None, None)
    budget = Budget(artifact="tflite", max_growth={"macs": 0}, max_flips=0.1)
    now = result()
    assert [v.verdict for v in judge([budget], {"tflite": now}, about)] == ["fail", "fail"]  # macs, and no decisions
    size = now.size.model_copy(update={"macs": 5})
    (growth, _) = judge([budget], {"tflite": now.model_copy(update={"size": size})}, about)
    assert growth.verdict == "fail" and "the baseline has no such number" in growth.detail
    lenient = evidence(result(), None, None, incomplete="skipped")
    (growth, _) = judge([budget], {"tflite": now.model_copy(update={"size": size})}, lenient)
    assert growth.verdict == "skipped"


def test_only_shares_of_samples_get_the_interval_of_a_share():
    """An F1 score over 20 samples is no share of them; its own interval is 1.645/1.96 of that at 95 %, one-sided."""
    import numpy as np

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20)
    answers = np.where(rng.random(20) < 0.2, 1 - labels, labels)
    metrics = evaluate_outputs([np.eye(2)[answers]], [labels], ["classification"]).metrics
    (found,) = judge([Budget(artifact="tflite", f1={"min": 0.01})], {"tflite": result(quality=metrics)})
    low = metrics["f1"].value - (metrics["f1"].value - metrics["f1"].ci95[0]) * 1.6449 / 1.9600
    assert f"{low:.4f}" in found.detail


def test_parameters_and_macs_are_exact_and_what_is_not_counted_is_said():
    size = result().size.model_copy(update={"macs": 500})
    now = result().model_copy(update={"size": size})
    assert verdicts({"parameters": 200, "macs": 500}, now) == [("parameters", "pass"), ("macs", "pass")]
    assert verdicts({"parameters": 199, "macs": 499}, now) == [("parameters", "fail"), ("macs", "fail")]
    assert verdicts({"macs": 500}, result()) == [("macs", "fail")]  # not known at all
    partial = size.model_copy(update={"macs_partial": True, "uncounted_ops": ["WHILE"]})
    (found,) = judge([Budget(artifact="tflite", macs=500)], {"tflite": now.model_copy(update={"size": partial})})
    assert found.verdict == "inconclusive" and "without WHILE" in found.detail
    assert verdicts({"macs": 499}, now.model_copy(update={"size": partial})) == [("macs", "fail")]
