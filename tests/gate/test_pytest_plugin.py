"""Budgets inside of a user's own test suite, run by pytest in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from gate_nets import write_net, write_samples

BUDGET = """\
artifacts: {net: net.onnx}
data: {test: {type: npz, path: data.npz, x: x_test, y: y_test}}
budgets:
  - artifact: net
    file: 1 MiB
    gzip: 10
    accuracy: {min: 85%, max_drop: 1 pp}
    f1: {min: 0.9}
"""

TESTS = """\
import pytest

LIMITS = {"data": "npz:data.npz", "file": "1 MiB"}

def test_fits(bmcompress_check):
    report = bmcompress_check("net.onnx", accuracy={"min": 0.85}, **LIMITS)
    assert report.verdict == "pass"

def test_too_large(bmcompress_check):
    bmcompress_check("net.onnx", file=10)

def test_too_few_samples(bmcompress_check):
    bmcompress_check("net.onnx", accuracy={"min": 0.9}, data="npz:data.npz")

def test_not_there(bmcompress_check):
    bmcompress_check("other.onnx", file=10)

def test_same_as_its_reference(bmcompress_check):
    bmcompress_check("net.onnx", agreement={"min": 0.99}, reference="copy.onnx", data="npz:data.npz")
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    write_net(folder / "net.onnx", 0, 2)
    write_net(folder / "copy.onnx", 0, 3)
    write_samples(folder / "data.npz", 1000, (100, 120))
    (folder / "bmcompress.budget.yaml").write_text(BUDGET)
    (folder / "test_model.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def run(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def outcomes(output: str) -> dict[str, str]:
    lines = [line.split() for line in output.splitlines() if "::" in line and line.split()[1:2]]
    return {words[0].partition("::")[2].replace("::", "."): words[1] for words in lines if words[1].isupper()}


def test_each_limit_is_a_test(suite):
    code, output = run(suite, "bmcompress.budget.yaml")
    assert code == 1, output
    assert outcomes(output) == {
        "net.file": "PASSED",
        "net.gzip": "FAILED",
        "net.accuracy.min": "PASSED",
        "net.accuracy.max_drop": "SKIPPED",
        "net.f1.min": "SKIPPED",
    }
    assert "fail: net: gzip is" in output and "allowed 10" in output
    assert "there is no baseline" in output
    assert "Traceback" not in output


def test_the_fixture_and_strictness(suite):
    code, output = run(suite, "test_model.py")
    assert code == 1
    expected = {
        "test_fits": "PASSED", "test_too_large": "FAILED", "test_too_few_samples": "SKIPPED", "test_not_there": "FAILED",
        "test_same_as_its_reference": "PASSED",
    }  # fmt: skip
    assert outcomes(output) == expected
    assert "the artifact `model` is missing" in output
    _, output = run(suite, "test_model.py", "--bmcompress-strict", "-k", "too_few")
    assert outcomes(output) == {"test_too_few_samples": "FAILED"}
    code, output = run(suite, "bmcompress.budget.yaml", "--bmcompress-size-only")
    assert outcomes(output) == {"net.file": "PASSED", "net.gzip": "FAILED"}


def test_a_budget_file_that_is_wrong_is_an_error_with_its_line(suite):
    folder = suite / "wrong"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "my.bmcompress.budget.yaml").write_text(BUDGET.replace("f1", "f2"))
    code, output = run(folder)
    assert code == 2
    assert "my.bmcompress.budget.yaml:8: budgets.0.f2" in output
