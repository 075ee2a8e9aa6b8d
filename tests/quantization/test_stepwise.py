"""Call by call equals batch by batch, layers may change on the way, and what no later call reads is dropped."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import DataError
from compress.models.graph import trace_graph
from compress.quantization.stepwise import StepwiseRun, batches_for, take_samples


@pytest.fixture
def two_inputs():
    keras.utils.set_random_seed(0)
    inputs = {"left": keras.Input((4,), name="a"), "right": keras.Input((4,), name="b")}
    first, second = layers.Dense(3, name="first"), layers.Dense(3, name="second")
    y = first(inputs["left"]) + second(inputs["right"])
    return keras.Model(inputs, layers.Dense(2, name="head")(y))


def run_all(graph, x, batch_size):
    run = StepwiseRun(graph, batches_for(graph, x, batch_size))
    for node in graph.nodes:
        outputs = run.outputs(node)
        run.keep(node, outputs)
    return np.concatenate([keras.ops.convert_to_numpy(each) for each in outputs]), run


def test_the_last_call_gives_what_the_model_predicts(two_inputs):
    rng = np.random.default_rng(0)
    x = {"left": rng.normal(size=(7, 4)), "right": rng.normal(size=(7, 4))}
    found, run = run_all(trace_graph(two_inputs), x, 3)
    np.testing.assert_allclose(found, two_inputs.predict(x, verbose=0), atol=1e-6)
    assert not run._values  # nothing is left that a later call could read


def test_inputs_are_those_behind_changed_layers():
    x = keras.Input((1,))
    one = layers.Dense(1, use_bias=False, kernel_initializer="ones", name="one")
    model = keras.Model(x, layers.Dense(1, name="two")(one(x)))
    graph = trace_graph(model)
    run = StepwiseRun(graph, batches_for(graph, np.array([[1.0], [2.0], [3.0]]), 2))
    one.kernel.assign([[10.0]])
    run.keep(graph.nodes[0], run.outputs(graph.nodes[0]))
    assert [keras.ops.convert_to_numpy(each).ravel().tolist() for each in run.inputs(graph.nodes[1])] == [
        [10, 20],
        [30],
    ]


def test_samples_that_do_not_fit(two_inputs):
    graph = trace_graph(two_inputs)
    with pytest.raises(DataError, match=r"inputs \['right'\]. Received: \['left'\]"):
        batches_for(graph, {"left": np.ones((2, 4))}, 2)
    with pytest.raises(DataError, match="2 inputs, as many for each"):
        batches_for(graph, [np.ones((2, 4)), np.ones((3, 4))], 2)
    with pytest.raises(DataError, match="data=None"):
        take_samples(None, 5)


def test_taken_samples_are_random_ones_of_arrays_and_the_first_of_streams():
    x = np.arange(100.0)[:, None]
    taken = take_samples(x, 10, seed=1)
    assert len(taken) == 10
    assert taken.max() > 50
    np.testing.assert_array_equal(taken, take_samples((x, x), 10, seed=1))
    np.testing.assert_array_equal(take_samples([x], 200)[0], x)
