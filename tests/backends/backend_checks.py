"""What must hold on every backend of Keras; test_backends.py runs this file in a child process for each.

A backend is chosen before Keras is imported. What pruning promises is in pruning_checks.py. The quantized model, its
files and its answers are left in the folder `BMCOMPRESS_SHARED` for the parent, which is on TensorFlow.
"""

from __future__ import annotations

import os
from pathlib import Path

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

import compress
from compress.cli import app
from compress.errors import PassError
from compress.quantization.layers import FakeQuant
from compress.training.options import Training

SHARED = Path(os.environ["BMCOMPRESS_SHARED"])
LAYERS = keras.layers


@pytest.fixture(scope="module")
def data(blobs):
    return compress.as_data(blobs[0])


@pytest.fixture(scope="module")
def trained(cnn_factory, data):
    """A net after some training, which no test changes."""
    model = cnn_factory()
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(data.train.x, data.train.y, batch_size=32, epochs=6, shuffle=False, verbose=0)
    return model


def quantize_and_train(model, data, ranges):
    keras.utils.set_random_seed(0)
    quantized = compress.fake_quantize(model, "int8", bits={"conv": 4}, ranges=ranges)
    compress.calibrate(quantized, data.train.x, samples=128)
    before = known_ranges(quantized)
    quantized.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy")
    history = quantized.fit(data.train.x, data.train.y, batch_size=32, epochs=2, verbose=0)
    return quantized, before, history.history["loss"]


def known_ranges(model):
    quantizers = [layer for layer in model.layers if isinstance(layer, FakeQuant) and layer.fixed_range is None]
    return np.array([layer.current_range() for layer in quantizers])


def have_equal_weights(a, b):
    return all(np.array_equal(one, other) for one, other in zip(a.get_weights(), b.get_weights(), strict=True))


def test_the_backend_is_the_one_that_was_asked_for():
    assert keras.backend.backend() == os.environ["KERAS_BACKEND"]


@pytest.mark.parametrize("ranges", ["frozen", "learned"])
def test_quantization_aware_training(trained, data, ranges):
    quantized, before, losses = quantize_and_train(trained, data, ranges)
    assert losses[-1] < losses[0]
    assert (known_ranges(quantized) != before).any() == (ranges == "learned")


def test_training_with_a_seed_gives_one_model_with_one_set_of_files(trained, data):
    quantized, before, losses = quantize_and_train(trained, data, "moving")
    assert losses[-1] < losses[0]
    assert (known_ranges(quantized) != before).all(axis=1).any()
    assert have_equal_weights(quantized, quantize_and_train(trained, data, "moving")[0])
    compress.snap_biases(quantized)
    path = SHARED / "net.keras"
    quantized.save(path)
    np.savez(SHARED / "answers.npz", x=data.train.x, answers=quantized.predict(data.train.x, verbose=0))
    assert have_equal_weights(quantized, compress.load_model(path))
    result = CliRunner().invoke(app, ["export", str(path), "--to", "tflite,onnx", "-o", str(SHARED)])
    assert result.exit_code == 0, result.output


def test_layers_of_nested_models_can_be_quantized():
    """Two layers of one name become `"left-dense"` and the like: PyTorch takes no dots in names."""
    halves = []
    for name in ("left", "right"):
        inner = keras.Sequential([keras.Input((4,)), LAYERS.Dense(3, name="dense")], name=name)
        halves.append(inner)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, LAYERS.Add()([half(inputs) for half in halves]))
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    quantized = compress.calibrate(compress.fake_quantize(model, "int8"), x)
    assert "right-dense" in {layer.name for layer in quantized.layers}
    expected = model.predict(x, verbose=0)
    assert np.abs(quantized.predict(x, verbose=0) - expected).max() < 0.05 * np.abs(expected).max()


def test_recurrent_layers_attention_and_dropout():
    ids = keras.Input((3,), dtype="int32")
    values = LAYERS.Embedding(10, 4)(ids)
    values = LAYERS.MultiHeadAttention(2, 2, dropout=0.1)(values, values)
    model = keras.Model(ids, LAYERS.Dense(2)(LAYERS.GRU(3)(values)))
    x = np.random.default_rng(0).integers(0, 10, (32, 3)).astype("int32")
    quantized = compress.calibrate(compress.fake_quantize(model, "int8"), x)
    quantized.compile(keras.optimizers.Adam(2e-2), "mse")
    losses = quantized.fit(x, np.ones((32, 2)), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_a_copy_shares_nothing_with_its_original(trained, data):
    """Training on JAX gives the buffers of variables away: an original that shares them is lost."""
    before = trained.get_weights()
    copy = compress.copy_model(trained)
    compress.fine_tune(copy, data, Training(epochs=1, batch_size=32))
    assert not have_equal_weights(copy, trained)
    assert all(np.array_equal(old, new) for old, new in zip(before, trained.get_weights(), strict=True))


def test_a_lost_loss_leaves_the_last_good_weights(trained, data):
    copy = compress.copy_model(trained)
    with pytest.raises(PassError, match="loss became"):
        compress.fine_tune(copy, data, Training(epochs=2, batch_size=32, learning_rate=1e30, optimizer="sgd"))
    assert all(np.isfinite(weights).all() for weights in copy.get_weights())


def test_distillation_from_arrays_and_streams(cnn_factory, trained, data):
    teacher, before = trained, trained.get_weights()

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return data.train.x[32 * index :][:32], data.train.y[32 * index :][:32]

    students = []
    for source in (data, data, compress.as_data(Batches())):
        student = cnn_factory(seed=1, name="student")
        keras.utils.set_random_seed(2)
        compress.distill(student, teacher, source, training=Training(epochs=2, batch_size=32, learning_rate=1e-2))
        students.append(student)
    assert have_equal_weights(*students[:2])
    plain = cnn_factory(seed=1, name="student").evaluate(data.train.x, data.train.y, verbose=0)[0]
    assert all(student.evaluate(data.train.x, data.train.y, verbose=0)[0] < plain for student in students)
    assert all(np.array_equal(old, new) for old, new in zip(before, teacher.get_weights(), strict=True))
