"""What pruning promises on every backend of Keras; run as backend_checks.py is."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest

import compress
from compress.pruning.schedules import ConstantSchedule, IterativeSchedule, PolynomialSchedule, Regrowth

ON_JAX = keras.backend.backend() == "jax"
ON_TORCH = keras.backend.backend() == "torch"
X = np.random.default_rng(0).standard_normal((64, 12)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 64)
CUBIC = PolynomialSchedule(frequency=2)


def build(optimizer=None, policy="float32", **settings):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(10, activation="tanh", name="first", dtype=policy),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(3, name="last", dtype="float32"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(0.05), loss, metrics=["accuracy"], **settings)
    return model


def to_numpy(value):
    return keras.ops.convert_to_numpy(value).astype("float32")


def zeros(model):
    return [int(np.count_nonzero(to_numpy(model.get_layer(name).kernel) == 0)) for name in ("first", "last")]


class Watch(keras.callbacks.Callback):
    """Keeps the zeros after each call, and whether a weight lies where its mask is 0."""

    def __init__(self):
        super().__init__()
        self.zeros, self.violations = [], 0

    def on_train_batch_end(self, batch, logs=None):
        model = self.model
        self.zeros.append(zeros(model))
        for name in ("first", "last"):
            kernel = model.get_layer(name).kernel
            self.violations += np.count_nonzero(to_numpy(kernel)[to_numpy(kernel.constraint.mask) == 0])


def train(model, *callbacks, epochs=3, **options):
    return model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks), **options)


SETTINGS = {
    "adam": {},
    "executions": {"steps_per_execution": 4},
    "eager": {"run_eagerly": True},
    "accumulation": {"optimizer": lambda: keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=3)},
    "ema": {"optimizer": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1, use_ema=True)},
    "ema-steps": {"optimizer": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=3)},
    "float16": {
        "policy": "mixed_bfloat16" if ON_TORCH else "mixed_float16",
        "optimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)),
    },
}
if ON_TORCH:
    del SETTINGS["executions"]  # must be 1 there
else:
    SETTINGS["jit"] = {"jit_compile": True}
    SETTINGS["plain"] = {"jit_compile": False}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_step_is_sparse_and_the_end_exact(name):
    settings = dict(SETTINGS[name])
    make = settings.pop("optimizer", None)
    model = build(make() if make else None, **settings)
    before, watch = model.get_weights(), Watch()
    train(model, compress.Pruning(0.8, schedule=CUBIC), watch)
    assert watch.violations == 0
    assert watch.zeros == sorted(watch.zeros)
    assert 0 < watch.zeros[2][0] < 96 or name == "executions"
    assert zeros(model) == [96, 24]
    assert not any(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True) if a.ndim == 2)
    assert all(variable.constraint is None for variable in model.variables)


def test_training_on_without_masks():
    model = build()
    train(model, compress.Pruning(0.8))
    train(model, epochs=1)
    assert zeros(model) == [0, 0]


def test_a_mask_that_moves_compiles_nothing_anew():
    traced = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            traced.append(1)
            return x

    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8), Counting(), keras.layers.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=not ON_TORCH)
    if ON_TORCH:
        pytest.skip("nothing is compiled")
    traced.clear()
    train(model, compress.Pruning(0.8, schedule=PolynomialSchedule(frequency=1)), epochs=4)
    assert len(traced) <= 3


def test_patterns_scores_and_regrowth():
    for options in (
        {"pattern": "2:4", "include": ["first"], "sparsity": None},
        {"sparsity": 0.5, "score": "taylor", "data": (X, Y)},
        {"sparsity": 0.5, "score": "movement", "schedule": PolynomialSchedule(begin=0.2, frequency=2)},
        {"sparsity": 0.5, "regrow": Regrowth(), "data": (X, Y), "schedule": PolynomialSchedule(frequency=3)},
    ):
        model, watch = build(), Watch()
        only_first = options.get("include") is not None
        train(model, compress.Pruning(**options), *([] if only_first else [watch]))
        assert zeros(model) == ([60, 0] if only_first else [60, 15]), options
        assert watch.violations == 0


def test_rewinding_returns_to_the_start():
    model = build(keras.optimizers.SGD(0.1))
    start = to_numpy(model.get_layer("first").kernel)
    seen = []

    class See(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen.append(to_numpy(self.model.get_layer("first").kernel))

    schedule = IterativeSchedule(rounds=2, rewind_to=0.0)
    train(model, compress.Pruning(0.75, schedule=schedule), See(), epochs=3)  # rounds end after steps 8 and 16
    for step, count in ((7, 60), (15, 90)):
        kernel = seen[step]
        assert np.count_nonzero(kernel == 0) == count
        assert np.array_equal(kernel, np.where(kernel == 0, 0, start))
    assert zeros(model)[0] == 90


def test_checkpoints_load_without_a_warning(tmp_path):
    model = build()
    pruning = compress.Pruning(0.8, schedule=PolynomialSchedule(end=0.6, frequency=2))
    files = [tmp_path / "model.keras", tmp_path / "only.weights.h5"]
    savers = [
        keras.callbacks.ModelCheckpoint(str(path), save_freq=11, save_weights_only="weights" in path.name)
        for path in files
    ]
    train(model, savers[0], pruning, savers[1], epochs=2)  # saved after step 11 of 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = keras.saving.load_model(files[0])
        other = build()
        other.optimizer.build(other.trainable_variables)
        other.load_weights(files[1])
    for loaded in (whole, other):
        assert zeros(loaded) == [96, 24]
        assert int(loaded.optimizer.iterations) == 11
        assert len(loaded.optimizer.variables) == 2 + 2 * 6  # counter, rate, and Adam's two moments of six variables


@pytest.mark.parametrize("options", [{}, {"regrow": Regrowth(end=0.9), "data": (X, Y)}], ids=["prune", "regrow"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, options):
    class Crash(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 14:
                raise RuntimeError("crash")

    def model():
        keras.utils.set_random_seed(3)
        net = keras.Sequential(
            [keras.Input((12,)), keras.layers.Dense(10, "tanh", name="first"), keras.layers.Dense(3, name="last")]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        net.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
        return net

    def pruning():
        return compress.Pruning(0.8, schedule=PolynomialSchedule(end=0.8, frequency=3), **options)

    whole, parts = model(), model()
    train(whole, pruning(), epochs=4)
    with pytest.raises(RuntimeError, match="crash"):
        train(parts, pruning(), keras.callbacks.BackupAndRestore(str(tmp_path / "backup")), Crash(), epochs=4)
    again = model()
    train(again, pruning(), keras.callbacks.BackupAndRestore(str(tmp_path / "backup")), epochs=4)
    assert zeros(again) == [96, 24]
    for a, b in zip(whole.get_weights(), again.get_weights(), strict=True):
        assert np.array_equal(a, b)


def test_a_loop_with_the_optimizer_of_keras():
    if ON_JAX:
        pytest.skip("its loops are stateless, see below")
    import torch

    model = build()
    pruner = compress.Pruner(model, 0.8, steps=20, schedule=CUBIC)
    for step in range(20):
        model.zero_grad()
        loss = model.compute_loss(y=torch.tensor(Y), y_pred=model(X, training=True))
        loss.backward()
        variables = model.trainable_weights
        with torch.no_grad():
            model.optimizer.apply([v.value.grad for v in variables], variables)
        pruner.step()
        assert (zeros(model)[0] > 0) == (step > 0)
    pruner.finish()
    assert zeros(model) == [96, 24]


def test_a_loop_with_a_foreign_optimizer():
    if ON_JAX:
        pytest.skip("its loops are stateless, see below")
    import torch

    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    pruner = compress.Pruner(model, 0.8, steps=20, schedule=ConstantSchedule())
    for _ in range(20):
        optimizer.zero_grad()
        model.compute_loss(y=torch.tensor(Y), y_pred=model(X, training=True)).backward()
        optimizer.step()
        pruner.step()
        assert zeros(model) == [96, 24]
    pruner.finish()
    assert zeros(model) == [96, 24]


@pytest.mark.skipif(not ON_JAX, reason="stateless loops are JAX's")
@pytest.mark.parametrize(
    ("donate", "options"),
    [(True, {}), (False, {}), (True, {"regrow": Regrowth(), "data": (X, Y)})],
    ids=["donated", "kept", "regrow"],
)
def test_a_stateless_loop(donate, options):
    import jax

    model = build()
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)

    def loss_of(trainable, others, x, y):
        outputs, others = model.stateless_call(trainable, others, x, training=True)
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, outputs), others

    def train_step(trainable, others, slots, x, y):
        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable, others, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return loss, trainable, others, slots

    train_step = jax.jit(train_step, donate_argnums=(0, 1, 2) if donate else ())
    pruner = compress.Pruner(model, 0.8, steps=30, schedule=CUBIC, **options)
    state = [[jax.numpy.copy(v.value) for v in variables] for variables in (
        model.trainable_variables, model.non_trainable_variables, optimizer.variables
    )]  # fmt: skip
    trainable, others, slots = state
    first = next(i for i, v in enumerate(model.trainable_variables) if v is model.get_layer("first").kernel)
    counts, losses = [], []
    for _ in range(30):
        loss, trainable, others, slots = train_step(trainable, others, slots, X, Y)
        trainable = pruner.step(trainable)
        losses.append(float(loss))
        counts.append(int(np.count_nonzero(np.asarray(trainable[first]) == 0)))
    trainable = pruner.finish(trainable)
    assert counts == sorted(counts) or options  # what has just regrown is still zero
    assert counts[2] > 0
    assert [int(np.count_nonzero(np.asarray(v) == 0)) for v in trainable if v.ndim == 2] == [96, 24]
    assert zeros(model) == [96, 24]
    assert losses[-1] < losses[0]
    assert all(variable.constraint is None for variable in model.variables)
