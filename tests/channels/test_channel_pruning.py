"""The law: a pruned model computes what the original does with the removed channels silenced; and which channels go."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import layers as L
from nets import NETS, Unknown, attention, conv, randomise, residual, squeeze_excite, two_towers

import compress
from compress.channels.costs import CostModel
from compress.channels.groups import find_channel_groups
from compress.channels.pruning import prune_channels
from compress.channels.rebuild import narrow, silence
from compress.channels.rules import OWN_RULES, register_rule
from compress.errors import DataError, ModelError, UsageError
from compress.models.equivalence import check_equal


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_law(name):
    model = randomise(NETS[name]())
    before = model.get_weights()
    for seed, multiple in ((0, 1), (1, 1), (2, 4)):
        pruned = prune_channels(model, 0.5, importance="random", multiple_of=multiple, seed=seed)
        assert pruned.difference < 1e-5
        assert pruned.model.count_params() < 0.8 * model.count_params()
        assert pruned.kept
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert [type(layer).__name__ for layer in pruned.model.layers if layer.weights]


def test_a_wrong_slice_is_found():
    """Rolling the atoms of one axis by one must be seen: the check has teeth."""
    found = 0
    model = randomise(residual())
    count = len(find_channel_groups(model).atoms.weights)
    for index in range(count):
        groups = find_channel_groups(model)
        units = [unit for group in groups.groups for block in group.blocks for unit in block.units.tolist()]
        removed = set(np.random.default_rng(index).choice(units, len(units) // 2, replace=False).tolist())
        weight = groups.atoms.weights[index]
        groups.atoms.weights[index] = replace(weight, atoms=np.roll(weight.atoms, 1))
        try:
            check_equal(narrow(groups, removed), silence(groups, removed))
        except (ModelError, ValueError):
            found += 1
    assert found >= 0.9 * count


def test_what_stays_is_bit_equal_and_named_as_before():
    model = randomise(residual())
    pruned = prune_channels(model, 0.5, importance="l1")
    assert [layer.name for layer in pruned.model.layers] == [layer.name for layer in model.layers]
    first = next(layer for layer in model.layers if isinstance(layer, L.Conv2D))
    kept = pruned.kept[first.name]
    assert len(kept) == 8
    np.testing.assert_array_equal(pruned.model.get_layer(first.name).kernel, np.array(first.kernel)[..., kept])


def test_the_least_important_channels_go():
    x = keras.Input((6,))
    model = keras.Model(x, L.Dense(2, name="out")(L.Dense(4, activation="relu", name="hidden")(x)))
    kernel = np.ones((6, 4), "float32") * np.float32([3, 1, 4, 2])
    model.get_layer("hidden").kernel.assign(kernel)
    model.get_layer("out").kernel.assign(np.ones((4, 2)))
    for importance in ("l1", "l2", lambda weight, rows, gradients: np.abs(rows).sum(axis=1)):
        assert prune_channels(model, 0.5, importance=importance).kept == {"hidden": [0, 2]}
    assert prune_channels(model, {"hidden": 0.25}).kept == {"hidden": [0, 2, 3]}
    assert prune_channels(model, 0.9, minimum=3).kept == {"hidden": [0, 2, 3]}


def test_scores_of_batch_norm_and_gradients():
    model = randomise(residual())
    norm = next(layer for layer in model.layers if isinstance(layer, L.BatchNormalization))
    norm.gamma.assign([9.0] * 8 + [0.1] * 8)
    for other in [layer for layer in model.layers if isinstance(layer, L.BatchNormalization)][2:3]:
        other.gamma.assign([9.0] * 8 + [0.1] * 8)
    kept = prune_channels(model, 0.5, importance="bn_scale").kept
    assert next(iter(kept.values())) == list(range(8))
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("float32")
    with pytest.raises(DataError, match="taylor needs data"):
        prune_channels(model, 0.5, importance="taylor")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pruned = prune_channels(model, 0.5, importance="taylor", data=(x, np.arange(32) % 5))
    assert pruned.model.compiled
    pruned.model.fit(x, np.arange(32) % 5, verbose=0)


def test_all_groups_together_lose_the_ratio():
    model = randomise(NETS["u_net"]())
    sizes = sum(group.size for group in find_channel_groups(model).groups)
    pruned = prune_channels(model, 0.5, ranking="global", multiple_of=1)
    removed = sizes - sum(group.size for group in find_channel_groups(pruned.model).groups)
    assert removed == pytest.approx(0.5 * sizes, rel=0.1)


def test_groups_say_what_they_couple_and_what_is_frozen():
    rows = find_channel_groups(squeeze_excite()).describe()
    stream = rows[0]
    assert stream["channels"] == 16
    assert len(stream["layers"]) == 2  # the convolution and the gate
    assert rows[-1]["frozen"] == "is an output of the model"
    frozen = find_channel_groups(NETS["with_unknown"]()).frozen
    assert "own (Unknown) has no rule" in frozen.values()


def test_norms_over_channels():
    assert prune_channels(attention(), 0.5).difference < 1e-5
    allowed = prune_channels(attention(), 0.5, norm="allow")
    assert allowed.difference < 1e-5  # against the original whose norms leave out what is removed
    sizes = [
        sum(group.size for group in find_channel_groups(attention(), norm=norm).groups) for norm in ("allow", "freeze")
    ]
    assert sizes == [60, 44]
    assert allowed.model.count_params() < prune_channels(attention(), 0.5).model.count_params()


def test_a_rule_of_ones_own():
    class Scale(L.Layer):
        def build(self, shape):
            self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

        def call(self, x):
            return x * self.factor

    def model():
        x = keras.Input((8, 8, 3))
        return keras.Model(x, L.Dense(2)(L.GlobalAveragePooling2D()(Scale(name="scale")(L.Conv2D(16, 3)(x)))))

    with pytest.raises(UsageError, match="Scale.* has no rule"):
        prune_channels(model(), 0.5)

    @register_rule("Scale")
    def scale(node, inputs, atoms):
        (x,) = inputs
        atoms.weight(node.path, node.operation.factor, 0, x[-1], "passes")
        return [x]

    try:
        pruned = prune_channels(randomise(model()), 0.5)
        assert pruned.model.get_layer("scale").factor.shape == (8,)
    finally:
        del OWN_RULES["Scale"]


def test_a_wrong_rule_is_refused():
    def model():
        x = keras.Input((8, 8, 3))
        return keras.Model(x, L.Dense(2)(L.GlobalAveragePooling2D()(Unknown()(L.Conv2D(16, 3)(x)))))

    register_rule("Unknown")(lambda node, inputs, atoms: [list(inputs[0])])
    try:
        with pytest.raises(ModelError, match="does not compute what the original does"):
            prune_channels(randomise(model()), 0.5)
    finally:
        del OWN_RULES["Unknown"]


def test_saved_it_loads_without_us(tmp_path):
    pruned = prune_channels(randomise(two_towers()), 0.5, multiple_of=1).model
    inputs = {name: np.ones((2, 12), "float32") for name in ("left", "right")}
    pruned.save(tmp_path / "m.keras")
    np.save(tmp_path / "y.npy", pruned(inputs))
    script = f"""
import sys, keras, numpy as np
model = keras.saving.load_model(r"{tmp_path / "m.keras"}")
inputs = {{name: np.ones((2, 12), "float32") for name in ("left", "right")}}
np.testing.assert_allclose(model(inputs), np.load(r"{tmp_path / "y.npy"}"), rtol=1e-6)
assert "compress" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "DenseNet121"])
def test_keras_applications(name):
    options = {"alpha": 0.35} if name == "MobileNetV2" else {}
    build = getattr(keras.applications, name)
    model = randomise(build(input_shape=(64, 64, 3), weights=None, classes=10, classifier_activation=None, **options))
    x = np.random.default_rng(0).normal(size=(16, 64, 64, 3)).astype("float32")
    compress.reestimate_batch_norm(model, x)  # otherwise the signal dies on its way, and any two inputs look alike
    assert np.asarray(model(x)).std(0).min() > 1e-2
    pruned = prune_channels(model, 0.5, importance="random")
    assert pruned.difference < 1e-4
    assert pruned.model.count_params() < 0.5 * model.count_params()
    assert len(find_channel_groups(model).groups) == {
        "MobileNetV2": 25,
        "MobileNetV3Small": 27,
        "EfficientNetB0": 40,
    }.get(name, 120)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "less than 1"),
        ({"ratio": -0.1}, "at least 0"),
        ({"ratio": {"nothing": 0.5}}, "matches no layer"),
        ({"include": ("nothing",)}, "matches no layer"),
        ({"exclude": ("*",)}, "channels that can be removed"),
        ({"importance": "size"}, "importance to be one of"),
        ({"multiple_of": 0}, "at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        prune_channels(residual(), **{"ratio": 0.5, **options})


def test_models_that_cannot_be_pruned():
    with pytest.raises(UsageError, match="fake-quantized"):
        prune_channels(compress.fake_quantize(residual(), "int8_weights"), 0.5)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Own()
    model(keras.ops.zeros((1, 3)))
    with pytest.raises(ModelError, match="functional"):
        prune_channels(model, 0.5)


@pytest.mark.parametrize("cost", ["parameters", "macs"])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_targets_are_met(cost, ranking, tmp_path):
    options = {"input_shape": (64, 64, 3), "weights": None, "classes": 10, "alpha": 0.5}
    model = randomise(keras.applications.MobileNetV2(**options))
    pruned = prune_channels(model, target={cost: 0.5}, ranking=ranking).model
    costs = []
    for name, each in (("before", model), ("after", pruned)):
        each.save(tmp_path / f"{name}.keras")
        costs.append(getattr(compress.inspect_model(tmp_path / f"{name}.keras"), cost))
    assert costs[1] / costs[0] == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("name", sorted(set(NETS) - {"detection", "with_unknown"}))
def test_costs_are_known_beforehand(name, tmp_path):
    model = NETS[name]()
    groups = find_channel_groups(model)
    units = [unit for group in groups.groups for block in group.blocks for unit in block.units.tolist()]
    removed = set(np.random.default_rng(0).choice(units, len(units) // 2, replace=False).tolist())
    narrowed = narrow(groups, removed)
    assert CostModel(groups, "parameters").measure(removed) == sum(int(np.prod(w.shape)) for w in narrowed.weights)
    narrowed.save(tmp_path / "m.keras")
    summary = compress.inspect_model(tmp_path / "m.keras")
    if name not in ("attention", "without_norm"):  # which multiply activations, too
        assert CostModel(groups, "macs").measure(removed) == summary.macs


def test_targets_that_cannot_be_met():
    with pytest.raises(UsageError, match="the least that can be left is"):
        prune_channels(residual(), target={"macs": 0.01})
    with pytest.raises(UsageError, match=r"nearest that rounding allows is \d+"):
        prune_channels(residual(), target={"macs": 0.9}, multiple_of=16)
    for target in ({}, {"time": 0.5}, {"macs": 0}, {"macs": 0.5, "parameters": 0.5}):
        with pytest.raises(UsageError, match="expected a target such as"):
            prune_channels(residual(), target=target)
    with pytest.raises(UsageError, match="a ratio or a target"):
        prune_channels(residual(), 0.5, target={"macs": 0.5})


def test_a_rule_that_fails_halfway_keeps_all_channels():
    def model():
        x = keras.Input((8, 8, 3))
        return keras.Model(x, L.Dense(2)(L.GlobalAveragePooling2D()(Unknown()(conv(conv(x, 16), 16)))))

    @register_rule("Unknown")
    def fails(node, inputs, atoms):
        atoms.new(16, node.path)
        raise KeyError("no such thing")

    try:
        groups = find_channel_groups(model())
        assert [group.size for group in groups.groups] == [16]
        assert prune_channels(randomise(model()), 0.5).difference < 1e-5
    finally:
        del OWN_RULES["Unknown"]


def test_a_weight_that_is_used_outside_its_layer():
    x = keras.Input((6,), dtype="int32")
    embedding = L.Embedding(20, 16, name="embedding")
    y = L.Dense(16)(L.GlobalAveragePooling1D()(embedding(x)))
    model = keras.Model(x, keras.ops.matmul(y, keras.ops.transpose(embedding.embeddings)))
    pruned = prune_channels(model, 0.5)
    assert set(pruned.kept) == {"embedding"}
    assert pruned.difference < 1e-5


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        pruned = prune_channels(randomise(residual()), 0.5)
    finally:
        keras.config.set_dtype_policy("float32")
    assert pruned.difference < 3e-2
    assert pruned.model.layers[1].dtype_policy.name == policy


@pytest.mark.parametrize("importance", ["l2", "taylor", "hessian", "activation"])
def test_the_layers_of_the_model_are_not_called(importance):
    model = randomise(residual())
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    outputs = [layer.output for layer in model.layers]  # of a layer with several calls, this is an error
    weights = model.get_weights()
    data = np.random.default_rng(0).normal(size=(8, *model.input_shape[1:])), np.zeros(8, int)
    prune_channels(model, 0.5, importance=importance, data=data)
    assert all(layer.output is output for layer, output in zip(model.layers, outputs, strict=True))
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_lambdas_and_unregistered_classes_go_on_to_be_themselves():
    factor = 2.0

    class Bounded(keras.constraints.Constraint):
        def __call__(self, w):
            return keras.ops.clip(w, -1, 1)

    x = keras.Input((6, 6, 3))
    y = L.Conv2D(16, 3, kernel_constraint=Bounded())(x)
    y = L.Lambda(lambda t: t * factor)(L.Conv2D(8, 3)(y))
    pruned = prune_channels(keras.Model(x, L.Conv2D(4, 1)(y)), 0.5, multiple_of=1)
    assert [layer.filters for layer in pruned.model.layers if isinstance(layer, L.Conv2D)] == [8, 8, 4]
    assert isinstance(pruned.model.layers[1].kernel_constraint, Bounded)
    assert pruned.difference < 1e-5


def test_inputs_of_nested_models_may_be_cast():
    inner = keras.Input((6, 6, 3))
    nested = keras.Model(inner, L.Conv2D(16, 3, name="first")(L.Rescaling(1 / 255)(inner)), name="inner")
    x = keras.Input((6, 6, 3), dtype="uint8")
    model = keras.Model(x, L.Dense(3)(L.GlobalAveragePooling2D()(L.Conv2D(8, 3)(nested(x)))))
    pruned = prune_channels(model, 0.5, multiple_of=1)
    assert {path: len(kept) for path, kept in pruned.kept.items()} == {"inner/first": 8, model.layers[2].name: 4}
    assert pruned.model.inputs[0].dtype == "uint8"
    assert pruned.difference < 1e-5
