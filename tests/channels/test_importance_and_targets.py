"""Scores that look at samples, group-sparse training, targets of files, and layers that are probed."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers as L
from nets import randomise, residual

import compress
from compress.channels.group_sparsity import GroupSparsity
from compress.channels.groups import find_channel_groups
from compress.channels.pruning import prune_channels
from compress.errors import DataError, UsageError
from compress.targets.files import FileCosts


def two_layers(width: int = 8) -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, L.Dense(3, name="out")(L.Dense(width, activation="relu", name="hidden")(x)))


def samples(count: int = 256) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 4)).astype("float32")


def test_a_channel_that_never_fires_goes_first():
    model = randomise(two_layers())
    hidden = model.get_layer("hidden")
    kernel, bias = hidden.get_weights()
    kernel[:, 2] *= 100  # by its size it is the most important
    bias[2] = -1e5
    hidden.set_weights([kernel, bias])
    x = samples()
    assert 2 in prune_channels(model, {"hidden": 0.125}, multiple_of=1).kept["hidden"]
    for importance in ("activation", "hessian"):
        kept = prune_channels(model, {"hidden": 0.125}, multiple_of=1, importance=importance, data=x).kept["hidden"]
        assert kept == [0, 1, 3, 4, 5, 6, 7], importance


def test_the_hessian_score_is_the_change_of_the_outputs():
    """For a linear net it is exact: |w_in|_X * |w_out|, known by hand."""
    x = keras.Input((4,))
    model = keras.Model(x, L.Dense(3, name="out")(L.Dense(8, name="hidden", use_bias=False)(x)))
    randomise(model)
    data = samples(512)
    change = (data @ model.get_layer("hidden").get_weights()[0]) ** 2
    expected = change.mean(0) * (model.get_layer("out").get_weights()[0] ** 2).sum(1)
    kept = prune_channels(model, 0.5, multiple_of=1, importance="hessian", data=data, seed=1).kept["hidden"]
    largest = set(np.argsort(expected)[4:].tolist())
    assert len(largest & set(kept)) >= 3  # a draw of random signs may swap neighbours


@pytest.mark.parametrize("importance", ["taylor", "hessian", "activation"])
def test_scores_that_need_data_say_so(importance):
    with pytest.raises(DataError, match=f"{importance} needs data"):
        prune_channels(two_layers(), 0.5, importance=importance)


def test_channels_without_the_score_go_by_their_size():
    model = randomise(two_layers())
    options = {"multiple_of": 1, "ratio": 0.5}
    by_size = prune_channels(model, importance="l2", **options).kept
    assert prune_channels(model, importance="bn_scale", **options).kept == by_size


def learnable(count: int = 512) -> tuple[np.ndarray, np.ndarray]:
    x = samples(count)
    return x, (x[:, 0] + x[:, 1] > 0).astype("int64")


@pytest.mark.parametrize(("optimizer", "rate", "strong"), [("adam", 0.01, 2.0), ("sgd", 0.1, 0.1)])
def test_needless_channels_die_while_a_model_trains(optimizer, rate, strong):
    x, y = learnable()
    lost = {}
    for strength in (0.0, strong):
        keras.utils.set_random_seed(3)
        model = two_layers(32)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.get({"class_name": optimizer, "config": {"learning_rate": rate}}), loss)
        callback = GroupSparsity(strength=strength, frequency=4)
        model.fit(x, y, epochs=12, batch_size=32, verbose=0, callbacks=[callback])
        (lengths,) = callback.lengths.values()
        assert len(lengths) == 32
        before = model(x)
        narrow = prune_channels(model, 0.5, multiple_of=1).model
        lost[strength] = float(np.abs(np.asarray(before) - np.asarray(narrow(x))).mean() / np.abs(before).mean())
        if strength:
            assert sum(length < 1e-6 for length in lengths) >= 8
            assert (np.asarray(before).argmax(1) == y).mean() > 0.95
        assert all(layer.kernel.constraint is None for layer in model.layers[1:])
    assert lost[strong] < 0.1 * lost[0.0]


def test_group_sparsity_leaves_what_is_excluded_and_refuses_nonsense():
    x, y = learnable(64)
    model = two_layers()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(UsageError, match="channels that can be removed"):
        model.fit(x, y, verbose=0, callbacks=[GroupSparsity(exclude=["hidden"])])
    for options in ({"strength": -1.0}, {"frequency": 0}):
        with pytest.raises(UsageError, match="strength of at least 0"):
            GroupSparsity(**options)


def test_a_target_in_bytes_is_met_in_the_file(tmp_path):
    model = randomise(residual())
    pruned = prune_channels(model, target={"bytes": 0.7}, multiple_of=1)
    sizes = []
    for name, each in (("before", model), ("after", pruned.model)):
        sizes.append(compress.export_model(each, tmp_path / f"{name}.tflite").size_bytes)
    assert sizes[1] / sizes[0] == pytest.approx(0.7, rel=0.03)
    assert pruned.reached.measured == pytest.approx(sizes[1] / sizes[0], rel=1e-3)
    assert pruned.reached.predicted == pytest.approx(0.7, rel=0.03)


def test_a_target_in_time_is_found_by_measuring(monkeypatch):
    """The clock is replaced by a formula, so that the test does not depend on the machine."""
    shares = []

    def time_of(files, model):
        macs = compress.channels.costs.CostModel(find_channel_groups(model), "macs").measure(())
        shares.append(0.2 + 0.8 * macs / whole)
        return shares[-1]

    import compress.channels.costs

    model = randomise(residual())
    whole = compress.channels.costs.CostModel(find_channel_groups(model), "macs").measure(())
    monkeypatch.setattr(FileCosts, "share", time_of)
    pruned = prune_channels(model, target={"latency": 0.6}, multiple_of=1)
    assert pruned.reached.measured == pytest.approx(0.6, rel=0.03)
    assert pruned.reached.predicted == pytest.approx(0.6, rel=0.03)
    assert shares[-1] == pruned.reached.measured
    with pytest.raises(UsageError, match="the least that can be left is"):
        prune_channels(model, target={"latency": 0.1}, multiple_of=1)


def test_noise_that_hides_the_target_is_said(monkeypatch):
    model = randomise(residual())
    noise = iter(np.random.default_rng(0).uniform(0.7, 0.9, 100).tolist())
    monkeypatch.setattr(FileCosts, "share", lambda files, model: next(noise))
    with pytest.raises(UsageError, match="nearest latency that was measured|least that can be left"):
        prune_channels(model, target={"latency": 0.3}, multiple_of=1)


class Gate(L.Layer):
    """Weighs channels by each other; it follows whatever number of channels comes."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), initializer="glorot_uniform", name="mix")
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * keras.ops.sigmoid(keras.ops.mean(x, (1, 2), keepdims=True) @ self.kernel) * self.scale


class Centre(L.Layer):
    """Takes the mean over channels away, so that each depends on how many there are."""

    def call(self, x):
        return x - keras.ops.mean(x, -1, keepdims=True)


class Collapse(L.Layer):
    """Reads all channels and returns one."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 1), initializer="glorot_uniform", name="weights")

    def call(self, x):
        return x @ self.kernel


def with_layer(layer: L.Layer) -> keras.Model:
    x = keras.Input((8, 8, 3))
    y = L.Conv2D(16, 3, name="conv")(x)
    return keras.Model(x, L.Dense(2)(L.GlobalAveragePooling2D()(layer(y))))


@pytest.mark.parametrize("kind", [Gate, Collapse])
def test_unknown_layers_are_probed_when_asked(kind):
    model = randomise(with_layer(kind()))
    with pytest.raises(UsageError, match="has no rule"):
        prune_channels(model, 0.5)
    pruned = prune_channels(model, 0.5, probe=True)
    assert pruned.difference < 1e-5
    assert len(pruned.kept["conv"]) == 8


def test_what_trials_do_not_prove_stays_frozen():
    with pytest.raises(UsageError, match="has no rule"):
        prune_channels(randomise(with_layer(Centre())), 0.5, probe=True)
