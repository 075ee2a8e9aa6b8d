"""What each kernel bears, on nets of which it is known; sparsities made of it add up."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import compress
from compress.errors import DataError, UsageError
from compress.pruning.callback import Pruning
from compress.pruning.magnitude import prune_weights
from compress.pruning.schedules import ConstantSchedule
from compress.pruning.sensitivity import (
    KernelSensitivity,
    PruningSensitivity,
    SensitivityPoint,
    pruning_sensitivity,
)

X = np.random.default_rng(0).normal(size=(300, 16)).astype("float32")
Y = np.random.default_rng(1).integers(0, 4, 300)


def build() -> keras.Model:
    """Return a net whose output is `crucial` of the input plus a thousandth of what goes through `idle`."""
    keras.utils.set_random_seed(0)
    x = keras.Input((16,))
    inner = keras.Sequential([keras.Input((16,)), layers.Dense(32, activation="tanh", name="idle")], name="inner")
    small = layers.Rescaling(1e-3)(layers.Dense(4, name="reader")(inner(x)))
    model = keras.Model(x, layers.Add()([layers.Dense(4, name="crucial")(x), small]))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_the_kernel_that_matters_loses_most_and_nothing_changes():
    model = build()
    before = model.get_weights()
    found = pruning_sensitivity(model, X, sparsities=(0.9, 0.3, 0.6), evaluate=lambda m: float(m.count_params()))
    assert [kernel.path for kernel in found.kernels] == ["inner/idle/kernel", "reader/kernel", "crucial/kernel"]
    losses = [[point.loss for point in kernel.points] for kernel in found.kernels]
    assert [point.sparsity for point in found.kernels[0].points] == [0.3, 0.6, 0.9]
    assert losses[2] == sorted(losses[2])
    assert losses[2][0] > 100 * max(losses[0] + losses[1])
    assert found.metric == model.count_params() == found.kernels[0].points[0].metric
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert found.to_dict()["kernels"][2]["points"][0]["sparsity"] == 0.3


def test_a_loss_by_hand():
    kernel = np.float32([[3], [1], [2]])
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1, use_bias=False, name="d")])
    model.layers[0].kernel.assign(kernel)
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    (found,) = pruning_sensitivity(model, x, sparsities=(1 / 3,)).kernels
    output = x @ kernel
    assert found.points[0].loss == pytest.approx(np.mean(x[:, 1] ** 2) / output.var(), rel=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.55, 0.8, 0.97])
def test_sparsities_add_up_and_spare_what_matters(sparsity):
    found = pruning_sensitivity(build(), X)
    table = found.distribution(sparsity)
    sizes = {kernel.path: kernel.size for kernel in found.kernels}
    total = sum(sizes.values())
    assert sum(round(table[path] * size) for path, size in sizes.items()) == round(sparsity * total)
    assert table["crucial/kernel"] <= min(table["inner/idle/kernel"], table["reader/kernel"])


def test_all_suffer_alike():
    def curve(path, losses):
        points = tuple(SensitivityPoint(s, loss) for s, loss in zip((0.5, 0.9), losses, strict=True))
        return KernelSensitivity(path, 1000, 1000, points)

    found = PruningSensitivity((curve("a", (0.1, 0.5)), curve("b", (1.0, 5.0))))
    table = found.distribution(0.5)
    # At the loss t the first has 0.5 + 0.4 * (t - 0.1) / 0.4 and the second t / 2: t = 0.4.
    assert table == {"a": pytest.approx(0.8, abs=2e-3), "b": pytest.approx(0.2, abs=2e-3)}


def test_a_kernel_that_breaks_the_model_is_spared():
    points = (SensitivityPoint(0.5, 0.1), SensitivityPoint(0.9, float("nan")))
    fine = (SensitivityPoint(0.5, 0.1), SensitivityPoint(0.9, 0.2))
    found = PruningSensitivity((KernelSensitivity("a", 100, 100, points), KernelSensitivity("b", 100, 100, fine)))
    table = found.distribution(0.65)
    assert table["a"] == pytest.approx(0.5, abs=0.02)


def curves(*kernels):
    """Return what was measured of kernels, each `(units, loss at 50 %, loss at 90 %)`."""
    found = []
    for index, (units, *losses) in enumerate(kernels):
        points = tuple(SensitivityPoint(s, loss) for s, loss in zip((0.5, 0.9), losses, strict=True))
        found.append(KernelSensitivity(f"k{index}", units, units, points))
    return PruningSensitivity(tuple(found))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # Level losses so great that no float lies between them: both give the same part of the leap.
        (curves((10**7, 1e9, 1e9), (10**7, 1e9, 1e9)), {"k0": 0.7, "k1": 0.7}),
        # A loss that falls again is noise.
        (curves((10**6, 5.0, 1.0), (10**6, 5.0, 2.0)), {"k0": 0.7, "k1": 0.7}),
        # No kernel bears as much as is asked for.
        (curves((10**7, float("nan"), float("nan")), (10**7, float("nan"), float("nan"))), {"k0": 0.7, "k1": 0.7}),
        # A kernel without weights takes no part.
        (curves((0, 0.1, 0.2), (100, 0.1, 0.2)), {"k1": 0.7}),
    ],
)
def test_odd_curves_add_up(found, expected):
    table = found.distribution(0.7)
    assert table == {path: pytest.approx(share, abs=1e-6) for path, share in expected.items()}
    sizes = {kernel.path: kernel.units for kernel in found.kernels}
    assert sum(round(share * sizes[path]) for path, share in table.items()) == round(0.7 * sum(sizes.values()))


def test_a_shared_layer_is_one_kernel():
    keras.utils.set_random_seed(0)
    x = keras.Input((16,))
    shared = layers.Dense(16, name="shared", activation="tanh")
    model = keras.Model(x, layers.Dense(3, name="head", activation="softmax")(shared(shared(x))))
    found = pruning_sensitivity(model, X, sparsities=(0.5, 0.9))
    assert [(kernel.path, kernel.size) for kernel in found.kernels] == [("shared/kernel", 256), ("head/kernel", 48)]
    pruned = prune_weights(model, 0.7, distribution="sensitivity", data=X)
    zeros = [np.count_nonzero(np.array(pruned.get_layer(name).kernel) == 0) for name in ("shared", "head")]
    assert sum(zeros) == round(0.7 * (256 + 48))


def test_pruning_at_once_and_while_training():
    expected = pruning_sensitivity(build(), X, samples=256).distribution(0.6)
    pruned = prune_weights(build(), 0.6, distribution="sensitivity", data=X)
    trained = build()
    pruning = Pruning(0.6, distribution="sensitivity", data=(X, Y), schedule=ConstantSchedule())
    trained.fit(X, Y, epochs=1, verbose=0, callbacks=[pruning])
    for model in (pruned, trained):
        for path, share in expected.items():
            layer = model.get_layer("inner").get_layer("idle") if "idle" in path else model.get_layer(path[:-7])
            kernel = np.array(layer.kernel)
            assert np.count_nonzero(kernel == 0) == round(share * kernel.size)


def test_blocks_and_n_of_m():
    found = pruning_sensitivity(build(), X, pattern="4x1", sparsities=(0.5,))
    assert [kernel.units for kernel in found.kernels] == [128, 32, 16]
    found = pruning_sensitivity(build(), X, pattern="2:4")
    assert [point.sparsity for point in found.kernels[0].points] == [0.5]
    with pytest.raises(UsageError, match=r"pattern 2:4 has the same sparsity in every kernel.*0\.8"):
        found.distribution(0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": ()}, "sparsities to try"),
        ({"sparsities": (1.0,)}, "less than 1"),
        ({"sparsities": (0.5, "0.8", None)}, "less than 1"),
        ({"sparsities": (0.5, 0.8), "pattern": "2:4"}, r"pattern 2:4 has sparsity 0\.5.*0\.8"),
        ({"score": "movement"}, "needs a training"),
        ({"include": ("nothing",)}, "matches no layer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        pruning_sensitivity(build(), X, **options)


def test_data_are_needed():
    with pytest.raises(DataError, match="data=None"):
        pruning_sensitivity(build(), None)
    with pytest.raises(UsageError, match="needs data"):
        prune_weights(build(), 0.5, distribution="sensitivity")
    with pytest.raises(UsageError, match="needs data"):
        Pruning(0.5, distribution="sensitivity")
    with pytest.raises(UsageError, match="same sparsity in every kernel"):
        prune_weights(build(), pattern="2:4", distribution="sensitivity", data=X)


def test_it_is_public():
    assert compress.pruning_sensitivity is pruning_sensitivity
