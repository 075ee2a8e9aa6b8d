"""Verdicts as JUnit XML, which every CI server shows."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from compress.gate.verdicts import Verdict, tell
from compress.text import one_line


def junit_xml(verdicts: Sequence[Verdict], seconds: float, created: str) -> bytes:
    """Return one test case for each verdict, in the schema of the Jenkins xUnit plugin.

    What is inconclusive or was skipped counts as skipped, a warning as passed with its message in `system-out`.

    Args:
        verdicts: of the check.
        seconds: that the check took.
        created: UTC, ISO 8601, without zone.
    """
    failures = sum(v.verdict == "fail" for v in verdicts)
    skipped = sum(v.verdict in ("inconclusive", "skipped") for v in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0", "time": f"{seconds:.3f}"}
    root = ElementTree.Element("testsuites", {"name": "bmcompress check", **counts})
    facts = {"skipped": str(skipped), "timestamp": created}
    suite = ElementTree.SubElement(root, "testsuite", {"name": "bmcompress", **counts, **facts})
    for verdict in verdicts:
        group, _, name = verdict.limit.rpartition(".")
        where = ".".join(filter(None, (verdict.artifact, group)))
        case = ElementTree.SubElement(suite, "testcase", {"classname": one_line(where), "name": one_line(name)})
        message = tell(verdict)
        if verdict.verdict == "fail":
            ElementTree.SubElement(case, "failure", {"type": "budget", "message": message}).text = message
        elif verdict.verdict in ("inconclusive", "skipped"):
            ElementTree.SubElement(case, "skipped", {"message": f"{verdict.verdict}: {message}"})
        else:
            ElementTree.SubElement(case, "system-out").text = f"{verdict.verdict}: {message}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"
