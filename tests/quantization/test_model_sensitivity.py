"""Sensitivity of the layers of Keras models: the fragile one is named, and the model stays as it was."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from compress.errors import DataError, ModelError
from compress.models.output_loss import OutputLoss
from compress.quantization.calibration import calibrate
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.layers import FakeQuant
from compress.quantization.model_sensitivity import measure_sensitivity, order_by_sensitivity
from compress.quantization.restoration import quantized_layers, restore_layers
from compress.quantization.scale_search import search_scales


@pytest.fixture(scope="module")
def x():
    values = np.random.default_rng(0).normal(size=(96, 6)).astype("float32")
    values[:, 0] = 0  # what the outliers of a fragile kernel are multiplied with
    return values


@pytest.fixture
def nested():
    """A nested classifier in which the first layer loses all its weights but those of a dead input when quantized."""
    keras.utils.set_random_seed(1)
    block = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="fragile"),
            keras.layers.ReLU(),
            keras.layers.Dense(8, name="last"),
        ],
        name="block",
    )
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="head")(block(inputs)))
    kernel = block.layers[0].kernel
    values = np.asarray(keras.ops.convert_to_numpy(kernel)).copy()
    values[0] = 100.0
    kernel.assign(values)
    return model


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "int8_weights"])
def test_the_fragile_layer_comes_first_under_its_path(nested, x, scheme):
    before = nested.get_weights()
    found = measure_sensitivity(nested, x, scheme=scheme, samples=64)
    assert found[0].layer == "block/fragile"
    assert {each.layer for each in found} == {"block/fragile", "block/last", "head"}
    assert found[0].loss > 20 * found[1].loss > 0
    assert all(np.array_equal(a, b) for a, b in zip(before, nested.get_weights(), strict=True))


def test_a_fake_quantized_model_keeps_its_own_ranges_and_its_order_fits_restoration(nested, x):
    quantized = calibrate(fake_quantize(nested, "int8"), x)
    before = quantized.predict(x, verbose=0)
    order = order_by_sensitivity(quantized, x)
    assert order[0] == "block/fragile"
    np.testing.assert_array_equal(before, quantized.predict(x, verbose=0))
    wanted = nested.predict(x, verbose=0)
    restored = restore_layers(quantized, order[:1]).predict(x, verbose=0)
    assert np.abs(restored - wanted).mean() < 0.1 * np.abs(before - wanted).mean()


def test_searched_scales_leave_float_weights_to_compare_with_and_to_go_back_to(nested, x):
    rounded = search_scales(calibrate(fake_quantize(nested, "int8", bits=3), x))
    losses = {each.layer: each.loss for each in measure_sensitivity(rounded, x)}
    assert min(losses.values()) > 0.01
    restored = restore_layers(rounded, quantized_layers(rounded)).predict(x, verbose=0)
    wanted = nested.predict(x, verbose=0)
    assert np.abs(restored - wanted).max() < 1e-3
    assert np.abs(rounded.predict(x, verbose=0) - wanted).max() > 0.05


def test_a_layer_in_float_reads_float_inputs_with_dynamic_schemes_too(nested, x):
    quantized = fake_quantize(nested, "int8_dynamic")
    restored = restore_layers(quantized, ["block/fragile", "block/last"])
    assert [layer.name for layer in restored.layers if isinstance(layer, FakeQuant)] == ["head_input_quantizer"]


def test_activations_count_too(x):
    """Every weight is on its grid exactly; only the output of the layer that mixes 1 and 10000 suffers."""
    inputs = keras.Input((6,))
    wide = keras.layers.Dense(2, name="wide", use_bias=False)
    picked = keras.layers.Dense(2, name="picked", use_bias=False)
    model = keras.Model(inputs, picked(keras.layers.ReLU()(wide(inputs))))
    wide.kernel.assign([[0, 0], [1, 0], [0, 10000], [0, 0], [0, 0], [0, 0]])
    picked.kernel.assign([[1, 0], [0, 0]])
    weights = {each.layer: each.loss for each in measure_sensitivity(model, x, scheme="int8_weights")}
    both = {each.layer: each.loss for each in measure_sensitivity(model, x, scheme="int8")}
    assert weights["wide"] == pytest.approx(0, abs=1e-6)
    assert weights["picked"] == pytest.approx(0, abs=1e-6)
    assert min(both.values()) > 0.05


def test_shared_layers_are_measured_once(x):
    inputs = keras.Input((6,))
    shared = keras.layers.Dense(6, name="shared")
    model = keras.Model(inputs, keras.layers.Dense(2, name="end")(shared(shared(inputs))))
    assert sorted(each.layer for each in measure_sensitivity(model, x)) == ["end", "shared"]


def test_losses_by_hand():
    inputs = keras.Input((1,))
    layer = keras.layers.Dense(1, use_bias=False)
    model = keras.Model(inputs, layer(inputs))
    layer.kernel.assign([[1.0]])
    from compress.data.split import array_split

    split = array_split("x", np.array([[-1.0], [1.0], [-1.0], [1.0]], "float32"))
    loss = OutputLoss(model, split, 4)
    assert loss.measure() == 0
    layer.kernel.assign([[1.5]])
    assert loss.measure() == 0.25  # squared error 0.25 over variance 1

    classes = keras.layers.Dense(2, activation="softmax", use_bias=False)
    model = keras.Model(inputs, classes(inputs))
    classes.kernel.assign([[0.0, 0.0]])
    loss = OutputLoss(model, split, 4)
    classes.kernel.assign([[0.0, np.log(3.0)]])
    # Both signs of x: half against 1/4 and 3/4.
    assert loss.measure() == pytest.approx(0.5 * np.log(4 / 3), rel=1e-5)


def test_mistakes(nested, x):
    with pytest.raises(DataError, match="data=None"):
        measure_sensitivity(nested, None)
    with pytest.raises(ModelError, match="has seen no data"):
        measure_sensitivity(fake_quantize(nested, "int8"), x)
    inputs = keras.Input((6,))
    linear = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    with pytest.raises(DataError, match="finite"):
        measure_sensitivity(linear, np.full((8, 6), np.nan, "float32"), scheme="int8_weights")
