"""From a float model to its fake-quantized twin, calibrated and deployed: what users rely on, and bad starts."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import BmcompressError, DataError, ModelError, UsageError
from compress.models.graph import trace_graph
from compress.quantization.calibration import calibrate
from compress.quantization.deployment import compute_of, deploy_model, is_fake_quantized, snap_biases
from compress.quantization.fake_quantization import fake_quantize
from compress.quantization.layers import FakeQuant
from compress.quantization.restoration import end_layers, quantized_layers, restore_layers

X = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("float32")


@pytest.fixture(scope="module")
def net() -> keras.Model:
    """Residual, with batch norm, a depthwise layer, a concatenation and two heads."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="stem_relu")(x)
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Add(name="add")([x, y])
    x = layers.Concatenate(name="join")([x, layers.MaxPooling2D(1, name="pool")(y)])
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    kinds = layers.Dense(3, activation="softmax", name="kind")(x)
    model = keras.Model(inputs, {"kind": kinds, "size": layers.Dense(1, name="size")(x)})
    statistics = [[1.0, 2.0, 0.5, 1.0], [0.3, -0.2, 0.6, 0.1], [0.1, 0.0, -0.1, 0.2], [1.0, 0.8, 1.2, 0.5]]
    model.get_layer("norm").set_weights([np.array(each, "float32") for each in statistics])
    return model


@pytest.fixture(scope="module")
def quantized(net) -> keras.Model:
    return snap_biases(calibrate(fake_quantize(net, "int8"), X))


def places(model: keras.Model) -> dict[str, list[str]]:
    """Return the quantizers by name, with what they stand behind."""
    graph, found = trace_graph(model), {}
    for node in graph.nodes:
        if isinstance(node.operation, FakeQuant):
            before = graph.producer(node.inputs[0])
            found.setdefault(node.operation.name, []).append(before.path if before else "input")
    return found


def test_quantizers_stand_where_integer_kernels_read_and_write(quantized):
    found = places(quantized)
    assert found["image_quantizer"] == ["input"]
    assert "stem_quantizer" not in found  # fused into the ReLU behind it
    # What is joined has one scale: both inputs of the concatenation share a quantizer, which has no place behind it.
    shared = next(behind for behind in found.values() if "add" in behind)
    assert shared == ["depthwise", "add"]
    assert "join_quantizer" not in found
    assert found["kind"] == ["kind-softmax"]


def test_names_of_outputs_and_the_float_model_stay(net, quantized):
    assert sorted(quantized.output_names) == sorted(net.output_names)
    assert not is_fake_quantized(net)
    assert net.get_layer("stem").output is not None  # it still has one output: it was called nowhere else
    wanted = net.predict(X, verbose=0)
    found = quantized.predict(X, verbose=0)
    for name, step in (("kind", 1 / 256), ("size", 0.05)):
        assert np.abs(found[name] - wanted[name]).max() < 4 * step


def test_deployed_model_computes_the_same(quantized):
    deployment = deploy_model(quantized)
    assert deployment.compute == compute_of(quantized) == "integer"
    assert [weight.path for weight in deployment.weights] == [
        "stem/kernel",
        "depthwise/kernel",
        "kind/kernel",
        "size/kernel",
    ]
    wanted, found = quantized.predict(X, verbose=0), deployment.model.predict(X, verbose=0)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)


def test_biases_lie_on_the_grid_of_their_products(quantized):
    image = next(layer for layer in quantized.layers if layer.name == "image_quantizer")
    wrapper = next(layer for layer in quantized.layers if getattr(layer, "path_in_model", "") == "stem")
    (weight,) = wrapper.stored_weights()
    steps = np.asarray(wrapper.layer.bias) / (image.scale_and_zero_point()[0] * weight.scale.reshape(-1))
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-2)
    assert np.abs(steps).max() > 10


@pytest.mark.parametrize(
    ("scheme", "compute", "quantizers"),
    [
        ("int16x8", "integer", True),
        ("int8_dynamic", "dynamic", True),
        ("int4_weights", "weights", False),
        ("float16", "weights", False),
    ],
)
def test_schemes(net, scheme, compute, quantizers):
    model = calibrate(fake_quantize(net, scheme), X)
    assert compute_of(model) == compute
    assert any(isinstance(layer, FakeQuant) for layer in model.layers) == quantizers


def test_dynamic_ranges_are_those_of_litert():
    inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(4, 3, name="wide")(inputs)
    x = layers.Conv2D(4, 1, name="narrow")(x)
    x = layers.Conv2D(4, 1, strides=2, name="strided")(x)
    x = layers.DepthwiseConv2D(1, name="depthwise")(x)
    model = fake_quantize(keras.Model(inputs, layers.Dense(2, name="dense")(x)), "int8_dynamic")
    axes = {each.name: each.shared_axes for each in model.layers if isinstance(each, FakeQuant)}
    sample, row = (1, 2, 3), (3,)
    wanted = {"wide": sample, "narrow": row, "strided": sample, "depthwise": sample, "dense": row}
    assert axes == {f"{name}_input_quantizer": each for name, each in wanted.items()}


def test_excluded_and_restored_layers_are_float(net, quantized):
    excluded = calibrate(fake_quantize(net, "int8", exclude=["stem"]), X)
    assert "stem" not in quantized_layers(excluded)
    assert "image_quantizer" not in places(excluded)  # nobody reads it in integers
    restored = restore_layers(quantized, ["stem"])
    assert quantized_layers(restored) == ["depthwise", "kind", "size"]
    everything = restore_layers(calibrate(fake_quantize(net, "int8"), X), quantized_layers(quantized))
    for name, wanted in net.predict(X, verbose=0).items():
        np.testing.assert_allclose(everything.predict(X, verbose=0)[name], wanted, atol=1e-5)
    assert sorted(end_layers(quantized)) == ["kind", "size", "stem"]


def test_bits_by_pattern(net):
    model = fake_quantize(net, "int8", bits={"*": 8, "depth*": 5})
    bits = {layer.path_in_model: layer.formats for layer in model.layers if hasattr(layer, "formats")}
    assert [bits[path][name].bits for path, name in (("stem", "kernel"), ("depthwise", "kernel"))] == [8, 5]


def test_bad_starts_are_errors(net):
    model = fake_quantize(net, "int8")
    with pytest.raises(ModelError, match="calibrated"):
        deploy_model(model)
    with pytest.raises(DataError, match="data=None"):
        calibrate(model, None)
    with pytest.raises(DataError, match="empty|no samples|at least"):
        calibrate(model, X[:0])
    broken = X.copy()
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="finite activations"):
        calibrate(model, broken)
    with pytest.raises(UsageError, match="already"):
        fake_quantize(model)
    with pytest.raises(UsageError, match="matches no layer"):
        fake_quantize(net, exclude=["stemm"])
    with pytest.raises(UsageError, match=r"int8 can quantize.*stem: left out by include or exclude; .*size: left out"):
        fake_quantize(net, exclude=["*"])
    activations = keras.Sequential([keras.Input((3,)), layers.Activation("exponential", name="power")])
    with pytest.raises(UsageError, match="power: the activation exponential has no integer kernel"):
        fake_quantize(activations)
    with pytest.raises(UsageError, match="int9"):
        fake_quantize(net, "int9")
    with pytest.raises(BmcompressError, match="fake-quantized model"):
        calibrate(net, X)


@pytest.mark.parametrize("x", [np.zeros_like(X), np.full_like(X, 3.5), X[:1]], ids=["zeros", "constant", "one sample"])
def test_poor_calibration_data_give_usable_models(net, x):
    model = calibrate(fake_quantize(net, "int8"), x)
    found, wanted = model.predict(x, verbose=0), net.predict(x, verbose=0)
    assert np.abs(found["kind"] - wanted["kind"]).max() < 4 / 256
    deploy_model(model)


def test_a_dead_channel_stays_finite():
    inputs = keras.Input((4,))
    dense = layers.Dense(3, name="dense")
    model = keras.Model(inputs, dense(inputs))
    kernel = np.ones((4, 3), "float32")
    kernel[:, 1] = 0
    dense.set_weights([kernel, np.array([0.0, 0.7, 0.0], "float32")])
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    found = snap_biases(calibrate(fake_quantize(model), x)).predict(x, verbose=0)
    np.testing.assert_allclose(found[:, 1], 0.7, atol=0.05)
    assert np.abs(found - model.predict(x, verbose=0)).max() < 0.1
