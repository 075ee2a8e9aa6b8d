"""What every pass promises, in one table. A new pass joins by adding a row; a missing row fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import compress
from compress.deploy.exporting import export_models
from compress.deploy.runtimes import open_runtime
from compress.models.digest import content_digest
from compress.models.graph import output_names
from compress.models.inspection import inspect_model
from compress.passes import BUILT_IN, find_pass
from compress.quantization.deployment import is_fake_quantized

QUANTIZING = ("ptq", "qat")
TRAINING = {"epochs": 1, "batch_size": 64}


def _quantizes(before, after) -> bool:
    kinds = {layer.class_name for layer in after.layers}
    return {"FakeQuant", "QuantizedLayer"} <= kinds and after.macs >= before.macs


# The options of each pass, and what must be seen in the statistics of its result.
ROWS = {
    "prune": ({"sparsity": 0.75, **TRAINING}, lambda before, after: abs(after.kernel_sparsity - 0.75) < 0.01),
    "prune_channels": (
        {"ratio": 0.5, "multiple_of": 2, **TRAINING},
        lambda before, after: after.macs < 0.6 * before.macs and after.parameters < 0.6 * before.parameters,
    ),
    "prune_blocks": (
        {"count": 1, **TRAINING},
        lambda before, after: len(after.layers) < len(before.layers) and after.macs < before.macs,
    ),
    "factorize": (
        {"rank": 0.25, "multiple_of": 1, **TRAINING},
        lambda before, after: after.parameters < before.parameters and after.macs < before.macs,
    ),
    "cluster": ({"clusters": 8, **TRAINING}, lambda before, after: after.distinct == 16 < before.distinct),
    "distill": ({"teacher": "input", "alpha": 0.5, **TRAINING}, lambda before, after: after.nonzero == before.nonzero),
    "finetune": (TRAINING, lambda before, after: after.nonzero == before.nonzero),
    "ptq": ({"samples": 64}, _quantizes),
    "qat": ({"samples": 64, **TRAINING}, _quantizes),
}


def with_blocks(model: keras.Model) -> keras.Model:
    """Return the net with two residual blocks before its head."""
    *others, head = model.layers
    x = model.inputs[0]
    y = x
    for layer in others:
        y = layer(y)
    for _ in range(2):
        y = keras.layers.Add()([y, keras.layers.Dense(y.shape[-1], activation="relu")(y)])
    net = keras.Model(x, head(y), name=model.name)
    net.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return net


def test_every_pass_has_a_row():
    assert set(ROWS) == set(BUILT_IN)


@pytest.fixture(scope="module", params=sorted(ROWS))
def applied(request, workspace, blobs, tmp_path_factory):
    """A pass, its input model and the result of applying it with seed 0."""
    options, effect = ROWS[request.param]
    item = find_pass(request.param)(**options)
    model = compress.load_model(workspace / "net.keras")
    if request.param == "prune_blocks":
        model = with_blocks(model)
    weights = model.get_weights()
    folder = tmp_path_factory.mktemp(request.param)
    model.save(folder / "input.keras")
    keras.utils.set_random_seed(0)
    result = item(model, blobs[0])
    result.save(folder / "result.keras")
    assert is_fake_quantized(result) == (request.param in QUANTIZING)
    return item, model, weights, result, effect, folder


def test_input_model_is_untouched(applied):
    _, model, weights, result, _, _ = applied
    assert result is not model
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    assert all(variable.constraint is None for variable in model.trainable_variables)


def test_effect_is_visible(applied):
    _, _, weights, result, effect, folder = applied
    assert effect(inspect_model(folder / "input.keras"), inspect_model(folder / "result.keras"))
    assert any(not np.array_equal(a, b) for a, b in zip(weights, result.get_weights(), strict=True))


def test_result_keeps_names_and_compile_settings(applied):
    item, model, _, result, _, _ = applied
    names, before = ([layer.name for layer in each.layers] for each in (result, model))
    if item.type in (*QUANTIZING, "factorize"):
        assert set(before) <= set(names)
    elif item.type == "prune_blocks":
        assert names == [name for name in before if name in names]
    else:
        assert names == before
    assert output_names(result) == output_names(model)
    assert [i.name for i in result.inputs] == [i.name for i in model.inputs]
    assert result.loss == model.loss
    assert type(result.optimizer) is type(model.optimizer)


def test_result_is_plain(applied):
    item, _, _, result, _, _ = applied
    ours = {"FakeQuant", "QuantizedLayer"} if item.type in QUANTIZING else set()
    assert all(type(layer).__module__.startswith("keras.") or type(layer).__name__ in ours for layer in result.layers)
    assert all(variable.constraint is None for variable in result.trainable_variables)


def test_saved_result_loads_in_a_fresh_process(applied, blobs):
    """Without us, but for fake-quantized models, which `compress.load_model` opens."""
    item, _, _, result, _, folder = applied
    x = blobs[1][0][:16]
    np.save(folder / "x.npy", x)
    script = (
        "import sys, keras, numpy as np\n"
        "m = keras.saving.load_model('result.keras'); np.save('y.npy', m(np.load('x.npy')))\n"
        "assert not any(name.split('.')[0] == 'compress' for name in sys.modules)"
    )
    if item.type in QUANTIZING:
        script = (
            "import compress, numpy as np\nnp.save('y.npy', compress.load_model('result.keras')(np.load('x.npy')))\n"
        )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder, capture_output=True)
    np.testing.assert_array_equal(np.load(folder / "y.npy"), result(x))


def test_exports_give_the_same_outputs(applied, blobs):
    item, _, _, result, _, folder = applied
    x = blobs[1][0][:32]
    paths = {name: folder / f"result.{name}" for name in ("tflite", "onnx")}
    export_models(result, paths, samples=x)
    for path in paths.values():
        runtime = open_runtime(path)
        size = runtime.batch or len(x)
        outputs = np.concatenate([runtime.run([x[i : i + size]])[0] for i in range(0, len(x), size)])
        if item.type in QUANTIZING:  # a tie may fall to the other side
            steps = np.abs(outputs - np.asarray(result(x))) * 256
            assert steps.mean() < 0.1
            assert steps.max() <= 1.01
        else:
            np.testing.assert_allclose(outputs, result(x), atol=1e-5)


def test_same_seed_gives_the_same_bits(applied, blobs, tmp_path):
    item, model, _, _, _, folder = applied
    keras.utils.set_random_seed(0)
    item(model, blobs[0]).save(tmp_path / "again.keras")
    assert content_digest(tmp_path / "again.keras") == content_digest(folder / "result.keras")


def test_twice_works_or_raises(applied, blobs):
    item, _, _, result, _, _ = applied
    if item.type == "ptq":
        with pytest.raises(compress.BmcompressError, match="fake-quantized already"):
            item(result, blobs[0])
        return
    again = item(result, blobs[0])
    assert all(np.isfinite(weight).all() for weight in again.get_weights())


def test_options_survive_json(applied):
    item, *_ = applied
    assert type(item)(**json.loads(item.model_dump_json())).model_dump() == item.model_dump()


def test_a_pass_of_another_package_runs_in_a_recipe(workspace, tmp_path):
    """A real package with an entry point, installed nowhere but on the path."""
    plugin = tmp_path / "plugin"
    (plugin / "acme_passes-1.0.dist-info").mkdir(parents=True)
    (plugin / "acme_passes-1.0.dist-info" / "METADATA").write_text("Name: acme-passes\nVersion: 1.0\n")
    entry = "[compress.passes]\nscale = acme_passes:Scaling\nbroken = acme_missing:Nothing\n"
    (plugin / "acme_passes-1.0.dist-info" / "entry_points.txt").write_text(entry)
    (plugin / "acme_passes.py").write_text(
        "from typing import Literal\n"
        "import compress\n\n"
        "class Scaling(compress.Pass):\n"
        '    """Multiply every weight."""\n'
        "    type: Literal['scale'] = 'scale'\n"
        "    factor: float\n\n"
        "    def apply(self, model, data):\n"
        "        copy = compress.copy_model(model)\n"
        "        copy.set_weights([self.factor * w for w in copy.get_weights()])\n"
        "        return copy\n"
    )
    recipe = {
        "schema": "bmcompress/recipe/v1",
        "name": "plugin",
        "model": {"path": str(workspace / "net.keras")},
        "passes": [{"type": "scale", "factor": 0.5}],
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    (tmp_path / "bad.yaml").write_text(json.dumps({**recipe, "passes": [{"type": "scale", "facter": 1}]}))
    (tmp_path / "broken.yaml").write_text(json.dumps({**recipe, "passes": [{"type": "broken"}]}))
    script = (
        f"import sys; sys.path.insert(0, {str(plugin)!r})\n"
        "import compress\n"
        "from compress.errors import RecipeError, SetupError\n"
        f"folder = {str(tmp_path)!r}\n"
        "for name, error, text in (('bad', RecipeError, 'did you mean `factor`'), ('broken', SetupError, 'acme_missing')):\n"
        "    try:\n"
        "        compress.load_recipe(f'{folder}/{name}.yaml')\n"
        "    except error as caught:\n"
        "        assert text in str(caught), caught\n"
        "    else:\n"
        "        raise SystemExit('accepted')\n"
        "compress.run(f'{folder}/r.yaml', f'{folder}/run')\n"
    )
    root = Path(compress.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], check=False, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = compress.load_model(workspace / "net.keras").get_weights()
    after = compress.load_model(tmp_path / "run" / "model.keras").get_weights()
    np.testing.assert_array_equal(after[0], before[0] * np.float32(0.5))
