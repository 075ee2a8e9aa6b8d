"""Searched scales: clipping by hand, groups, and what a model's layers compute and keep afterwards."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import UsageError
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.layers import QuantizedLayer
from compress.quantization.restoration import restore_layers
from compress.quantization.scale_search import round_weight, search_scale, search_scales
from compress.quantization.weight_format import WeightFormat


def dense_model(kernel: np.ndarray) -> keras.Model:
    x = keras.Input((kernel.shape[0],))
    model = keras.Model(x, layers.Dense(kernel.shape[1], name="dense")(x))
    model.set_weights([kernel, np.zeros(kernel.shape[1])])
    return model


def test_an_outlier_is_clipped_by_hand():
    """Ternary grid: 1.2 alone would set every 0.5 to 0; the step 0.6 costs 0.36 and 20 times 0.01 instead."""
    kernel = np.array([[1.2], *[[0.5]] * 20], "float32")
    found = search_scale(kernel, WeightFormat(2, (1,)))
    assert found.shape == (1, 1)
    assert 0.5 < found[0, 0] < 0.6  # between the 20 and the mean, in steps of 0.024


def test_weights_on_a_grid_keep_it():
    kernel = np.array([[-7.0, 14.0], [3.0, 2.0], [0.0, -6.0]], "float32")
    np.testing.assert_array_equal(search_scale(kernel, WeightFormat(4, (1,))), [[1.0, 2.0]])


@pytest.mark.parametrize("form", [WeightFormat(3, (1,)), WeightFormat(3, (1,), 8, 0), WeightFormat(4)])
def test_error_is_never_larger_than_with_the_largest_weight(form):
    kernel = np.random.default_rng(0).standard_t(3, (20, 6)).astype("float32")
    largest = search_scale(kernel, WeightFormat(8, form.channel_axes, form.group_size, form.axis)) * 127
    largest = (largest / (2 ** (form.bits - 1) - 1)).astype("float32")
    found = search_scale(kernel, form)
    assert found.shape == largest.shape
    errors = [np.square(round_weight(kernel, form, scale) - kernel).sum() for scale in (found, largest)]
    assert errors[0] < 0.9 * errors[1]


def test_eight_bits_are_left_alone():
    kernel = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    q = fake_quantize(dense_model(kernel), "int8_weights")
    search_scales(q)
    assert q.get_layer("dense").formats["kernel"].scale == "absmax"
    np.testing.assert_array_equal(q.get_weights()[0], kernel)


def test_a_model_computes_with_the_searched_grid_and_goes_back_to_float(tmp_path):
    rng = np.random.default_rng(0)
    kernel = rng.standard_t(3, (24, 6)).astype("float32")
    kernel[::3] = 0
    x = rng.normal(size=(40, 24)).astype("float32")
    model = dense_model(kernel)
    q = fake_quantize(model, "int8_weights", bits=3)
    before = q.predict(x, verbose=0)  # traces the model before its layers change
    search_scales(q)
    form = WeightFormat(3, (1,))
    expected = x @ round_weight(kernel, form, search_scale(kernel, form))
    np.testing.assert_allclose(q.predict(x, verbose=0), expected, atol=1e-5)
    assert np.square(expected - x @ kernel).mean() < np.square(before - x @ kernel).mean()
    (stored,) = q.get_layer("dense").stored_weights()
    assert not stored.values[::3].any()

    q.save(tmp_path / "q.keras")
    loaded = keras.saving.load_model(tmp_path / "q.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), q.predict(x, verbose=0))
    again = search_scales(loaded)  # its scales are its own now
    np.testing.assert_array_equal(again.predict(x, verbose=0), q.predict(x, verbose=0))
    np.testing.assert_allclose(restore_layers(q, ["dense"]).predict(x, verbose=0), x @ kernel, atol=1e-5)


def test_layers_can_be_left_out():
    kernel = np.random.default_rng(0).standard_t(3, (24, 6)).astype("float32")
    q = fake_quantize(dense_model(kernel), "int8_weights", bits=3)
    search_scales(q, exclude=["dense"])
    assert q.get_layer("dense").formats["kernel"].scale == "absmax"


def test_nan_is_an_error_that_names_the_layer():
    q = fake_quantize(dense_model(np.full((2, 2), np.nan)), "int8_weights", bits=3)
    with pytest.raises(UsageError, match=r"finite weights.*'kernel' of 'dense'"):
        search_scales(q)


def test_a_layer_with_several_weights_keeps_them_apart(tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 3))
    q = fake_quantize(keras.Model(x, layers.LSTM(5, name="lstm")(x)), "int8_weights", bits=3)
    search_scales(q)
    samples = np.random.default_rng(0).normal(size=(6, 4, 3)).astype("float32")
    q.save(tmp_path / "q.keras")
    loaded = keras.saving.load_model(tmp_path / "q.keras")
    np.testing.assert_array_equal(loaded.predict(samples, verbose=0), q.predict(samples, verbose=0))


def test_a_rounding_is_kept_exactly_whatever_the_float_weights_were():
    """Set to points far away and near: the layer holds them, and its float weights have moved to their cells only."""
    kernel = np.array([[0.4], [-2.0], [9.0], [1.1]], "float32")
    q = fake_quantize(dense_model(kernel), "int8_weights", bits=3)
    layer = q.get_layer("dense")
    assert isinstance(layer, QuantizedLayer)
    assert layer.set_rounding("kernel", np.array([[1.0], [-1.0], [3.0], [1.0]], "float32"), np.ones((1, 1), "float32"))
    assert layer.stored_weights()[0].values.ravel().tolist() == [1, -1, 3, 1]
    moved = keras.ops.convert_to_numpy(layer.weight_variable("kernel")).ravel()
    np.testing.assert_allclose(moved, [0.51, -1.49, 9.0, 1.1], rtol=1e-6)
