"""What inspection reads from files: parameters as Keras counts them, MACs worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import hostile_files
import keras
import numpy as np
import pytest
import sample_models

from compress.errors import UsageError
from compress.models.inspection import LayerSummary, ModelSummary, inspect_model

MACS = {
    # conv1 16*108, separable 4*(36+24), depthwise 48, transposed 240, grouped 4*10, dilated 4*180, head 10
    "image": 1728 + 240 + 48 + 240 + 40 + 720 + 10,
    "operations": 48 + 48 + 16,
    "nested": 2 * (4 * 54) + 2 * 60 + 10,
    # attention: 12*(4*64) + 12*12*2*(4+4); both 12*2*(160+100); each 12*30; gru 12*(36+48); head 8
    "text": 3072 + 2304 + 6240 + 360 + 1008 + 8,
    # gqa 6*(128+64+64+128) + 6*6*4*(4+4); spectral 6*64; stack 6*(132+84); einsum 6*20; dot 6*6*(5+5)
    "attention": 2304 + 1152 + 384 + 1296 + 120 + 360,
    # memory 5*36*(216+324); conv3d 125*24; frames 5*(9*36+36); conv1d 5*12
    "video": 97_200 + 3000 + 1800 + 60,
    "mixed": 12 + 6,
    "brain_float": 12,
    "quantized": 12,
    "strings": 0,
    "statistics": 6,
    "late_built": 21 + 6,
    "dynamic": 8,
}
PARTIAL = {"attention": ("Matmul",), "dynamic": ("Conv2D (shape or weights unknown)",)}


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[keras.Model, ModelSummary]]:
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for name, make in {**sample_models.KERAS_ONLY, **sample_models.CUSTOM}.items():
        model = make()
        model.save(folder / f"{name}.keras")
        found[name] = (model, inspect_model(folder / f"{name}.keras"))
    return found


def row(summary: ModelSummary, path: str) -> LayerSummary:
    return next(layer for layer in summary.layers if layer.path == path)


@pytest.mark.parametrize("name", [*sample_models.KERAS_ONLY, *sample_models.CUSTOM])
def test_parameters_are_those_that_keras_counts(
    name: str, summaries: dict[str, tuple[keras.Model, ModelSummary]]
) -> None:
    model, summary = summaries[name]
    assert summary.parameters == model.count_params()
    trainable = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    assert summary.trainable_parameters == trainable
    assert summary.nonzero == sum(int(np.count_nonzero(variable.numpy())) for variable in model.weights)
    assert summary.name == model.name
    json.dumps(summary.to_dict())


@pytest.mark.parametrize("name", MACS)
def test_macs_are_those_worked_out_by_hand(name: str, summaries: dict[str, tuple[keras.Model, ModelSummary]]) -> None:
    summary = summaries[name][1]
    assert summary.macs == MACS[name]
    assert summary.macs_missing == PARTIAL.get(name, ())
    assert summary.macs_partial == (name in PARTIAL)


@pytest.mark.parametrize("name", sample_models.KERAS_ONLY)
def test_output_shapes_are_those_of_keras(name: str, summaries: dict[str, tuple[keras.Model, ModelSummary]]) -> None:
    model, summary = summaries[name]
    for layer in summary.layers:
        if "/" not in layer.path and layer.output_shape is not None and layer.path in {x.name for x in model.layers}:
            assert layer.output_shape[1:] == tuple(model.get_layer(layer.path).output.shape)[1:], layer.path
    shapes = [tuple(tensor.shape) for tensor in model.outputs]
    known = [output.shape for output in summary.outputs]
    assert len(known) == len(shapes)
    assert all(found in (None, expected) for found, expected in zip(known, shapes, strict=True))
    assert [given.shape for given in summary.inputs] == [tuple(tensor.shape) for tensor in model.inputs]


@pytest.mark.parametrize(
    ("make", "parameters", "macs"),
    [
        (keras.applications.MobileNetV2, 3_538_984, 300_774_272),  # published: 300 M
        (keras.applications.ResNet50, 25_636_712, 3_857_973_248),  # published: 3.86 G
    ],
)
def test_known_networks(make: object, parameters: int, macs: int, tmp_path: Path) -> None:
    make(weights=None).save(tmp_path / "model.keras")  # type: ignore[operator]
    summary = inspect_model(tmp_path / "model.keras")
    assert (summary.parameters, summary.macs, summary.macs_partial) == (parameters, macs, False)
    assert summary.inputs[0].shape == (None, 224, 224, 3)
    assert summary.outputs[0].shape == (None, 1000)


def test_nested_layers_are_named_by_their_path(
    summaries: dict[str, tuple[keras.Model, ModelSummary]],
) -> None:
    summary = summaries["nested"][1]
    paths = [layer.path for layer in summary.layers]
    assert paths == ["tower/encoder/conv1", "tower/encoder/flat", "tower/top", "joined", "score"]
    conv = row(summary, "tower/encoder/conv1")
    assert (conv.calls, conv.macs, conv.parameters) == (2, 432, 57)
    assert conv.input_shapes == ((None, 4, 4, 2),)
    assert conv.output_shape == (None, 2, 2, 3)
    assert [kernel.path for kernel in conv.kernels] == ["tower/encoder/conv1/kernel"]


def test_layers_inside_layers_are_counted_in_their_row(
    summaries: dict[str, tuple[keras.Model, ModelSummary]],
) -> None:
    summary = summaries["text"][1]
    assert [kernel.path for kernel in row(summary, "mha").kernels] == [
        f"mha/{part}/kernel" for part in ("key", "attention_output", "query", "value")
    ]
    assert [kernel.path for kernel in row(summary, "both").kernels] == [
        "both/backward_inner/lstm_cell/kernel",
        "both/backward_inner/lstm_cell/recurrent_kernel",
        "both/forward_inner/lstm_cell/kernel",
        "both/forward_inner/lstm_cell/recurrent_kernel",
    ]
    assert row(summary, "both").parameters == 560
    assert row(summary, "embedding").kernels[0].path == "embedding/embeddings"


def test_what_passes_would_touch(summaries: dict[str, tuple[keras.Model, ModelSummary]]) -> None:
    def passes(name: str, path: str) -> tuple[str, str]:
        found = row(summaries[name][1], path).passes
        return found["prune"], found["distill"]

    assert passes("image", "separable") == ("2 kernels, 60 weights", "all 66 trainable weights")
    assert passes("image", "norm") == ("no: normalization", "all 4 trainable weights")
    assert passes("image", "scaled") == ("no: no weights", "no: no weights")
    assert passes("video", "conv3d") == ("no: frozen", "no: frozen")
    assert passes("statistics", "statistics") == ("no: normalization", "no: no trainable weights")
    assert passes("quantized", "int8") == ("no: the kernel is int8", "no: no trainable weights")
    assert passes("custom", "scale") == (
        "unknown layer type Scale: kernels are told by their names once it is loaded",
        "all 4 trainable weights",
    )
    assert passes("subclassed", "second")[0] == "unknown: the layers of a subclassed model are not in the file"


def test_patterns_choose_kernels(tmp_path: Path) -> None:
    path = hostile_files.write_archive(tmp_path / "model.keras")
    found = {layer.path: layer.passes["prune"] for layer in inspect_model(path, ("h*",), ("head",)).layers}
    assert found == {"hidden": "1 kernel, 12 weights", "head": "no: excluded by pattern"}
    found = {layer.path: layer.passes["prune"] for layer in inspect_model(path, ("*/kernel",), ()).layers}
    assert found == {"hidden": "1 kernel, 12 weights", "head": "1 kernel, 6 weights"}
    assert inspect_model(path, ("head",)).layers[0].passes["prune"] == "no: not included by pattern"
    with pytest.raises(UsageError, match="exclude: the pattern matches no layer"):
        inspect_model(path, exclude=("haed",))
    with pytest.raises(UsageError, match="include: the pattern matches no layer"):
        inspect_model(path, ("stem*",))


def test_sparsity_counts_kernels_only(tmp_path: Path) -> None:
    def write(file: object) -> None:
        hostile_files.write_weights(file)  # type: ignore[arg-type]
        file["layers/dense/vars/0"][:3] = 0  # type: ignore[index]

    summary = inspect_model(hostile_files.write_archive(tmp_path / "model.keras", weights=write))
    hidden = summary.layers[0]
    assert (hidden.kernels[0].size, hidden.kernels[0].zeros, hidden.kernel_sparsity) == (12, 9, 0.75)
    assert (hidden.nonzero, hidden.parameters) == (3, 15)
    assert summary.kernel_sparsity == 0.5
    assert (summary.nonzero, summary.weight_bytes) == (9, 92)


def test_totals_of_a_compiled_model(summaries: dict[str, tuple[keras.Model, ModelSummary]]) -> None:
    summary = summaries["operations"][1]
    assert (summary.optimizer, summary.loss) == ("AdamW", {"first": "Huber", "second": "mse"})
    assert summary.metrics == {"first": ["MeanAbsoluteError", "cosine_similarity"]}
    assert [(given.name, given.dtype) for given in summary.inputs] == [("a", "float32"), ("b", "float32")]
    assert [(given.name, given.shape) for given in summary.outputs] == [
        ("first", (None, 2)),
        ("second", (None, 6)),
    ]
    assert summary.keras_version == keras.__version__
    assert summary.weight_bytes == 4 * summary.parameters  # without the optimizer
    assert len(summary.sha256) == 64


def test_custom_classes_are_named(summaries: dict[str, tuple[keras.Model, ModelSummary]]) -> None:
    assert summaries["image"][1].custom_classes == ()
    assert summaries["custom"][1].custom_classes == ("sample_models.Scale",)
    assert summaries["custom"][1].macs_missing == ("Scale",)
    subclassed = summaries["subclassed"][1]
    assert subclassed.custom_classes == ("sample_models.Subclassed",)
    assert sorted(layer.path for layer in subclassed.layers) == ["first", "second"]
    assert subclassed.macs_partial


def test_dtypes_are_policies(summaries: dict[str, tuple[keras.Model, ModelSummary]]) -> None:
    assert [layer.dtype for layer in summaries["mixed"][1].layers] == ["mixed_float16", "float32"]
    assert summaries["quantized"][1].layers[0].dtype == "int8_from_float32"
    assert summaries["brain_float"][1].outputs[0].dtype == "bfloat16"


def test_files_without_names_are_matched_by_order(tmp_path: Path) -> None:
    """Early releases of Keras 3 store no names beside the weights."""

    def write(file: object) -> None:
        hostile_files.write_weights(file)  # type: ignore[arg-type]
        for key in ("dense", "dense_1"):
            del file[f"layers/{key}/vars"].attrs["name"]  # type: ignore[index]

    summary = inspect_model(hostile_files.write_archive(tmp_path / "model.keras", weights=write))
    assert [(layer.path, layer.parameters) for layer in summary.layers] == [("hidden", 15), ("head", 8)]
