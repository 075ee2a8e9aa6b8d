"""What CI shows of a check: JUnit, Markdown and annotations, also with names that want to be something else."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import xmlschema

from compress.gate.budgets import Budget
from compress.gate.github import annotations, error_annotation, write_outputs
from compress.gate.junit import junit_xml
from compress.gate.markdown import MARKER, MOST_BYTES, check_markdown
from compress.gate.verdicts import Line, Verdict, overall, raise_for_verdicts, verdict_rows, worst_first
from compress.text import one_line, printable, without_commands

SCHEMA = xmlschema.XMLSchema(str(Path(__file__).parent / "schemas" / "junit-10.xsd"))

HOSTILE = (
    "<script>alert(1)</script>", "::error::all is well", "]]>", "\x1b[2J\x1b]0;owned\x07", "a|b`c`*d*_e_", "@everyone #1",
    "line\r\n::set-output name=verdict::pass", "##[error]x", "%0A::error::x", "\x00\x0b\ufffe\ud800", "\u202egnp.exe",
    "[a](javascript:b)", "![](http://x/y.png)", "https://evil.example", "<!-- bmcompress:check -->", "x" * 5000,
)  # fmt: skip


def verdict(outcome="fail", name="net", limit="file", value=2.0, allowed=1.0, detail="", line=3):
    return Verdict(
        artifact=name, limit=limit, value=value, allowed=allowed, verdict=outcome, detail=detail, line=line
    )  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text(name, monkeypatch, tmp_path):
    lines = [verdict(o, name, f"{name}.accuracy.min", detail=name) for o in ("fail", "warn", "pass", "skipped")]

    xml = junit_xml(lines, 1.5, "2026-11-24T10:00:00")
    root = ElementTree.fromstring(xml)
    SCHEMA.validate(ElementTree.ElementTree(root))
    assert len(root.findall(".//testcase")) == 4
    assert {element.tag for element in root.iter()} == {
        "testsuites", "testsuite", "testcase", "failure", "skipped", "system-out",
    }  # fmt: skip
    assert root.find(".//testcase").attrib["classname"] == one_line(f"{name}.{name}.accuracy")

    text = check_markdown(lines, [name])
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    assert len(rows) == 5 and all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)
    body = text.removeprefix(MARKER)
    assert not re.search(r"[<>`@\[\]\x00-\x09\x0b-\x1f\u202e]|https?:", body), body
    assert text.startswith(MARKER) and body.count("\n") == text.count("\n")

    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    for command in [*annotations(lines, str(tmp_path / "b.yaml")), error_annotation(name, "b.yaml")]:
        assert re.fullmatch(r"::(error|warning) file=b\.yaml(,line=3,title=[^:,\r\n]*)?::[^\r\n\x1b\x00]*", command)
    output = tmp_path / "output"
    monkeypatch.setenv("GITHUB_OUTPUT", str(output))
    write_outputs(lines, name)
    assert [line.partition("=")[0] for line in output.read_text(errors="surrogatepass").splitlines()] == [
        "verdict", "report",
    ]  # fmt: skip

    for line in without_commands(printable(f"{name}\n  {name}")).splitlines():
        assert not line.lstrip().startswith("::") and "##[" not in line and "\x1b" not in line


def test_five_hundred_broken_limits_fit():
    lines = [verdict(value=1 + i / 100, detail="long words " * 30, line=i) for i in range(500)]
    lines += [verdict("pass", name="fine")] * 20
    text = check_markdown(lines, ["a note"] * 1000)
    assert len(text.encode()) <= MOST_BYTES
    assert "20 pass, 500 fail" in text
    shown = text.count("**fail**")
    assert f"... and {520 - shown} more" in text and 100 < shown < 500
    assert "fine" not in text  # what passed goes first
    found = annotations(lines, "b.yaml")
    assert len(found) == 10
    assert found[0].startswith("::error file=b.yaml,line=499,")  # the worst
    assert found[-1] == "::error file=b.yaml::... and 491 more"
    ElementTree.fromstring(junit_xml(lines, 2000, "2026-11-24T10:00:00"))
    SCHEMA.validate(junit_xml(lines, 2000, "2026-11-24T10:00:00").decode())
    with pytest.raises(Exception, match="500 of 520 limits are broken: .*; and 490 more"):
        raise_for_verdicts(lines)


def test_the_worst_comes_first():
    lines = [
        verdict("pass"), verdict("skipped", limit="a"), verdict("inconclusive", limit="b"), verdict("warn", limit="c"),
        verdict(limit="near", value=1.1), verdict(limit="missing", value=None), verdict(limit="far", value=9.0),
    ]  # fmt: skip
    assert [v.limit for v in worst_first(lines)] == ["missing", "far", "near", "c", "b", "a"]
    assert [a.split("::")[1].split()[0] for a in annotations(lines, "b")] == [
        "error", "error", "error", "warning", "warning",
    ]  # fmt: skip
    assert overall(lines) == "fail"
    assert overall(lines[:3]) == "inconclusive"
    assert overall([verdict("pass"), verdict("warn"), verdict("skipped")]) == "pass"


def test_a_level_of_warning_never_fails():
    budget = Budget(artifact="net", file=1, accuracy={"min": 0.5, "level": "warn"}, latency={"ratio": 1.1})
    found = [
        Line(budget, 0, place, "x").verdict("fail", 1.0, 0.0)
        for place in (("accuracy", "min"), ("file",), ("latency", "ratio"))
    ]
    assert [v.verdict for v in found] == ["warn", "fail", "fail"]
    undecided = Line(budget, 0, ("accuracy", "min"), "x").verdict("inconclusive", 1.0, 0.0)
    raise_for_verdicts([found[0], undecided], strict=True)
    whole = budget.model_copy(update={"level": "warn"})
    assert Line(whole, 0, ("file",), "x").missing(1.0, "why").verdict == "warn"


def test_the_table_leaves_out_what_nobody_has():
    header, _ = verdict_rows([verdict()])
    assert "baseline" not in header
    header, rows = verdict_rows([verdict(), verdict().model_copy(update={"baseline": 12345.0})])
    assert rows[1][header.index("baseline")] == "12,345"
