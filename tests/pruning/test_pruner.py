"""`Pruner`: three calls in a loop of one's own; bad input is refused before the first step."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from compress.errors import DataError, UsageError
from compress.pruning.callback import Pruning
from compress.pruning.pruner import Pruner
from compress.pruning.schedules import ConstantSchedule, IterativeSchedule, PolynomialSchedule, Regrowth

X = np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 64)
LINEAR = PolynomialSchedule(end=0.5, power=1, frequency=2)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build(compiled: bool = True) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(10, activation="tanh", name="first"),
            layers.BatchNormalization(),
            layers.Dense(3, name="last"),
        ]
    )
    if compiled:
        model.compile(keras.optimizers.SGD(0.1), LOSS)
    return model


def zeros(model: keras.Model) -> list[int]:
    return [int(np.count_nonzero(np.array(model.get_layer(name).kernel) == 0)) for name in ("first", "last")]


def step_with_tape(model: keras.Model, optimizer: keras.optimizers.Optimizer):
    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = LOSS(Y, model(X, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return step


@pytest.mark.parametrize("compiled", [True, False])
def test_three_calls_in_a_loop_with_a_tape(compiled):
    model, optimizer = build(compiled), keras.optimizers.AdamW(0.05, weight_decay=0.1)
    pruner = Pruner(model, 0.8, steps=20, schedule=LINEAR)
    step, counts, losses = step_with_tape(model, optimizer), [], []
    for _ in range(20):
        losses.append(float(step()))
        assert pruner.step() is None
        counts.append(zeros(model)[0])
    pruner.finish()
    # 120 weights: 0.8 * (k / 10) of them after step k = 2, 4, ... 10
    assert counts == [0, 19, 19, 38, 38, 58, 58, 77, 77] + [96] * 11
    assert zeros(model) == [96, 24]
    assert losses[-1] < losses[0]
    kernel = np.array(model.get_layer("first").kernel)
    assert not np.signbit(kernel[kernel == 0]).any()
    assert all(variable.constraint is None for variable in model.variables)
    plain = step_with_tape(model, keras.optimizers.SGD(0.1))
    for _ in range(3):  # units of the first layer that nothing used have no gradient in the first step
        plain()
    assert zeros(model) == [0, 0]


def test_several_steps_in_one_function_are_exact():
    model, optimizer = build(), keras.optimizers.SGD(0.1)
    pruner = Pruner(model, 0.5, steps=4, schedule=ConstantSchedule())
    step = step_with_tape(model, optimizer)
    violations = []

    @tf.function
    def two_steps():
        step()
        between = tf.math.count_nonzero(tf.equal(model.get_layer("first").kernel.value, 0))
        step()
        return between

    for _ in range(2):
        violations.append(int(two_steps()))
        pruner.step()
        pruner.step()
    pruner.finish()
    assert violations == [60, 60]


def test_a_foreign_way_of_updating_weights():
    model = build()
    pruner = Pruner(model, 0.5, steps=3, schedule=ConstantSchedule())
    for _ in range(3):
        for weight in model.trainable_variables:
            weight.assign_add(np.ones(weight.shape))
        pruner.step()
        assert zeros(model) == [60, 15]
    pruner.finish()


def test_a_loop_that_ends_early_is_told_and_pruned():
    model = build()
    pruner = Pruner(model, 0.8, steps=20, schedule=LINEAR)
    for _ in range(5):
        pruner.step()
    with pytest.warns(UserWarning, match=r"stopped at sparsity 0\.320, before the schedule reached 0\.8"):
        pruner.finish()
    assert zeros(model) == [96, 24]


def test_more_steps_than_announced():
    pruner = Pruner(build(), 0.5, steps=1, schedule=ConstantSchedule())
    pruner.step()
    with pytest.raises(UsageError, match="at most 1 steps, as announced. Received: step 2"):
        pruner.step()


BAD = {
    "range": ({"sparsity": 1.0}, "sparsity=1.0"),
    "steps": ({"steps": 0}, "steps=0"),
    "no-sparsity": ({"sparsity": None}, "sparsity=None"),
    "n:m": ({"sparsity": None, "pattern": "2:5"}, "multiple of 5 inputs. Received: first/kernel with 12"),
    "n:m-sparsity": ({"sparsity": 0.8, "pattern": "2:4"}, "has sparsity 0.5"),
    "no-match": ({"include": ["stem*"]}, "the pattern matches no layer"),
    "frozen": ({"include": ["frozen"]}, "frozen/kernel: frozen"),
    "score": ({"score": "luck"}, "score to be one of"),
    "distribution": ({"distribution": "even"}, "distribution to be one of"),
    "taylor-data": ({"score": "taylor"}, "data=None"),
    "regrow-data": ({"regrow": Regrowth()}, "data=None"),
    "movement-first": ({"score": "movement", "schedule": ConstantSchedule()}, "needs training before"),
    "rounds": ({"schedule": IterativeSchedule(rounds=10)}, "10 rounds; first/kernel would not reach sparsity 0.5"),
    "late": (
        {"schedule": SimpleNamespace(begin=0.0, end=1.5, frequency=1, sparsity_at=lambda p, s: s * min(1, p / 1.5))},
        r"training of 10 steps does. Received: its end at step 15; first/kernel",
    ),
    "emptied": ({"sparsity": 0.99}, "last/kernel to keep a weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_before_training(name):
    options, message = BAD[name]
    model = build()
    if name == "frozen":
        inputs = keras.Input((3,))
        frozen = layers.Dense(4, name="frozen", trainable=False)(inputs)
        model = keras.Model(inputs, layers.Dense(3, name="end")(frozen))
        model.compile("sgd", "mse")
    before = model.get_weights()
    with pytest.raises(UsageError, match=message):
        Pruner(model, **{"sparsity": 0.5, "steps": 10, **options})
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert all(variable.constraint is None for variable in model.variables)


def test_fit_is_refused_before_training_too():
    model = build()
    before = model.get_weights()
    with pytest.raises(UsageError, match="10 rounds"):
        model.fit(X, Y, batch_size=32, verbose=0, callbacks=[Pruning(0.5, schedule=IterativeSchedule(rounds=10))])
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert all(variable.constraint is None for variable in model.variables)


def test_gradients_need_a_loss_and_labels():
    with pytest.raises(UsageError, match="not compiled"):
        Pruner(build(compiled=False), 0.5, steps=10, score="taylor", data=(X, Y))
    model = build()
    with pytest.raises(DataError, match="labels"):
        Pruner(model, 0.5, steps=10, regrow=Regrowth(), data=X)
    assert all(variable.constraint is None for variable in model.variables)


def test_regrowth_keeps_the_count_and_moves_weights():
    model = build()
    pruner = Pruner(model, 0.5, steps=40, schedule=ConstantSchedule(), regrow=Regrowth(end=0.8), data=(X, Y))
    step, kernel, patterns = step_with_tape(model, keras.optimizers.SGD(0.1)), model.get_layer("first").kernel, []
    for _ in range(40):
        step()
        patterns.append(np.array(kernel) != 0)
        assert np.count_nonzero(patterns[-1]) == 60
        pruner.step()
    pruner.finish()
    changed = [int(np.count_nonzero(a != b)) for a, b in itertools.pairwise(patterns)]
    assert sum(change > 0 for change in changed) == 1  # at step 20; the end at step 32 is before the next, 40
    # 60 * 0.3 / 2 * (1 + cos(pi * 0.5 / 0.8)) = 5.6: six go and six come, of which some may be the same
    assert max(changed) in (2, 4, 6, 8, 10, 12)
    assert zeros(model) == [60, 15]


def test_rewinding():
    model = build()
    start = [np.array(weight) for weight in model.weights]
    pruner = Pruner(model, 0.75, steps=9, schedule=IterativeSchedule(rounds=2, rewind_to=0.0))
    step = step_with_tape(model, keras.optimizers.SGD(0.1))
    for number in range(1, 10):
        step()
        pruner.step()
        for weight, old in zip(model.weights, start, strict=True):
            now = np.array(weight)
            assert np.array_equal(now, np.where(now == 0, now, old)) == (number in (3, 6)) or not old.any()
        assert zeros(model)[0] == {3: 60, 4: 60, 5: 60}.get(number, 0 if number < 3 else 90)
    pruner.finish()


DEVICES = """
import sys, keras, numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from compress import Pruner, Pruning, ConstantSchedule, PolynomialSchedule
keras.utils.set_random_seed(0)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x, y = np.random.default_rng(0).standard_normal((64, 12)).astype("float32"), np.arange(64) % 3
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

def zeros(model):
    copies = strategy.experimental_local_results(model.layers[0].kernel.value)
    return [int(np.count_nonzero(np.array(copy) == 0)) for copy in copies]

class Watch(keras.callbacks.Callback):
    seen = []
    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(zeros(self.model))

def build(optimizer):
    with strategy.scope():
        model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(10), keras.layers.Dense(3)])
        model.compile(optimizer(), loss)
    return model

for optimizer in (lambda: keras.optimizers.Adam(0.05), lambda: keras.optimizers.AdamW(0.05, use_ema=True)):
    model = build(optimizer)
    pruning = Pruning(0.8, schedule=PolynomialSchedule(end=0.5, frequency=2, power=1))
    Watch.seen = []
    model.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=[pruning, Watch()])
    assert Watch.seen[-8:] == [[96, 96]] * 8, Watch.seen
    assert Watch.seen[3] == [48, 48], Watch.seen
    assert zeros(model) == [96, 96]

model = build(lambda: keras.optimizers.SGD(0.1))
pruner = Pruner(model, 0.5, steps=5, schedule=ConstantSchedule())

@tf.function
def step():
    def replica():
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        variables = model.trainable_variables
        model.optimizer.apply(tape.gradient(value, variables), variables)
    strategy.run(replica)

for _ in range(5):
    step()
    assert zeros(model) == [60, 60]
    pruner.step()
pruner.finish()
assert zeros(model) == [60, 60]
print("fine")
"""


def test_two_devices(tmp_path):
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("fine\n"), done.stderr[-3000:]
