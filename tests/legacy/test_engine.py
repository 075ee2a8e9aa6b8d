"""`engine: tfmot`: its own passes on Keras 3 models, the same record, nothing imported before it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras2_nets import answers, residual
from pydantic import ValidationError

import compress
from compress.errors import RecipeError, SetupError, UsageError
from compress.quantization.deployment import is_fake_quantized

PASSES = {
    "prune": lambda engine: compress.MagnitudePruning(sparsity=0.5, epochs=2, batch_size=8, engine=engine),
    "cluster": lambda engine: compress.WeightClustering(clusters=8, epochs=1, batch_size=8, engine=engine),
    "qat": lambda engine: compress.QuantizationAwareTraining(epochs=1, batch_size=8, engine=engine),
}


@pytest.fixture(scope="module")
def model(images):
    keras.utils.set_random_seed(0)
    made = residual(keras)
    made.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    made.fit(*images, batch_size=8, epochs=4, verbose=0)
    return made


def kernel_of(model, name) -> np.ndarray:
    layer = next(each for each in model.layers if each.name == name)
    return keras.ops.convert_to_numpy(getattr(layer, "layer", layer).kernel)


def test_pruning(model, images, tfmot):
    before = model.get_weights()
    pruned = PASSES["prune"]("tfmot")(model, images)
    assert [layer.name for layer in pruned.layers] == [layer.name for layer in model.layers]
    assert {name: (kernel_of(pruned, name) == 0).mean() for name in ("stem", "body", "hidden")} == dict.fromkeys(
        ("stem", "body", "hidden"), 0.5
    )
    assert (kernel_of(pruned, "spatial") == 0).mean() == 0  # tfmot does not know depthwise kernels
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)  # the model itself is untouched
    assert pruned.compiled


def test_clustering_keeps_zeros(model, images, tfmot):
    pruned = PASSES["prune"]("tfmot")(model, images)
    clustered = PASSES["cluster"]("tfmot")(pruned, images)
    body = kernel_of(clustered, "body")
    assert len(np.unique(body)) <= 8 and (body == 0).mean() >= 0.5
    assert ((kernel_of(pruned, "body") == 0) <= (body == 0)).all()


@pytest.mark.parametrize("before", [(), ("prune",), ("prune", "cluster")], ids=["qat", "pqat", "pcqat"])
def test_quantization(model, images, tfmot, before):
    source = model
    for kind in before:
        source = PASSES[kind]("tfmot")(source, images)
    quantized = PASSES["qat"]("tfmot")(source, images)
    assert is_fake_quantized(quantized) and quantized.compiled
    old, new = kernel_of(source, "hidden"), kernel_of(quantized, "hidden")
    if before:
        assert ((old == 0) <= (new == 0)).all() and (new == 0).mean() >= 0.5
    if "cluster" in before:
        assert len(np.unique(new)) <= 8
    assert np.isfinite(answers(quantized, images[0])).all()


def test_clustering_attention_and_small_kernels(tfmot):
    """Stripping changes the order of an attention layer's weights; a kernel with fewer weights than clusters stays."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(keras.layers.GlobalAveragePooling1D()(x)))
    model.compile("adam", "mse")
    data = np.random.default_rng(0).standard_normal((32, 6, 8)).astype("float32"), np.zeros((32, 1), "float32")
    options = {"epochs": 1, "batch_size": 8, "engine": "tfmot", "learning_rate": 1e-6}
    for source in (model, compress.prune_weights(model, 0.5)):
        found = compress.WeightClustering(clusters=16, **options)(source, data)
        layers = source.get_layer("attention"), found.get_layer("attention")
        for old, new in zip(*(layer.get_weights() for layer in layers), strict=True):
            assert len(np.unique(new)) <= 16 and np.abs(old - new).max() < 0.3
            assert not old.any() or np.corrcoef(old.ravel(), new.ravel())[0, 1] > 0.95
        np.testing.assert_allclose(kernel_of(found, "head"), kernel_of(source, "head"), atol=1e-4)


def test_include_and_exclude(model, images, tfmot):
    options = {"epochs": 1, "batch_size": 8, "engine": "tfmot"}
    pruned = compress.MagnitudePruning(sparsity=0.5, include=("b*", "hidden"), exclude=("hidden",), **options)
    found = pruned(model, images)
    zeros = {name: float((kernel_of(found, name) == 0).mean()) for name in ("stem", "body", "hidden")}
    assert zeros == {"stem": 0.0, "body": 0.5, "hidden": 0.0}
    with pytest.raises(UsageError, match="tfmot can prune"):
        compress.MagnitudePruning(sparsity=0.5, include=("spatial",), **options)(model, images)


def test_nested_models_and_streams(images, tfmot):
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.layers.Conv2D(4, 3, name="conv"), keras.layers.ReLU()], name="encoder")
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Dense(4, name="head")(keras.layers.GlobalAveragePooling2D()(inner(inputs)))
    nested = keras.Model(inputs, x)
    nested.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    import tensorflow as tf

    stream = tf.data.Dataset.from_tensor_slices(images).batch(8)
    for data in (images, stream):
        pruned = PASSES["prune"]("tfmot")(nested, data)
        assert isinstance(pruned.get_layer("encoder"), keras.Sequential)
        kernel = keras.ops.convert_to_numpy(pruned.get_layer("encoder").layers[0].kernel)
        assert (kernel == 0).mean() == 0.5


def test_what_cannot_cross_is_named_before_any_work(images, tfmot):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.RMSNormalization(name="rms")(keras.layers.Conv2D(4, 3, name="conv")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(4, name="head")(keras.layers.Flatten()(x)))
    for make in PASSES.values():
        with pytest.raises(UsageError, match="'rms' is a RMSNormalization"):
            make("tfmot").check(model)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (compress.MagnitudePruning, {"sparsity": 0.5, "score": "random"}),
        (compress.MagnitudePruning, {"sparsity": 0.5, "distribution": "erk"}),
        (compress.MagnitudePruning, {"sparsity": 0.5, "epochs": 0}),
        (compress.MagnitudePruning, {"sparsity": 0.5, "schedule": {"type": "iterative"}}),
        (compress.WeightClustering, {"clusters": 8, "teacher": "input"}),
        (compress.QuantizationAwareTraining, {"ranges": "learned"}),
        (compress.QuantizationAwareTraining, {"scheme": "int16x8"}),
    ],
)
def test_options_that_tfmot_does_not_have(kind, options):
    with pytest.raises(ValidationError, match="tfmot"):
        kind(engine="tfmot", **options)


def test_both_engines_give_the_same_record(workspace, tmp_path, tfmot):
    """One word in a recipe changes the engine; the manifests have the same entries."""
    found = {}
    for engine in ("bmcompress", "tfmot"):
        recipe = {
            "schema": "bmcompress/recipe/v1",
            "name": "compared",
            "model": {"path": str(workspace / "net.keras")},
            "data": {
                "train": {"type": "npz", "path": str(workspace / "data.npz"), "x": "x_train", "y": "y_train"},
                "test": {"type": "npz", "path": str(workspace / "data.npz"), "x": "x_test", "y": "y_test"},
            },
            "passes": [
                {"type": "prune", "sparsity": 0.5, "epochs": 2, "engine": engine},
                {"type": "qat", "epochs": 1, "engine": engine},
            ],
            "exports": [{"format": "tflite"}],
            "benchmark": {"enabled": False},
        }
        result = compress.run(compress.load_recipe(recipe), tmp_path / engine)
        found[engine] = compress_manifest(result)
    assert shape_of(found["bmcompress"]) == shape_of(found["tfmot"])
    with pytest.raises(RecipeError, match="engine"):
        compress.load_recipe(recipe, ["passes.prune.engine=tensorflow"])


def compress_manifest(result) -> dict:
    import json

    path = next(Path(result.directory).glob("manifest.json"))
    return json.loads(path.read_text())["steps"]


def shape_of(value):
    """Return the keys of nested records, without what they hold."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items() if key not in ("layers", "kernels", "notes")}
    return [shape_of(item) for item in value] if isinstance(value, list) and value and isinstance(value[0], dict) else 0


def test_nothing_is_imported_or_set_until_it_is_asked_for():
    script = """
import os, sys
import compress, keras, tensorflow as tf
for name in compress.__all__:
    getattr(compress, name)
import compress.legacy.engine, compress.legacy.twins
names = ("tf_keras", "tensorflow_model_optimization")
print([name for name in names if name in sys.modules], "TF_USE_LEGACY_KERAS" in os.environ)
compress.legacy.twins.import_tfmot()
print([name for name in names if name in sys.modules], "TF_USE_LEGACY_KERAS" in os.environ, tf.keras.__version__[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()[-2:]
    assert lines[0] == "[] False", done.stderr[-800:]
    assert lines[1] == "['tf_keras', 'tensorflow_model_optimization'] False 3"


def test_without_the_extra(monkeypatch, model, images):
    from compress.legacy import twins

    real = twins.find_spec
    hidden = ("tensorflow_model_optimization", "tf_keras")
    monkeypatch.setattr(twins, "find_spec", lambda name: None if name in hidden else real(name))
    for make in PASSES.values():
        with pytest.raises(SetupError, match=r"bmcompress\[tfmot\]|not installed"):
            make("tfmot").check(model)
    assert "TF_USE_LEGACY_KERAS" not in os.environ
