"""Fine-tuning: in place, reproducible, stopped when the loss is lost, clean afterwards."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from compress.data.split import Data, Split, array_split
from compress.errors import DataError, PassError
from compress.finetuning import fine_tune
from compress.progress import show_progress
from compress.training.options import Training

L = keras.layers
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(96, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 1] > 0)
DATA = Data(train=array_split("train", X, Y))
TRAINING = Training(epochs=3, batch_size=16, learning_rate=0.01)


def net(seed: int = 0) -> keras.Sequential:
    keras.utils.set_random_seed(seed)
    return keras.Sequential([L.Input((6,)), L.Dense(16, activation="relu"), L.Dropout(0.1), L.Dense(3)])


def test_training_module_imports_nothing_heavy():
    heavy = ("keras", "tensorflow", "numpy")
    code = f"import compress.training.options, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_uncompiled_model_learns_and_ends_compiled():
    model = net()
    history = fine_tune(model, DATA, Training(epochs=20, batch_size=16, learning_rate=0.01))
    assert set(history) == {"loss", "sparse_categorical_accuracy"}
    assert len(history["loss"]) == 20
    assert history["sparse_categorical_accuracy"][-1] > 0.8
    assert set(model.evaluate(X, Y, verbose=0, return_dict=True)) == {"loss", "sparse_categorical_accuracy"}
    assert int(model.optimizer.iterations) == 0


def test_compile_settings_stay_and_the_optimizer_is_fresh():
    def own_loss(y, p):
        return keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True)

    model = net()
    model.compile(keras.optimizers.SGD(0.3, momentum=0.5), own_loss, metrics=["accuracy"], steps_per_execution=2)
    model.fit(X, Y, verbose=0)
    history = fine_tune(model, DATA, TRAINING)
    assert history["loss"][-1] < history["loss"][0]
    assert set(history) == {"loss", "accuracy"}
    assert model.loss is own_loss
    assert model.steps_per_execution == 2
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.3)
    assert int(model.optimizer.iterations) == 0
    model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("stream", [False, True])
def test_same_seed_same_weights_bit_for_bit(stream):
    runs = []
    for _ in range(2):
        model = net()
        keras.utils.set_random_seed(7)
        data = DATA
        if stream:  # made anew: a dataset that shuffles goes on where it was
            dataset = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(96).batch(16)
            data = Data(train=Split("train", stream=dataset))
        fine_tune(model, data, TRAINING)
        runs.append(model.get_weights())
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(runs[0][0], net().get_weights()[0])


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return X[index * 16 : index * 16 + 16], Y[index * 16 : index * 16 + 16]


class Again:
    """A plain iterable of batches."""

    def __init__(self, fail_at: int | None = None):
        self.fail_at, self.started = fail_at, 0

    def __iter__(self):
        self.started += 1
        for index in range(6):
            if self.started > 2 and index == self.fail_at:
                raise OSError("disk went away")
            yield X[index * 16 : index * 16 + 16], Y[index * 16 : index * 16 + 16]


@pytest.mark.parametrize("stream", [Batches(), Again()])
def test_streams_are_read_once_per_epoch(stream):
    steps = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps.append(batch)

    fine_tune(net(), Data(train=Split("train", stream=stream)), TRAINING, callbacks=[Count()])
    assert steps == list(range(6)) * 3


def test_a_stream_that_fails_is_named_with_its_step():
    with pytest.raises(PassError, match=r"training stopped in epoch 1, step .*disk went away"):
        fine_tune(net(), Data(train=Split("train", stream=Again(fail_at=3))), TRAINING)


def test_an_endless_stream_is_refused():
    stream = tf.data.Dataset.from_tensors((X, Y)).repeat()
    with pytest.raises(DataError, match="endless"):
        fine_tune(net(), Data(train=Split("train", stream=stream)), TRAINING)


def test_missing_channel_axis_is_added_for_arrays_and_streams():
    images = RANDOM.normal(size=(32, 4, 4)).astype("float32")
    labels = (images.mean((1, 2)) > 0).astype("int32")
    for split in (
        array_split("train", images, labels),
        Split("train", stream=tf.data.Dataset.from_tensor_slices((images, labels)).batch(8)),
    ):
        model = keras.Sequential([L.Input((4, 4, 1)), L.Conv2D(2, 3), L.Flatten(), L.Dense(1, activation="sigmoid")])
        assert len(fine_tune(model, Data(train=split), Training(epochs=1))["loss"]) == 1


def test_a_lost_loss_stops_and_brings_back_the_last_good_weights():
    kept, ended = [], []

    class Poison(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept.append(self.model.get_weights())

        def on_train_batch_begin(self, batch, logs=None):
            if len(kept) == 1 and batch == 4:
                self.model.set_weights([w * np.nan for w in self.model.get_weights()])

        def on_train_end(self, logs=None):
            ended.append(True)

    model = net()
    with pytest.raises(PassError, match=r"loss became NaN in epoch 2, step 5, learning rate 0.0\d+") as caught:
        fine_tune(model, DATA, TRAINING, callbacks=[Poison()])
    assert (caught.value.epoch, caught.value.step, caught.value.exit_code) == (2, 5, 5)
    assert 0 < caught.value.learning_rate < 0.01
    assert ended == [True]
    for good, now in zip(kept[0], model.get_weights(), strict=True):
        np.testing.assert_array_equal(good, now)
    assert np.isfinite(model.predict(X, verbose=0)).all()


def test_an_exploding_learning_rate_leaves_the_model_as_it_was():
    model = keras.Sequential([L.Input((6,)), L.Dense(8), L.Dense(1)])
    before = model.get_weights()
    with pytest.raises(PassError, match=r"became (NaN|infinite) in epoch 1"):
        fine_tune(
            model,
            Data(train=array_split("train", X, X[:, 0])),
            Training(epochs=2, batch_size=16, learning_rate=1e30, optimizer="sgd"),
        )
    for good, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(good, now)


def test_bad_labels_are_refused_before_training_and_no_epochs_change_nothing():
    model = net()
    before = model.get_weights()
    wrong = Y.copy()
    wrong[12] = 7
    with pytest.raises(DataError, match=r"needs a 'train' split"):
        fine_tune(model, Data(), TRAINING)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(DataError, match=r"label 7 of a 3-class head, first at sample 12"):
        fine_tune(model, Data(train=array_split("train", X, wrong)), TRAINING)
    assert fine_tune(model, DATA, Training(epochs=0)) == {}
    for first, second in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_progress_counts_every_step():
    class Sink:
        total = done = 0

        def start(self, description, total):
            self.total = total

        def advance(self, task, amount, note):
            self.done += amount

        def finish(self, task):
            pass

    sink = Sink()
    with show_progress(sink):
        fine_tune(net(), DATA, TRAINING)
    assert (sink.total, sink.done) == (18, 18)


def test_float16_layers_get_a_scaled_loss():
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append(type(self.model.optimizer).__name__)

    model = keras.Sequential(
        [L.Input((6,)), L.Dense(3, dtype="mixed_float16"), L.Activation("softmax", dtype="float32")]
    )
    fine_tune(model, DATA, Training(epochs=1), callbacks=[Look()])
    assert seen == ["LossScaleOptimizer"]


def test_a_short_training_leaves_settled_batch_normalisation():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([L.Input((6,)), L.BatchNormalization(), L.Dense(3)])
    fine_tune(model, Data(train=array_split("train", 5 * X + 3, Y)), TRAINING)
    np.testing.assert_allclose(model.layers[0].moving_mean, (5 * X + 3).mean(0), atol=1e-3)
