"""Cold start and memory of real files, and that neither brings in TensorFlow."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from compress.measure.inputs import write_inputs
from compress.measure.startup import measure_runtime_peak, measure_startup, peak_rss_bytes


def test_memory_holds_the_weights_and_not_the_parent(make_dense_onnx, tmp_path):
    path = make_dense_onnx("net", np.ones((8, 2000)), np.ones((2000, 2000)))  # 16 MB of weights
    write_inputs(tmp_path / "inputs", [np.ones((4, 8), np.float32)])
    runtime = measure_runtime_peak("onnx")
    ballast = np.ones(60_000_000)  # 480 MB here must not show there
    startup, memory = measure_startup(path, tmp_path / "inputs", runtime)
    assert 16_000_000 < memory.over_runtime_bytes < 200_000_000
    assert memory.peak_rss_bytes == runtime + memory.over_runtime_bytes < ballast.nbytes
    assert min(startup.import_ms, startup.load_ms, startup.first_inference_ms) > 0


def test_peak_is_read_from_the_status_file(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n")
    assert peak_rss_bytes(str(tmp_path / "status")) == 2048 * 1024
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert peak_rss_bytes(str(tmp_path / "status")) is None
    assert peak_rss_bytes(str(tmp_path / "none")) is None


def test_children_import_no_tensorflow(make_dense_tflite, make_dense_onnx):
    files = [str(make_dense_tflite("net", np.ones((3, 4)))), str(make_dense_onnx("net", np.ones((4, 3))))]
    code = (
        "import sys\n"
        "import compress.measure.latency, compress.measure.benchmarking, compress.measure.size\n"
        "from compress.measure.startup import import_runtime\n"
        "from compress.measure.children import open_file\n"
        "assert not {'onnxruntime', 'ai_edge_litert', 'keras'} & set(sys.modules)\n"
        "import_runtime('tflite'), import_runtime('onnx')\n"
        f"[open_file(path) for path in {files!r}]\n"
        "from compress.measure.size import read_size\n"
        f"[read_size(path) for path in {files!r}]\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
