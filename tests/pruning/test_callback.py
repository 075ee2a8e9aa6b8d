"""Pruning during `fit`: exact sparsity in every way of training, plain models, and no trace afterwards."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from compress.errors import PassError, UsageError
from compress.pruning.callback import Pruning
from compress.pruning.masked_weights import MaskConstraint
from compress.pruning.schedules import ConstantSchedule, PolynomialSchedule
from compress.training.weight_constraints import find_constraint

X = np.random.default_rng(0).standard_normal((64, 6, 6, 2)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 64)
ALL_ZEROS = {"conv/kernel": 43, "head/kernel": 115}  # round(0.8 * 54), round(0.8 * 144)


def build(optimizer="adam", policy="float32", constraint=None, **settings) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(3, 3, name="conv", dtype=policy)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(dtype=policy)(x))
    x = layers.Dense(3, name="head", dtype=policy, kernel_constraint=constraint)(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Activation("linear", dtype="float32")(x))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **settings)
    return model


def zeros(model: keras.Model) -> dict[str, int]:
    kernels = {f"{name}/kernel": model.get_layer(name).kernel for name in ("conv", "head")}
    return {name: int(np.count_nonzero(to_numpy(kernel) == 0)) for name, kernel in kernels.items()}


def to_numpy(variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype(np.float32)


def train(model: keras.Model, *callbacks, epochs: int = 3, **options):
    return model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks), **options)


class Record(keras.callbacks.Callback):
    """Keeps the zeros of both kernels after every call of on_train_batch_end, and counts weights outside of masks."""

    def __init__(self):
        super().__init__()
        self.zeros = []
        self.violations = 0

    def on_train_batch_end(self, batch, logs=None):
        self.zeros.append(zeros(self.model))
        for kernel in (self.model.get_layer(name).kernel for name in ("conv", "head")):
            if (held := find_constraint(kernel, MaskConstraint)) is not None:
                self.violations += np.count_nonzero(to_numpy(kernel)[to_numpy(held.mask) == 0])


def sgd(**options):
    return keras.optimizers.SGD(0.1, momentum=0.9, **options)


@pytest.mark.filterwarnings("error:training stopped")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"jit_compile": True},
        {"run_eagerly": True},
        {"steps_per_execution": 4},
        {"steps_per_execution": 4, "jit_compile": True},
        {"policy": "mixed_float16", "optimizer": lambda: keras.optimizers.LossScaleOptimizer(sgd())},
        {
            "policy": "mixed_float16",
            "jit_compile": True,
            "optimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05)),
        },
        {"policy": "bfloat16"},
        {"optimizer": lambda: sgd(gradient_accumulation_steps=3)},
        {"optimizer": lambda: sgd(use_ema=True, ema_overwrite_frequency=3, ema_momentum=0.5)},
        {"optimizer": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1, use_ema=True)},
    ],
    ids=[
        "default",
        "jit",
        "eager",
        "executions",
        "jit-executions",
        "float16",
        "float16-jit",
        "bfloat16",
        "accumulation",
        "ema-steps",
        "ema-end",
    ],
)
def test_exact_sparsity_and_nothing_left_behind(settings):
    optimizer = settings.pop("optimizer", sgd)
    model = build(optimizer(), **settings)
    dense = [to_numpy(value) for value in model.weights]
    record = Record()
    train(model, Pruning(0.8, schedule=PolynomialSchedule(frequency=4)), record)
    heads = [each["head/kernel"] for each in record.zeros]
    assert record.violations == 0
    assert heads == sorted(heads)
    assert 0 < heads[len(heads) // 3] < 115
    assert zeros(model) == ALL_ZEROS
    values = to_numpy(model.get_layer("head").kernel)
    assert not np.signbit(values[values == 0]).any()  # -0.0 would not compress
    assert all(np.count_nonzero(to_numpy(v)) for v in model.trainable_weights if v.name in ("bias", "gamma"))
    assert any(not np.array_equal(a, to_numpy(b)) for a, b in zip(dense, model.weights, strict=True))
    assert all(variable.constraint is None for variable in model.variables)
    train(model, epochs=1)
    assert zeros(model) == {"conv/kernel": 0, "head/kernel": 0}  # the mask is out of the compiled step, too


def test_schedule_is_followed_and_never_dense_in_between():
    model, record = build(), Record()
    schedule = PolynomialSchedule(begin=0.25, end=0.75, power=1, frequency=3)
    train(model, Pruning(0.8, schedule=schedule, include=["head"]), record)  # 24 steps: begin at 6, end at 18
    steps = [0] * 5 + [0] * 3 + [29] * 3 + [58] * 3 + [86] * 3 + [115] * 7  # round(144 * (0.2, 0.4, 0.6, 0.8))
    assert [each["head/kernel"] for each in record.zeros] == steps
    assert {each["conv/kernel"] for each in record.zeros} == {0}


def test_steps_are_not_counted_in_calls():
    model, record = build(steps_per_execution=3), Record()
    train(model, Pruning(0.8, schedule=ConstantSchedule(begin=0.5)), record, epochs=2)  # 16 steps, 3 calls each
    assert [each["head/kernel"] for each in record.zeros] == [0, 0, 115, 115, 115, 115]


def test_constant_schedule_prunes_before_the_first_step():
    record = Record()
    train(build(), Pruning(0.8, schedule=ConstantSchedule()), record, epochs=1)
    assert record.zeros == [ALL_ZEROS] * 8


def test_zeros_of_an_earlier_pruning_stay():
    model, record = build(), Record()
    train(model, Pruning(0.8), epochs=2)
    before = to_numpy(model.get_layer("head").kernel)
    train(model, Pruning(0.0), record, epochs=1)
    train(model, Pruning(0.3), record, epochs=1)
    after = to_numpy(model.get_layer("head").kernel)
    assert record.zeros == [ALL_ZEROS] * 16
    assert np.array_equal(before == 0, after == 0)
    assert not np.array_equal(before, after)


class Crash(keras.callbacks.Callback):
    """Raises at the end of an epoch."""

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise RuntimeError("crash")


def test_resumed_is_the_same_as_uninterrupted():
    schedule = PolynomialSchedule(end=0.9, frequency=3)
    whole, parts = build(sgd()), build(sgd())
    train(whole, Pruning(0.8, schedule=schedule), epochs=4, shuffle=False)
    with pytest.raises(RuntimeError, match="crash"):
        train(parts, Pruning(0.8, schedule=schedule), Crash(1), epochs=4, shuffle=False)
    assert 0 < zeros(parts)["head/kernel"] < ALL_ZEROS["head/kernel"]
    train(parts, Pruning(0.8, schedule=schedule), epochs=4, initial_epoch=2, shuffle=False)
    assert zeros(parts) == ALL_ZEROS
    assert all(np.array_equal(a, b) for a, b in zip(whole.get_weights(), parts.get_weights(), strict=True))


def test_after_a_crash():
    model = build(constraint=keras.constraints.MaxNorm(1.0))
    first, second = Pruning(0.8), Pruning(0.5, include=["head"])
    with pytest.raises(RuntimeError, match="crash"):
        train(model, first, Crash(0))
    assert isinstance(model.get_layer("conv").kernel.constraint, MaskConstraint)
    train(model, second)  # clears what the first has left, on its own layers and on others
    assert model.get_layer("conv").kernel.constraint is None
    with pytest.raises(RuntimeError, match="crash"):
        train(model, first, Crash(0))
    first.remove()
    first.remove()
    assert isinstance(model.get_layer("head").kernel.constraint, keras.constraints.MaxNorm)
    train(model, epochs=1)
    assert zeros(model) == {"conv/kernel": 0, "head/kernel": 0}


def test_constraint_of_the_layer_is_kept():
    model = build(sgd(), constraint=keras.constraints.MaxNorm(0.3))
    train(model, Pruning(0.5))
    kernel = to_numpy(model.get_layer("head").kernel)
    assert np.count_nonzero(kernel == 0) == 72
    assert np.linalg.norm(kernel, axis=0).max() <= 0.3 + 1e-5
    assert isinstance(model.get_layer("head").kernel.constraint, keras.constraints.MaxNorm)


def test_two_callbacks_on_one_model():
    model = build()
    train(model, Pruning(0.5, include=["conv"]), Pruning(0.8, include=["head"]))
    assert zeros(model) == {"conv/kernel": 27, "head/kernel": 115}
    with pytest.raises(UsageError, match="conv/kernel is pruned by two"):
        train(model, Pruning(0.5, include=["conv"]), Pruning(0.8))


def test_global_distribution():
    model = build()
    train(model, Pruning(0.5, distribution="global"))
    assert sum(zeros(model).values()) == 99  # half of 54 + 144


LOAD = """
import sys, keras, numpy as np
for path in sys.argv[1:]:
    model = keras.saving.load_model(path)
    print([int((model.get_layer(name).get_weights()[0] == 0).sum()) for name in ("conv", "head")])
assert not [name for name in sys.modules if name.split(".")[0] == "compress"]
"""


def test_checkpoints_are_sparse_and_plain(tmp_path):
    def checkpoint(name, **options):
        return keras.callbacks.ModelCheckpoint(str(tmp_path / name), **options)

    pruning = Pruning(0.8, schedule=PolynomialSchedule(end=0.6, frequency=2))
    before, after = checkpoint("before-{epoch}.keras"), checkpoint("after-{epoch}.keras")
    model = build()
    train(
        model,
        before,
        checkpoint("b.keras", save_freq=21),
        pruning,
        after,
        checkpoint("a.keras", save_freq=21),
    )
    model.save(tmp_path / "end.keras")
    names = ["before-2", "after-2", "b", "a", "end", "before-1", "after-1"]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        LOAD,
        *(str(tmp_path / f"{name}.keras") for name in names),
    ]
    loaded = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert loaded.returncode == 0, loaded.stderr
    *final, before_1, after_1 = loaded.stdout.splitlines()
    assert final == ["[43, 115]"] * 5
    assert before_1 == after_1 == "[39, 105]"  # step 8 of 24: sparsity 0.8 - 0.8 * (1 - 8 / 14.4) ** 3


@pytest.mark.parametrize("known", [True, False], ids=["steps-known", "steps-unknown"])
def test_length_of_training(known):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    if not known:
        data = data.filter(lambda x, y: True)
    model, record = build(), Record()
    schedule = PolynomialSchedule(end=0.75, power=1, frequency=1)
    model.fit(data, epochs=2, verbose=0, callbacks=[Pruning(0.9, schedule=schedule), record])
    assert zeros(model)["head/kernel"] == 130
    steps = range(1, 17)
    expected = [round(min(1, step / 12) * 0.9 * 144) for step in steps]
    if not known:  # at the initial sparsity until the first epoch has shown how long it is
        expected[:8] = [0] * 8
    assert [each["head/kernel"] for each in record.zeros] == pytest.approx(expected, abs=1)


def test_unknown_length_of_one_epoch():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).filter(lambda x, y: True)
    model = build()
    with pytest.raises(UsageError, match="length is known"):
        model.fit(data, epochs=1, verbose=0, callbacks=[Pruning(0.8)])
    model.fit(data, epochs=1, verbose=0, callbacks=[Pruning(0.8, schedule=ConstantSchedule())])
    assert zeros(model) == ALL_ZEROS


def test_training_that_stops_early_still_ends_at_the_final_sparsity():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    model = build()
    with pytest.warns(UserWarning, match=r"training stopped at sparsity 0\.\d+, before"):
        train(model, Pruning(0.8), Stop(), epochs=4)
    assert zeros(model) == ALL_ZEROS


def test_nan_weights_stop_training_and_leave_no_mask():
    class Poison(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 5:
                self.model.get_layer("head").kernel.assign(np.full((48, 3), np.nan))

    model = build()
    with pytest.raises(PassError, match=r"NaN in \w+/kernel"):
        train(model, Pruning(0.8, schedule=PolynomialSchedule(frequency=1)), Poison())
    assert all(variable.constraint is None for variable in model.variables)


def test_bad_options():
    with pytest.raises(UsageError, match=r"sparsity=1\.2"):
        Pruning(1.2)
    with pytest.raises(UsageError, match="initial sparsity"):
        Pruning(0.5, schedule=PolynomialSchedule(initial_sparsity=0.6))
    with pytest.raises(UsageError, match="distribution"):
        Pruning(0.5, distribution="even")
    with pytest.raises(UsageError, match="the pattern matches no layer"):
        train(build(), Pruning(0.5, include=["stem*"]))
