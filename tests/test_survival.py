"""What counts as lost between two models, and between a model and its file."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import compress
from compress.errors import ExportError, PassError
from compress.measure.results import FileSize, KernelSize
from compress.models.kernel_counts import KernelCount
from compress.passes.base import Pass
from compress.passes.finetune import FineTuning
from compress.survival import KernelStructure, describe_survival, read_structure, require_in_file, require_kept

L = keras.layers


def kernel(zeros=0, values=100, clusters=None, name="conv/kernel", shape=(10, 20), quantized=False, in_channel=None):
    count = KernelCount(name, shape, zeros, values, values if in_channel is None else in_channel)
    return KernelStructure(count, clusters, quantized)


def file_of(*kernels: KernelStructure) -> FileSize:
    numbers = dict.fromkeys(
        ("file_bytes", "gzip_bytes", "zstd_bytes", "parameters", "nonzero_parameters", "kernel_weights", "distinct_weights", "macs", "nonzero_kernel_weights"), 5
    )  # fmt: skip
    sizes = [KernelSize(**vars(each.count)) for each in kernels]
    return FileSize(**numbers, sparsity=0.1, macs_partial=False, kernels=sizes)


def test_zeros_and_clusters_of_a_model():
    model = keras.Sequential(
        [keras.Input((6,)), L.Dense(4, name="sparse"), L.Dense(8, name="shared"), L.Dense(3, name="new")]
    )
    sparse, shared = np.random.default_rng(0).normal(size=(6, 4)), np.tile([0.5, -0.5], 16).reshape(4, 8)
    sparse[:3] = 0
    for layer, values in zip(model.layers, (sparse, shared, np.zeros((8, 3))), strict=True):
        layer.kernel.assign(values)
    found = read_structure(model)
    assert [(each.count.name, each.count.zeros, each.clusters, each.is_structured) for each in found] == [
        ("sparse/kernel", 12, None, True),
        ("shared/kernel", 0, 2, True),
        ("new/kernel", 24, None, False),  # all zeros: nothing was pruned
    ]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (kernel(zeros=80), kernel(zeros=79), "conv/kernel had 80 zeros among 200 weights and has 79"),
        (kernel(zeros=80), kernel(zeros=81), None),
        (kernel(values=8, clusters=8), kernel(values=9), "conv/kernel had 8 distinct values and has 9"),
        (kernel(values=8, clusters=8), kernel(values=8), None),
        # Folded, each channel has a factor of its own.
        (kernel(values=8, clusters=8), kernel(values=90, in_channel=8, quantized=True), None),
        (kernel(values=8, clusters=8), kernel(values=90, in_channel=9, quantized=True), "has 9"),
        (kernel(values=90, clusters=8, in_channel=8), kernel(values=95, in_channel=8), None),
        # Renamed: compared by size.
        (kernel(zeros=80), kernel(zeros=79, name="expanded/kernel"), "conv/kernel had 80 zeros"),
        (kernel(zeros=80), kernel(zeros=0, name="other/kernel", shape=(3, 3)), None),
        (kernel(zeros=0), kernel(zeros=0), None),
        (kernel(zeros=200), kernel(zeros=0), None),
    ],
)
def test_what_a_pass_may_lose(before, after, message):
    if message is None:
        return require_kept([before], [after], "finetune")
    with pytest.raises(PassError, match=message) as caught:
        require_kept([before], [after], "finetune")
    assert "Run finetune before" in caught.value.help
    return None


def test_kernels_of_one_size_are_compared_as_a_group():
    model = [kernel(zeros=50, name="a"), kernel(zeros=150, name="b"), kernel(zeros=0, name="c")]
    require_in_file(model, file_of(kernel(zeros=0), kernel(zeros=150), kernel(zeros=51)), "net.onnx")
    with pytest.raises(ExportError, match=r"net.onnx .* a had 50 zeros among 200 weights and has 49"):
        require_in_file(model, file_of(kernel(zeros=49), kernel(zeros=150), kernel(zeros=0)), "net.onnx")
    require_in_file(model, file_of(kernel(zeros=150)), "net.onnx")  # equal kernels are stored once
    clustered = [kernel(values=4, clusters=4, name="a"), kernel(values=16, clusters=16, name="b")]
    require_in_file(clustered, file_of(kernel(values=99, in_channel=16), kernel(values=9, in_channel=4)), "net.onnx")
    with pytest.raises(ExportError, match="a had 4 distinct values and has 5"):
        require_in_file(clustered, file_of(kernel(in_channel=16), kernel(in_channel=5)), "net.onnx")


def test_the_sentence_on_a_file():
    sentence = describe_survival(
        [kernel(zeros=80, values=8, clusters=8)], file_of(kernel(zeros=90, values=30, in_channel=8)), "net.tflite"
    )
    assert sentence == (
        "net.tflite: 90 zeros in its kernels, 80 of 200 in the model; at most 30 distinct values in a kernel, 8 in one "
        "of its channels"
    )


class Forgetful(FineTuning):
    """Fine-tuning that does not know of earlier passes."""

    def apply(self, model, data):
        copy = compress.copy_model(model)
        for layer in copy.layers:
            if hasattr(layer, "kernel"):
                layer.kernel.assign(layer.kernel + 0.1)
        return copy


def test_a_run_stops_at_the_pass_that_loses_zeros(workspace, tmp_path, monkeypatch):
    source = {
        "schema": "bmcompress/recipe/v1",
        "name": "test",
        "model": {"path": str(workspace / "net.keras")},
        "data": {"train": f"npz:{workspace / 'data.npz'}?split=train"},
        "passes": [{"type": "prune", "sparsity": 0.5, "epochs": 0}, {"type": "finetune", "epochs": 1}],
        "benchmark": {"enabled": False},
    }
    monkeypatch.setattr(FineTuning, "apply", Forgetful.apply)
    with pytest.raises(PassError, match=r"finetune to keep .* conv/kernel had 18 zeros among 36 weights and has 0"):
        compress.run(source, tmp_path / "run")
    monkeypatch.setattr(FineTuning, "changes_structure", True)
    assert compress.run(source, tmp_path / "run").manifest.status == "done"
    assert Pass.changes_structure is False


def test_a_run_notes_what_the_files_hold(workspace, tmp_path):
    source = {
        "schema": "bmcompress/recipe/v1",
        "name": "test",
        "model": {"path": str(workspace / "net.keras")},
        "data": {"train": f"npz:{workspace / 'data.npz'}?split=train"},
        "passes": [{"type": "prune", "sparsity": 0.75, "epochs": 0}, {"type": "cluster", "clusters": 4, "epochs": 0}],
        "exports": [{"format": "tflite", "sparse": "auto"}, {"format": "onnx"}],
        "benchmark": {"enabled": False},
    }
    manifest = compress.run(source, tmp_path / "run").manifest
    for name in ("model.tflite", "model.onnx"):
        (note,) = [each for each in manifest.notes if each.startswith(name)]
        assert "zeros in its kernels" in note
        assert "at most 4 distinct values in a kernel, 4 in one of its channels" in note
    (step,) = [each for each in manifest.steps if each.id == "cluster"]
    assert {each["path"]: each["distinct"] for each in step.statistics["kernels"]} == {
        "conv/kernel": 4,
        "head/kernel": 4,
    }
    sizes = {each.file: each.size for each in manifest.benchmark.results}
    assert [each.distinct for each in sizes["model.onnx"].kernels] == [4, 4]
