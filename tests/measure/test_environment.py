"""The fingerprint changes with what decides latency, and holds nothing that names the machine."""

from __future__ import annotations

import getpass
import hashlib
import platform
from pathlib import Path

from compress.measure import environment


def test_fingerprint_is_stable_and_changes_with_each_fact():
    base = environment.fingerprint("EPYC", 2, [1], {"onnxruntime": "1.32.0"})
    facts = b'{"affinity_size": 2, "cpu": "EPYC", "runtimes": {"onnxruntime": "1.32.0"}, "threads": [1]}'
    assert base == "fp1:" + hashlib.sha256(facts).hexdigest()[:12]
    others = [
        environment.fingerprint("Xeon", 2, [1], {"onnxruntime": "1.32.0"}),
        environment.fingerprint("EPYC", 4, [1], {"onnxruntime": "1.32.0"}),
        environment.fingerprint("EPYC", 2, [1, 2], {"onnxruntime": "1.32.0"}),
        environment.fingerprint("EPYC", 2, [1], {"onnxruntime": "1.33.0"}),
    ]
    assert len({base, *others}) == 5
    assert environment.fingerprint("EPYC", 2, [2, 1], {}) == environment.fingerprint("EPYC", 2, [1, 2], {})


def test_environment_names_no_host_user_or_path():
    found = environment.describe_environment([1], {"onnxruntime": "1.32.0"}, {"onnx": {"threads": [1]}})
    assert found.packages["numpy"]
    assert found.affinity
    assert found.load_after is None
    text = found.model_dump_json()
    assert platform.node() not in text or len(platform.node()) < 4
    assert f'"{getpass.getuser()}"' not in text
    assert str(Path.home()) not in text


def test_container_limits_are_the_tightest_on_the_way_up(tmp_path):
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "outer" / "cpu.max").write_text("150000 100000\n")
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "outer" / "memory.max").write_text("max\n")
    (inner / "memory.max").write_text("536870912\n")
    assert environment._container_limits(tmp_path, "/outer/inner") == (1.5, 536870912)
    assert environment._container_limits(tmp_path, "/") == (None, None)
    assert environment._container_limits(tmp_path / "none", "/gone") == (None, None)


def test_missing_packages_are_left_out():
    assert environment.installed_versions(["numpy", "no-such-distribution"]).keys() == {"numpy"}
