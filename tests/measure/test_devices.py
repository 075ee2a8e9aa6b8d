"""Devices that are there or not, and meters of energy: what is missing is said, and never the CPU in its place."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from compress.deploy import devices
from compress.deploy.onnx_runtime import OnnxRuntime
from compress.errors import SetupError, UsageError
from compress.measure import energy, gpu_memory
from compress.measure.benchmarking import benchmark_files
from compress.measure.inputs import write_inputs
from compress.measure.onnx_profile import count_by_provider


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("devices") / "net.onnx"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4).ravel())
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "a"), helper.make_node("Relu", ["h"], ["y"], "b")]
    graph = helper.make_graph(nodes, "net", [x], [y], [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_a_device_that_the_build_lacks_is_an_error(file):
    with pytest.raises(SetupError, match="has no CUDAExecutionProvider here") as error:
        OnnxRuntime(file, 1, device="gpu")
    assert "onnxruntime-gpu" in error.value.help


def test_a_provider_that_falls_back_to_the_cpu_is_an_error(file, monkeypatch):
    """The build has the provider, but it cannot start: ONNX Runtime then goes on with the CPU."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    session = onnxruntime.InferenceSession
    asked = []

    def on_cpu(path, options, providers):
        asked.append(providers)
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    with pytest.raises(SetupError, match="could not start CUDAExecutionProvider and fell back"):
        OnnxRuntime(file, 1, device="gpu")
    assert asked == [["CUDAExecutionProvider", "CPUExecutionProvider"]]


def test_keras_says_when_its_backend_sees_no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "_sees_gpu", lambda backend: False)
    with pytest.raises(SetupError, match="backend jax sees no GPU"):
        devices.keras_device("gpu", "jax")
    monkeypatch.setattr(devices, "_sees_gpu", lambda backend: True)
    assert devices.keras_device("gpu", "jax") == "gpu:0"
    with pytest.raises(SetupError, match="does not run on openvino"):
        devices.keras_device("openvino", "jax")


def test_operators_by_provider(file):
    assert count_by_provider(str(file), "cpu", 3) == {"CPUExecutionProvider": 2}


def test_a_benchmark_goes_on_without_the_device(file):
    options = {"processes": 1, "pairs": 5, "memory": False}
    report = benchmark_files([file], devices=("cpu", "openvino"), batch=[1, 2], energy=True, **options)
    (result,) = report.results
    assert [(each.device, each.batch) for each in result.latency] == [("cpu", 1), ("cpu", 2)]
    assert "OpenVINOExecutionProvider" in result.reasons["latency.openvino"]
    assert any("no latency on openvino" in warning for warning in report.warnings)
    assert (result.energy.joules is None) == ("joules" in result.energy.reasons)
    with pytest.raises(UsageError, match="expected a device of cpu, gpu, tensorrt, openvino"):
        benchmark_files([file], devices=("tpu",), **options)


def test_joules_of_a_run(tmp_path):
    """Two packages, one of whose counters starts again from 0 while the file runs."""
    for number, (start, size) in enumerate([(5_000_000, 10_000_000), (9_000_000, 10_000_000)]):
        folder = tmp_path / f"intel-rapl:{number}"
        folder.mkdir()
        (folder / "energy_uj").write_text(str(start))
        (folder / "max_energy_range_uj").write_text(str(size))
        (tmp_path / f"intel-rapl:{number}:0").mkdir()  # a part of a package, which counts it already
    meter = energy.open_rapl(tmp_path)
    before = meter()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("6000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000")
    assert meter() - before == pytest.approx(1.0 + 2.0)
    ticks = iter(range(1000))
    runs = []
    assert energy.per_run(lambda: runs.append(1), lambda: float(next(ticks)), seconds=0.01) == pytest.approx(
        1 / (len(runs) - 5)
    )
    with pytest.raises(SetupError, match="shows no energy counter"):
        energy.open_rapl(tmp_path / "none")


def test_memory_of_a_gpu_is_what_is_held_after_runs(monkeypatch, tmp_path):
    """NVML and the runtime are faked at the boundary: the file takes 100 bytes to open and 300 more to run."""
    held = {"bytes": 1000}

    class Runtime:
        inputs: ClassVar = [SimpleNamespace(name="x")]

        def __init__(self):
            held["bytes"] += 100

        def run(self, x):
            held["bytes"] = 1400

    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index, NVMLError=RuntimeError,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=held["bytes"]),
    )  # fmt: skip
    write_inputs(tmp_path, np.zeros((2, 3), "float32"))
    monkeypatch.setattr(gpu_memory, "open_file", lambda *arguments: Runtime())
    arguments = {
        "path": "m.onnx",
        "inputs": str(tmp_path),
        "threads": 1,
        "batch": 1,
        "device": "gpu",
        "allow_imports": [],
    }
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_memory.measure(**arguments) == {
        "held_bytes": None,
        "reasons": {"held_bytes": "memory of a GPU needs NVML"},
    }
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_memory.measure(**arguments) == {"held_bytes": 400}


def test_a_gpu_that_is_not_there_has_no_memory(file):
    (found,) = benchmark_files([file], devices=("gpu",), latency=True, processes=1, pairs=30).results
    assert found.gpu_memory.held_bytes is None and found.gpu_memory.reasons["held_bytes"]
    (found,) = benchmark_files([file], latency=False).results
    assert found.gpu_memory is None
