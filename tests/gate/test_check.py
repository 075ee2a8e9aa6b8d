"""`bmcompress check` and `baseline` as CI runs them, on ONNX files whose accuracy, bytes and time are known."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import xmlschema
from gate_nets import write_net, write_samples
from typer.testing import CliRunner

from compress.cli import app
from compress.gate.baseline import load_baseline
from compress.schemas import published_schema

SCHEMA = Path(__file__).parent / "schemas" / "junit-10.xsd"

BUDGET = """\
artifacts:
  net: net.onnx
reference: good.onnx
references: {net: good.onnx}
data: {test: {type: npz, path: data.npz, x: x_test, y: y_test}}
budgets:
  - artifact: net
    file: LIMIT
    accuracy:
      min: 85%
      max_drop: 1 pp
    latency:
      ratio: 1.5
    max_growth:
      file: 0
      macs: 1%
    max_flips: 1%
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A good net, one that loses 2 points and does ten times the work, and samples."""
    folder = tmp_path_factory.mktemp("gate")
    write_net(folder / "good.onnx", 0, 8)
    write_net(folder / "worse.onnx", 1, 80)
    write_samples(folder / "data.npz", 2000, (200, 240))
    return folder


@pytest.fixture
def place(files, tmp_path, monkeypatch):
    """A folder with the budget, whose net is the good one."""
    for name in ("good.onnx", "worse.onnx", "data.npz"):
        shutil.copy(files / name, tmp_path)
    shutil.copy(files / "good.onnx", tmp_path / "net.onnx")
    limit = (files / "good.onnx").stat().st_size
    (tmp_path / "bmcompress.budget.yaml").write_text(BUDGET.replace("LIMIT", str(limit)))
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "GITHUB_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def invoke(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def verdicts(result) -> dict[str, tuple[str, int]]:
    return {v["limit"]: (v["verdict"], v["line"]) for v in json.loads(result.stdout)["verdicts"]}


def test_an_equal_net_passes_and_a_worse_one_fails_each_line(place, monkeypatch):
    before = invoke("check", "--json")
    document = json.loads(before.stdout)
    jsonschema.validate(document, published_schema("check"))
    skipped = {limit for limit, (verdict, _) in verdicts(before).items() if verdict == "skipped"}
    assert skipped == {"max_growth.file", "max_growth.macs", "max_flips"}
    assert "3 of 7 limits were skipped" in before.stderr  # the drop is judged by the reference alone
    assert document["baseline"] is None
    invoke("check", "--require-baseline", code=6)

    written = invoke("baseline", "update")
    assert "accuracy" in written.stdout and "commit it" in written.stderr
    jsonschema.validate(json.loads((place / "bmcompress.baseline.json").read_text()), published_schema("baseline"))
    same = json.loads(invoke("check", "--json", "--require-baseline").stdout)
    assert {v["verdict"] for v in same["verdicts"]} == {"pass"}
    ratio = next(v["value"] for v in same["verdicts"] if v["limit"] == "latency.ratio")
    assert 0.7 < ratio < 1.4

    shutil.copy("worse.onnx", "net.onnx")
    with open("bmcompress.budget.yaml") as file:
        limit = Path("worse.onnx").stat().st_size - 1  # one byte over
        text = file.read().replace(str(Path("good.onnx").stat().st_size), str(limit))
    Path("bmcompress.budget.yaml").write_text(text)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "summary.md"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(place / "output.txt"))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(place))
    worse = invoke(
        "check", "--json", "--github", "--junit", "j.xml", "--markdown", "m.md", "--json-file", "c.json", code=6
    )
    expected = {
        "file": ("fail", 8),
        "accuracy.min": ("pass", 10),
        "accuracy.max_drop": ("fail", 11),
        "accuracy.max_drop from baseline": ("fail", 11),
        "latency.ratio": ("fail", 13),
        "max_growth.file": ("fail", 15),
        "max_growth.macs": ("fail", 16),
        "max_flips": ("fail", 17),
    }
    document = json.loads((place / "c.json").read_text())
    assert {v["limit"]: (v["verdict"], v["line"]) for v in document["verdicts"]} == expected
    by_limit = {v["limit"]: v for v in document["verdicts"]}
    assert by_limit["file"]["value"] == by_limit["file"]["allowed"] + 1
    assert by_limit["accuracy.max_drop from baseline"]["value"] == pytest.approx(0.02)
    assert "40 lost, 0 gained" in by_limit["accuracy.max_drop from baseline"]["detail"]
    annotated = [line for line in worse.stderr.splitlines() if line.startswith("::error ")]
    assert len(annotated) == 7
    assert any(a.startswith("::error file=bmcompress.budget.yaml,line=8,title=net%3A file::") for a in annotated)
    assert (place / "summary.md").read_text() == (place / "m.md").read_text()
    assert (place / "m.md").read_text().startswith("<!-- bmcompress:check -->\n### bmcompress check failed")
    assert (place / "output.txt").read_text() == "verdict=fail\nreport=m.md\n"
    xmlschema.XMLSchema(str(SCHEMA)).validate(str(place / "j.xml"))
    assert ElementTree.parse(place / "j.xml").getroot().attrib["failures"] == "7"

    refused = invoke("baseline", "update", code=6)
    assert "was not written" in refused.stderr
    assert load_baseline("bmcompress.baseline.json").artifacts["net"].metrics["accuracy"].value == 0.9
    shutil.copy("bmcompress.baseline.json", "old.json")
    invoke("baseline", "update", "--force")
    shown = invoke("baseline", "diff", "old.json").stdout
    assert "flips" in shown and "2.00%" in shown and "-0.02" in shown
    assert "accuracy" in invoke("baseline", "show").stdout


def test_quality_alone_takes_no_latency_runs_and_other_samples_are_not_paired(place):
    budget = """\
artifacts: {net: net.onnx}
data: {test: {type: npz, path: data.npz, x: x_test, y: y_test}}
budgets:
  - {artifact: net, accuracy: {max_drop: 5 pp}, f1: {min: 0.8}, max_flips: 5%}
  - {artifact: net, level: warn, file: 1}
  - {artifact: net, accuracy: {min: 0.5}}
"""
    Path("bmcompress.budget.yaml").write_text(budget)
    first = verdicts(invoke("check", "--json"))
    assert first["accuracy.max_drop from baseline"] == ("skipped", 4)
    assert first["file"] == ("warn", 5)
    invoke("baseline", "update")
    assert load_baseline("bmcompress.baseline.json").artifacts["net"].latency == []
    shutil.copy("worse.onnx", "net.onnx")
    drop = next(v for v in json.loads(invoke("check", "--json", code=6).stdout)["verdicts"] if "max_drop" in v["limit"])
    assert drop["verdict"] == "pass" and drop["value"] == pytest.approx(0.02) and "McNemar" in drop["detail"]
    broken = verdicts(invoke("check", "--json", code=6))
    assert broken["accuracy.regression"] == ("fail", 6)  # nobody limited that drop, and it is no accident
    write_samples(Path("data.npz"), 1500, (150, 180))
    other = {v["limit"]: v for v in json.loads(invoke("check", "--json", code=6).stdout)["verdicts"]}
    assert "unpaired" in other["accuracy.max_drop from baseline"]["detail"]
    assert other["max_flips"]["verdict"] == "fail" and "not those of the baseline" in other["max_flips"]["detail"]
    assert "accuracy.regression" not in other
    invoke("baseline", "update")  # what the old one cannot tell is no reason against a new one


def test_milliseconds_count_on_the_machine_that_set_them(place):
    budget = """\
artifacts: {net: net.onnx}
budgets:
  - artifact: net
    latency: {p50: 10 s}
"""
    Path("bmcompress.budget.yaml").write_text(budget)
    assert verdicts(invoke("check", "--json"))["latency.p50"] == ("skipped", 4)
    invoke("baseline", "update")
    assert verdicts(invoke("check", "--json"))["latency.p50"] == ("pass", 4)
    Path("bmcompress.budget.yaml").write_text(budget.replace("10 s", "1 us"))
    assert verdicts(invoke("check", "--json", code=6))["latency.p50"] == ("fail", 4)
    kept = Path("bmcompress.baseline.json")
    kept.write_text(kept.read_text().replace('"fingerprint_id": "fp1:', '"fingerprint_id": "fp1:other'))
    found = json.loads(invoke("check", "--json").stdout)["verdicts"][0]
    assert found["verdict"] == "skipped" and "another machine" in found["detail"]


def test_an_unreadable_baseline_is_never_no_baseline(place):
    invoke("baseline", "update")
    kept = Path("bmcompress.baseline.json")
    whole = kept.read_text()
    kept.write_text(whole[: len(whole) // 2])
    for arguments in (["check"], ["check", "--size-only"], ["baseline", "update"], ["baseline", "update", "--force"]):
        assert "the baseline is not JSON" in invoke(*arguments, code=3).stderr
    kept.write_text("<<<<<<< HEAD\n" + whole)
    assert "unfinished merge" in invoke("check", code=3).stderr
    kept.unlink()
    assert "there is no baseline" in invoke("check", "--baseline", kept, code=3).stderr
    assert "there is no baseline" in invoke("baseline", "show", code=3).stderr


def test_own_metrics_have_budgets(place):
    (place / "boxes.py").write_text(
        "def recall_of_zero(labels, outputs):\n"
        "    import numpy as np\n"
        "    mine = np.asarray(labels[0]) == 0\n"
        "    return float((np.asarray(outputs[0])[mine].argmax(-1) == 0).mean())\n"
    )
    budget = """\
artifacts: {net: net.onnx}
data: {test: {type: npz, path: data.npz, x: x_test, y: y_test}}
metrics: {zeros: "boxes:recall_of_zero"}
budgets:
  - artifact: net
    metrics: {zeros: {min: 0.5, max_drop: 20 pp}}
    top_5: {min: 0.2}
    max_abs_diff: {max: 0}
"""
    Path("bmcompress.budget.yaml").write_text(budget)
    assert "--allow-import" in invoke("check", code=3).stderr
    env = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", "from compress.cli import main; main()", "check", "--json", "--allow-import", "boxes"],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr  # there is no difference from the first artifact: it is that one
    found = {v["limit"]: (v["verdict"], v["line"]) for v in json.loads(done.stdout)["verdicts"]}
    assert found["zeros.min"] == ("pass", 6)
    assert found["zeros.max_drop from baseline"] == ("skipped", 6)
    assert found["max_abs_diff.max"] == ("fail", 8)
    Path("bmcompress.budget.yaml").write_text(budget.replace('metrics: {zeros: "boxes:recall_of_zero"}\n', ""))
    assert "no metric of your own is called `zeros`" in invoke("check", code=3).stderr


def test_sizes_alone_need_no_framework(place):
    """What takes its time is not imported, in the child that reads the file neither; benchmarks/startup.py times it."""
    invoke("baseline", "update")
    script = (
        "import sys\n"
        "sys.argv = ['bmcompress', 'check', '--size-only', '--json']\n"
        "from compress.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'tensorflow', 'keras', 'numpy', 'scipy', 'onnx', 'onnxruntime', 'ai_edge_litert'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"
    limits = {v["limit"] for v in json.loads(done.stdout)["verdicts"]}
    assert limits == {"file", "max_growth.file", "max_growth.macs"}
    script = (
        "import sys\n"
        "from compress.measure.size import read_size\n"
        "read_size('net.onnx')\n"
        "print(sorted({'tensorflow', 'keras', 'scipy', 'onnxruntime', 'ai_edge_litert'} & set(sys.modules)))\n"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
