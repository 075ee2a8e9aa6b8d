"""Zeros and clusters through every later training and quantization, in any sensible order, and in the files."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import compress
from compress.deploy.exporting import export_models
from compress.measure.size import read_size
from compress.models.walking import list_kernels
from compress.passes.distill import Distillation
from compress.passes.finetune import FineTuning
from compress.passes.holding import hold_structure
from compress.passes.ptq import PostTrainingQuantization
from compress.passes.qat import QuantizationAwareTraining
from compress.survival import read_structure, require_kept

L = keras.layers
TRAINING = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2}
CLUSTERS = 6


@pytest.fixture(scope="module")
def float_net(blobs):
    """A trained net with batch norm behind and before kernels, one of whose factors is negative."""
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 1))
    y = L.ReLU()(L.BatchNormalization(name="norm")(L.Conv2D(8, 3, use_bias=False, name="conv")(x)))
    y = L.BatchNormalization(name="before")(L.MaxPooling2D(2)(y))  # folds forward, into what is clustered
    y = L.Conv2D(16, 2, activation="relu", name="behind")(y)
    model = keras.Model(x, L.Dense(4, activation="softmax", name="head")(L.Flatten()(y)))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(*blobs[0], epochs=3, batch_size=32, verbose=0)
    gamma = model.get_layer("norm").gamma
    gamma.assign(gamma.numpy() * np.where(np.arange(8) == 2, -1, 1) * np.linspace(0.5, 2, 8))
    return model


@pytest.fixture(scope="module")
def compressed(float_net):
    """The net with 70 % zeros and six values in each kernel."""
    return compress.cluster_weights(compress.prune_weights(float_net, 0.7), CLUSTERS)


def structure_of(model):
    return {each.count.name: (each.count.zeros, each.clusters, each.count.distinct) for each in read_structure(model)}


def test_nothing_is_held_where_there_is_nothing(float_net):
    assert hold_structure(float_net) == []


@pytest.mark.parametrize("item", [FineTuning(**TRAINING), Distillation(teacher="input", alpha=0.5, **TRAINING)])
def test_float_training_keeps_zeros_and_clusters(compressed, blobs, item):
    result = item(compressed, blobs[0])
    before, after = structure_of(compressed), structure_of(result)
    assert {path: zeros for path, (zeros, *_) in before.items()} == {path: zeros for path, (zeros, *_) in after.items()}
    assert all(distinct <= CLUSTERS for _, _, distinct in after.values())
    assert any(
        not np.array_equal(old.variable, new.variable)
        for old, new in zip(list_kernels(compressed), list_kernels(result), strict=True)
    )


@pytest.fixture(scope="module", params=["ptq", "qat", "qat with a teacher", "ptq then qat"])
def quantized(request, compressed, blobs):
    calibration = {"samples": 64}
    if request.param == "ptq":
        return PostTrainingQuantization(**calibration)(compressed, blobs[0])
    if request.param == "ptq then qat":
        model = PostTrainingQuantization(**calibration)(compressed, blobs[0])
        return QuantizationAwareTraining(**TRAINING)(model, blobs[0])
    teacher = compressed if request.param == "qat with a teacher" else None
    return QuantizationAwareTraining(teacher=teacher, **TRAINING, **calibration)(
        compress.copy_model(compressed), blobs[0]
    )


def test_integers_are_as_few_as_clusters(compressed, quantized):
    before, after = structure_of(compressed), structure_of(quantized)
    require_kept(read_structure(compressed), read_structure(quantized), "qat")
    for path, (zeros, clusters, _) in before.items():
        assert after[path][0] >= zeros, path
        # The factor of one channel is negative: its integers are those of the others with the other sign.
        assert after[path][2] <= (2 * CLUSTERS if path == "conv/kernel" else CLUSTERS), path
        assert clusters == CLUSTERS


def test_files_hold_every_zero_and_no_more_integers(compressed, quantized, blobs, tmp_path):
    paths = {name: tmp_path / f"net.{name}" for name in ("tflite", "onnx")}
    export_models(quantized, paths, samples=blobs[1][0])
    before = structure_of(compressed)
    for path in paths.values():
        size = read_size(str(path))["size"]
        found = {int(np.prod(kernel["shape"])): kernel for kernel in size["kernels"]}
        for kernel in list_kernels(compressed):
            held = found[int(np.prod(kernel.variable.shape))]
            assert held["zeros"] >= before[kernel.path][0], kernel.path
            assert held["distinct_in_channel"] <= CLUSTERS


def test_pruned_weights_stay_zero_in_integers(float_net, blobs, tmp_path):
    """PQAT: no zero is lost in the file, and none moves."""
    pruned = compress.prune_weights(float_net, 0.7)
    result = QuantizationAwareTraining(samples=64, **TRAINING)(pruned, blobs[0])
    for old, new in zip(list_kernels(pruned), read_structure(result), strict=False):
        assert new.count.zeros >= np.sum(old.variable.numpy() == 0)
    export_models(result, {"tflite": tmp_path / "net.tflite"}, samples=blobs[1][0])
    size = read_size(str(tmp_path / "net.tflite"))["size"]
    assert size["kernel_weights"] - size["nonzero_kernel_weights"] >= sum(
        int(np.sum(kernel.variable.numpy() == 0)) for kernel in list_kernels(pruned)
    )


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"equalise": True}, {"correct_biases": True}, {"scheme": "int8_weights"}]
)
def test_options_of_quantization_split_no_cluster(compressed, blobs, options):
    result = PostTrainingQuantization(samples=64, **options)(compressed, blobs[0])
    require_kept(read_structure(compressed), read_structure(result), "ptq")
    assert structure_of(result)["behind/kernel"][2] <= CLUSTERS


def test_learned_rounding_leaves_clusters_alone_and_says_so(compressed, blobs):
    with pytest.raises(compress.BmcompressError, match="behind: is clustered: its clusters would be split"):
        PostTrainingQuantization(rounding="gptq", samples=32)(compressed, blobs[0])
    item = PostTrainingQuantization(rounding="adaround", rounding_steps=20, samples=32)
    result = item(compressed, blobs[0])
    require_kept(read_structure(compressed), read_structure(result), "ptq")
    assert any("behind is clustered" in note for note in item.notes(result))


@pytest.mark.parametrize("rounding", ["adaround", "gptq"])
def test_learned_rounding_moves_no_zero(float_net, blobs, rounding):
    pruned = compress.prune_weights(float_net, 0.7)
    steps = {"rounding_steps": 20} if rounding == "adaround" else {}
    result = PostTrainingQuantization(rounding=rounding, bits=4, samples=32, **steps)(pruned, blobs[0])
    require_kept(read_structure(pruned), read_structure(result), "ptq")
