"""AdaRound: better than nearest on any kind of layer, on the grid, and never worse."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from compress.errors import DataError, UsageError
from compress.progress import show_progress
from compress.quantization.arithmetic import weight_scale
from compress.quantization.rounding import learn_rounding


def swapping(layer, kernel_variable):
    """Return a layer as a function of its kernel, as it is meant to be used."""

    def forward(kernel, inputs):
        mapping = [(v, kernel if v is kernel_variable else v.value) for v in layer.variables]
        with keras.StatelessScope(state_mapping=mapping):
            return layer(inputs)

    return forward


def matmul(kernel, inputs):
    return ops.matmul(inputs, kernel)


@pytest.fixture(scope="module")
def dense():
    """Correlated inputs, other inputs from the same source, a kernel and its 3-bit scale."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 24))
    x, held_out = (
        (rng.normal(size=(256, 4)) @ mixing + 0.2 * rng.normal(size=(256, 24))).astype("float32") for _ in range(2)
    )
    kernel = rng.normal(size=(24, 8)).astype("float32")
    return x, held_out, kernel, weight_scale(kernel, (1,), 3)


def on_grid(kernel, scale, bits):
    steps = kernel / scale
    return np.array_equal(steps, np.rint(steps)) and np.abs(steps).max() <= 2 ** (bits - 1) - 1


def test_dense_on_correlated_inputs(dense):
    x, held_out, kernel, scale = dense
    found = learn_rounding(matmul, kernel, scale, x, x @ kernel, bits=3, steps=200)
    nearest = np.clip(np.rint(kernel / scale), -3, 3) * scale
    assert on_grid(found.kernel, scale, 3)
    assert np.abs(found.kernel - kernel).max() < scale.max()  # up or down, never further
    assert found.nearest_error == pytest.approx(np.square(x @ (kernel - nearest)).mean(), rel=1e-4)
    assert found.error == pytest.approx(np.square(x @ (kernel - found.kernel)).mean(), rel=1e-4)
    assert found.error < 0.6 * found.nearest_error
    errors = [np.square(held_out @ (kernel - q)).mean() for q in (found.kernel, nearest)]
    assert errors[0] < 0.6 * errors[1]  # learned, not memorised


def test_two_equal_inputs_make_up_for_each_other():
    """Only the sum of the rows matters: 0.45 + 0.35 + 1 is nearer to 2, with the first of them up, than to 1."""
    x = np.repeat(np.linspace(-1, 1, 32), 3).reshape(32, 3).astype("float32")
    kernel = np.array([[0.45], [0.35], [1.0]], "float32")
    found = learn_rounding(matmul, kernel, np.ones((1, 1), "float32"), x, x @ kernel, bits=2, steps=200)
    assert found.kernel.ravel().tolist() == [1.0, 0.0, 1.0]
    assert found.error == pytest.approx(0.04 * np.square(x[:, 0]).mean(), rel=1e-3)
    assert found.nearest_error == pytest.approx(0.64 * np.square(x[:, 0]).mean(), rel=1e-3)


def test_layer_with_fused_activation_stays_unchanged():
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    layer = keras.layers.Conv2D(6, 3, activation="relu")
    layer.build((None, 8, 8, 3))
    x = np.maximum(rng.normal(size=(64, 8, 8, 2)) @ rng.normal(size=(2, 3)), 0).astype("float32")
    kernel = ops.convert_to_numpy(layer.kernel)
    scale = weight_scale(kernel, (3,), 3)
    before = [w.copy() for w in layer.get_weights()]
    found = learn_rounding(
        swapping(layer, layer.kernel), kernel, scale, x, ops.convert_to_numpy(layer(x)), bits=3, steps=150
    )
    assert on_grid(found.kernel, scale, 3)
    assert found.error < 0.8 * found.nearest_error
    for was, now in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


def test_several_inputs_and_outputs(dense):
    x, _, kernel, scale = dense

    def forward(kernel, inputs):
        return {"sum": ops.matmul(inputs["a"], kernel) + inputs["b"], "product": ops.matmul(inputs["a"], kernel)}

    inputs = {"a": x, "b": np.ones((len(x), 8), "float32")}
    targets = {"sum": x @ kernel + 1, "product": x @ kernel}
    found = learn_rounding(forward, kernel, scale, inputs, targets, bits=3, steps=100)
    assert found.error < found.nearest_error


def test_same_seed_same_result(dense):
    x, _, kernel, scale = dense
    first, second = (learn_rounding(matmul, kernel, scale, x, x @ kernel, bits=3, steps=40, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.kernel, second.kernel)


def test_zeros_stay_zero(dense):
    x, _, kernel, _ = dense
    kernel = np.where(np.random.default_rng(2).random(kernel.shape) < 0.5, 0, kernel).astype("float32")
    scale = weight_scale(kernel, (1,), 3)
    found = learn_rounding(matmul, kernel, scale, x, x @ kernel, bits=3, steps=150)
    assert not found.kernel[kernel == 0].any()
    assert found.error < 0.9 * found.nearest_error


def test_never_worse_than_nearest(dense):
    """One wild step of training must not survive; neither must no step at all."""
    x, _, kernel, scale = dense
    nearest = np.clip(np.rint(kernel / scale), -3, 3) * scale
    for options in ({"steps": 3, "learning_rate": 100.0}, {"steps": 0}):
        found = learn_rounding(matmul, kernel, scale, x, x @ kernel, bits=3, **options)
        assert found.error <= found.nearest_error
        assert found.error < found.nearest_error or np.array_equal(found.kernel, nearest)


def test_kernel_on_its_grid_stays():
    kernel = np.array([[1.0, -0.5], [0.5, 1.0]], "float32")
    found = learn_rounding(matmul, kernel, np.full((1, 2), 0.5, "float32"), np.eye(2), kernel, bits=3, steps=50)
    np.testing.assert_array_equal(found.kernel, kernel)
    assert found.error == found.nearest_error == 0


def test_one_sample_and_dead_channel():
    kernel = np.array([[0.3, 0.0], [0.9, 0.0]], "float32")
    scale = weight_scale(kernel, (1,), 4)
    found = learn_rounding(matmul, kernel, scale, np.ones((1, 2)), np.ones((1, 2)) @ kernel, bits=4, steps=20)
    assert np.isfinite(found.kernel).all()
    assert on_grid(found.kernel, scale, 4)


def test_progress_is_reported(dense):
    x, _, kernel, scale = dense
    seen = []

    class Sink:
        def start(self, description, total):
            seen.append((description, total))

        def advance(self, task, amount, note):
            seen.append(amount)

        def finish(self, task):
            seen.append("end")

    with show_progress(Sink()):
        learn_rounding(matmul, kernel, scale, x, x @ kernel, bits=3, steps=3, name="head")
    assert seen == [("learn rounding of head", 3), 1, 1, 1, "end"]


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "error", "message"),
    [
        (np.ones((4, 2)), np.ones((3, 1)), {}, DataError, r"'head' .*\[3, 4\] samples"),
        (np.ones((0, 2)), np.ones((0, 1)), {}, DataError, r"\[0\] samples"),
        (np.full((4, 2), np.nan), np.ones((4, 1)), {}, DataError, "finite"),
        (np.ones((4, 2)), np.full((4, 1), np.inf), {}, DataError, "finite"),
        (np.ones((4, 2)), np.ones((4, 1)), {"bits": 1}, UsageError, "bits"),
        (np.ones((4, 2)), np.ones((4, 1)), {"steps": -1}, UsageError, "steps"),
        (np.ones((4, 2)), np.ones((4, 1)), {"batch_size": 0}, UsageError, "batch_size"),
    ],
)
def test_errors(inputs, targets, options, error, message):
    with pytest.raises(error, match=message):
        learn_rounding(matmul, np.ones((2, 1)), np.ones((1, 1)), inputs, targets, **options, name="head")
