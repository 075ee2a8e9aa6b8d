"""Distillation: the loss by hand, heads, labels that are missing, streams, refusals, and that it helps."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from compress.data.split import Data, Split, array_split
from compress.distillation import distill
from compress.errors import DataError, PassError, UsageError
from compress.finetuning import fine_tune
from compress.pruning.callback import Pruning
from compress.pruning.schedules import ConstantSchedule
from compress.training.options import Training

L = keras.layers
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(64, 5)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 1] > 0)
DATA = Data(train=array_split("train", X, Y))
FULL_BATCH = Training(epochs=1, batch_size=64, learning_rate=0.5, learning_rate_schedule="constant", optimizer="adam")


def linear(units: int = 3, activation: str | None = None, seed: int = 0, **options) -> keras.Sequential:
    keras.utils.set_random_seed(seed)
    return keras.Sequential([L.Input((5,)), L.Dense(units, activation=activation, name=f"out{seed}", **options)])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def first_loss(student, teacher, data, **options) -> float:
    """Return the loss of the first and only step, which covers all samples."""
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs["loss"])

    distill(student, teacher, data, training=FULL_BATCH, callbacks=[Look()], **options)
    return float(seen[0])


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("student_head", [None, "softmax"])
@pytest.mark.parametrize("teacher_head", [None, "softmax"])
def test_loss_is_the_formula_whatever_the_heads(student_head, teacher_head):
    student, teacher = linear(3, student_head, 0), linear(3, teacher_head, 1)
    zs, zt = (X @ m.layers[0].kernel.numpy() for m in (student, teacher))
    soft = kl(softmax(zt / 4), softmax(zs / 4)).mean() * 16
    hard = -np.log(softmax(zs)[np.arange(64), Y]).mean()
    expected = 0.75 * soft + 0.25 * hard
    assert first_loss(student, teacher, DATA, temperature=4.0, alpha=0.75) == pytest.approx(expected, rel=1e-4)


def test_sigmoid_heads_are_compared_as_yes_and_no():
    y = (Y > 0).astype("int32")
    data = Data(train=array_split("train", X, y))
    for student_head, teacher_head in (("sigmoid", "sigmoid"), (None, "sigmoid")):
        student, teacher = linear(1, student_head, 0), linear(1, teacher_head, 1)
        zs, zt = ((X @ m.layers[0].kernel.numpy())[:, 0] for m in (student, teacher))
        pairs = [softmax(np.stack([z, 0 * z], -1) / 2) for z in (zt, zs)]
        hard = np.log1p(np.exp(np.where(y == 1, -zs, zs))).mean()
        expected = 0.5 * kl(*pairs).mean() * 4 + 0.5 * hard
        assert first_loss(student, teacher, data, temperature=2.0, alpha=0.5) == pytest.approx(expected, rel=1e-4)


def test_regression_is_the_squared_error_to_the_teacher():
    y = X[:, :2]
    student, teacher = linear(2, None, 0), linear(2, None, 1)
    ps, pt = (X @ m.layers[0].kernel.numpy() for m in (student, teacher))
    expected = 0.5 * ((ps - pt) ** 2).mean() + 0.5 * ((ps - y) ** 2).mean()
    data = Data(train=array_split("train", X, y))
    assert first_loss(student, teacher, data, alpha=0.5) == pytest.approx(expected, rel=1e-4)


def test_samples_without_labels_count_for_the_teacher_alone():
    zs, zt = (X @ linear(3, None, seed).layers[0].kernel.numpy() for seed in (0, 1))
    soft = kl(softmax(zt), softmax(zs)).mean()
    hard = -np.log(softmax(zs)[np.arange(16), Y[:16]]).mean()
    marked = Y.copy()
    marked[16:] = -1
    for data in (
        Data(train=array_split("train", X[:16], Y[:16]), unlabelled=array_split("unlabelled", X[16:])),
        Data(train=array_split("train", X, marked)),
    ):
        loss = first_loss(linear(3, None, 0), linear(3, None, 1), data, temperature=1.0, alpha=0.5)
        assert loss == pytest.approx(0.5 * soft + 0.5 * hard, rel=1e-4)
    data = Data(unlabelled=array_split("unlabelled", X))
    loss = first_loss(linear(3, "softmax", 0), linear(3, "softmax", 1), data, temperature=1.0, alpha=0.5)
    assert loss == pytest.approx(0.5 * soft, rel=1e-4)


def test_a_loss_over_the_batch_cannot_leave_out_samples():
    def mean_loss(y, p):
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True))

    student, teacher = linear(), linear(seed=1)
    student.compile("sgd", mean_loss)
    assert np.isfinite(first_loss(student, teacher, DATA))
    data = Data(train=DATA.train, unlabelled=array_split("unlabelled", X))
    with pytest.raises(UsageError, match="mean_loss gives one for the batch"):
        first_loss(student, teacher, data)


def test_zeros_stay_zero_under_a_callback_that_holds_them():
    student = linear()
    kernel = student.layers[0].kernel
    kernel.assign(np.where(np.abs(kernel.numpy()) < 0.4, 0, kernel.numpy()))
    zeros = kernel.numpy() == 0
    assert zeros.any()
    callback = Pruning(0.0, schedule=ConstantSchedule())
    distill(student, linear(seed=1), DATA, training=Training(epochs=3, batch_size=8), callbacks=[callback])
    np.testing.assert_array_equal(kernel.numpy() == 0, zeros)
    assert kernel.constraint is None


def test_regularisers_of_the_student_count_once():
    plain = first_loss(linear(), linear(seed=1), DATA)
    student = linear(kernel_regularizer=keras.regularizers.L2(0.1))
    penalty = 0.1 * (student.layers[0].kernel.numpy() ** 2).sum()
    assert first_loss(student, linear(seed=1), DATA) == pytest.approx(plain + penalty, rel=1e-4)


def test_a_half_precision_teacher_gives_finite_logits():
    keras.utils.set_random_seed(1)
    teacher = keras.Sequential([L.Input((5,)), L.Rescaling(20.0), L.Dense(3, activation="softmax", dtype="float16")])
    assert teacher.predict(X, verbose=0).min() == 0.0
    assert np.isfinite(first_loss(linear(), teacher, DATA))


def stream(samples: np.ndarray, labels: np.ndarray | None = None) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(samples if labels is None else (samples, labels)).batch(64)


def test_streams_give_the_same_loss_as_arrays():
    expected = first_loss(linear(), linear(seed=1), DATA)
    data = Data(train=Split("train", stream=stream(X, Y)))
    assert first_loss(linear(), linear(seed=1), data) == pytest.approx(expected, rel=1e-5)
    steps = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps.append(batch)

    data = Data(train=Split("train", stream=stream(X, Y)), unlabelled=Split("unlabelled", stream=stream(X)))
    student = linear()
    distill(student, linear(seed=1), data, training=Training(epochs=2), callbacks=[Count()])
    assert steps == [0, 1, 0, 1]


@pytest.mark.parametrize("streamed", [False, True])
def test_teacher_is_untouched_and_the_student_comes_back_plain(streamed):
    teacher, student = linear(3, "softmax", 1), linear(3, "softmax", 0)
    teacher.layers[0].trainable = False
    student.compile(keras.optimizers.SGD(0.3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    before = teacher.get_weights()
    data = Data(train=Split("train", stream=stream(X, Y))) if streamed else DATA
    result = distill(student, teacher, data, training=Training(epochs=2))
    assert result is student
    assert type(student) is keras.Sequential
    assert (teacher.trainable, teacher.layers[0].trainable) == (True, False)
    for first, second in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)
    assert student.loss == "sparse_categorical_crossentropy"
    assert float(student.optimizer.learning_rate) == pytest.approx(0.3)
    assert int(student.optimizer.iterations) == 0
    assert len(student.trainable_variables) == 2
    assert set(student.evaluate(X, Y, verbose=0, return_dict=True)) == {"loss", "accuracy"}


def test_same_seed_same_student_bit_for_bit():
    runs = []
    for _ in range(2):
        student, teacher = linear(), linear(seed=1)
        keras.utils.set_random_seed(7)
        runs.append(distill(student, teacher, DATA, training=Training(epochs=3, batch_size=8)).get_weights())
    np.testing.assert_array_equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize("form", [list, dict])
def test_several_inputs_and_outputs(form):
    def model(seed: int) -> keras.Model:
        keras.utils.set_random_seed(seed)
        a, b = L.Input((5,), name="a"), L.Input((2,), name="b")
        h = L.Concatenate()([a, b])
        heads = {"kind": L.Dense(3, activation="softmax", name="kind")(h), "size": L.Dense(1, name="size")(h)}
        return keras.Model(
            {"a": a, "b": b} if form is dict else [a, b], heads if form is dict else list(heads.values())
        )

    arrays, labels = {"a": X, "b": X[:, :2]}, {"kind": Y, "size": X[:, 0]}
    if form is list:
        arrays, labels = list(arrays.values()), list(labels.values())
    student, teacher = model(0), model(1)
    gap = [_gap(student, teacher, arrays)]
    distill(student, teacher, Data(train=array_split("train", arrays, labels)), alpha=1.0,
            training=Training(epochs=25, batch_size=8, learning_rate=0.05))  # fmt: skip
    gap.append(_gap(student, teacher, arrays))
    assert gap[1] < 0.2 * gap[0]


def _gap(student: keras.Model, teacher: keras.Model, x) -> float:
    pairs = zip(*(keras.tree.flatten(m.predict(x, verbose=0)) for m in (student, teacher)), strict=True)
    return float(sum(np.abs(a - b).mean() for a, b in pairs))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = L.Dense(3, activation="softmax")

    def call(self, x):
        return self.dense(x)


def test_subclassed_students_learn_too():
    keras.utils.set_random_seed(0)
    student, teacher = Subclassed(), linear(3, "softmax", 1)
    distill(student, teacher, DATA, alpha=1.0, training=Training(epochs=25, batch_size=8, learning_rate=0.05))
    assert (student.predict(X, verbose=0).argmax(-1) == teacher.predict(X, verbose=0).argmax(-1)).mean() > 0.95


def test_what_does_not_fit_is_refused_before_training():
    student, teacher = linear(), linear(seed=1)
    before = student.get_weights()
    wide = keras.Sequential([L.Input((7,)), L.Dense(3)])
    broken = linear(seed=1)
    broken.set_weights([w * np.nan for w in broken.get_weights()])
    run = FULL_BATCH
    with pytest.raises(UsageError, match="same object for both"):
        distill(student, student, DATA, training=run)
    with pytest.raises(UsageError, match=r"teacher must be a keras.Model. Received: str"):
        distill(student, "teacher.keras", DATA, training=run)
    with pytest.raises(UsageError, match=r"temperature must be above 0. Received: 0"):
        distill(student, teacher, DATA, training=run, temperature=0)
    with pytest.raises(UsageError, match=r"alpha must be above 0 and at most 1. Received: 0"):
        distill(student, teacher, DATA, training=run, alpha=0)
    with pytest.raises(DataError, match=r"same inputs. Received: teacher \(7,\), student \(5,\)"):
        distill(student, wide, DATA, training=run)
    with pytest.raises(DataError, match=r"same outputs. Received: teacher \(4,\), student \(3,\)"):
        distill(student, linear(4), DATA, training=run)
    with pytest.raises(DataError, match="same kind of thing in output"):
        distill(linear(3, "softmax"), linear(3, "sigmoid", 1), DATA, training=run)
    with pytest.raises(DataError, match=r"teacher's outputs must be finite"):
        distill(student, broken, DATA, training=run)
    with pytest.raises(DataError, match=r"needs a 'train' split"):
        distill(student, teacher, Data(), training=run)
    np.testing.assert_array_equal(before[0], student.get_weights()[0])


def test_a_lost_loss_brings_back_the_last_good_student():
    kept = []

    class Poison(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept.append(self.model.student.get_weights())
            self.model.student.set_weights([w * np.nan for w in kept[-1]]) if epoch == 1 else None

    student = linear()
    with pytest.raises(PassError, match=r"weights became NaN or infinite in epoch 2, step 8") as caught:
        distill(student, linear(seed=1), DATA, training=Training(epochs=4, batch_size=8), callbacks=[Poison()])
    assert caught.value.epoch == 2
    np.testing.assert_array_equal(student.get_weights()[0], kept[0][0])


def test_a_student_with_few_labels_is_lifted_by_a_teacher():
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype("float32").reshape(-1, 8, 8, 1), y.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]

    def net(*filters: int) -> keras.Sequential:
        keras.utils.set_random_seed(1)
        convs = [L.Conv2D(f, 3, padding="same", activation="relu") for f in filters]
        layers = [convs[0], L.MaxPooling2D(), *convs[1:], L.Flatten(), L.Dense(10, activation="softmax")]
        return keras.Sequential([L.Input((8, 8, 1)), *layers])

    def accuracy(model: keras.Model) -> float:
        return float((model.predict(x[1200:], verbose=0).argmax(-1) == y[1200:]).mean())

    teacher, alone, student = net(16, 32), net(8), net(8)
    fine_tune(teacher, Data(train=array_split("train", x[:1200], y[:1200])), Training(epochs=10, learning_rate=5e-3))
    few = array_split("train", x[:100], y[:100])
    # 380 steps for either student
    fine_tune(alone, Data(train=few), Training(epochs=190, batch_size=64, learning_rate=1e-2))
    data = Data(train=few, unlabelled=array_split("unlabelled", x[100:1200]))
    distill(student, teacher, data, training=Training(epochs=20, batch_size=64, learning_rate=1e-2))
    assert accuracy(teacher) > 0.96
    assert accuracy(student) > accuracy(alone) + 0.02
