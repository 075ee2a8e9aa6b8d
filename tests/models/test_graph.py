from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from compress.errors import ModelError
from compress.models.graph import (
    copy_graph,
    copy_operation,
    is_functional,
    rename_operation,
    repeat,
    replay,
    rewrite_graph,
    trace_graph,
    unique_name,
)


def _tower() -> keras.Model:
    start = keras.Input((4,), name="start")
    x = layers.Dense(3, activation="relu", name="dense")(start)
    return keras.Model(start, layers.BatchNormalization(name="norm")(x + 1.0), name="tower")


def _shared() -> keras.Model:
    """A nested model that is called twice, beside a layer with the name of one inside it."""
    tower = _tower()
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    joined = layers.Concatenate(name="joined")([tower(a), tower(b)])
    return keras.Model({"a": a, "b": b}, {"out": layers.Dense(2, name="dense")(joined), "raw": joined}, name="pair")


def _values(model: keras.Model, seed: int = 0) -> object:
    generator = np.random.default_rng(seed)
    return keras.tree.map_structure(
        lambda tensor: generator.normal(size=(2, *tensor.shape[1:])).astype("float32"), model.input
    )


def _randomize(model: keras.Model) -> keras.Model:
    generator = np.random.default_rng(1)
    for variable in model.weights:
        variable.assign(generator.uniform(0.1, 0.9, variable.shape))
    return model


def _assert_same(expected: object, received: object, tolerance: float = 0.0) -> None:
    pairs = zip(keras.tree.flatten(expected), keras.tree.flatten(received), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def test_nested_and_shared_models_are_opened_under_their_paths() -> None:
    model = _randomize(_shared())
    graph = copy_graph(model)
    assert [node.path for node in graph.nodes].count("tower/norm") == 2
    assert {node.path for node in graph.nodes if isinstance(node.operation, keras.Layer)} == {
        "tower/dense",
        "tower/norm",
        "joined",
        "dense",
    }
    names = {node.operation.name for node in graph.nodes}
    assert {"dense", "dense_1", "norm", "joined"} <= names
    assert len(graph.calls(next(node.operation for node in graph.nodes if node.path == "tower/dense"))) == 2

    rebuilt = rewrite_graph(graph, repeat)
    values = _values(model)
    assert sorted(rebuilt(values)) == ["out", "raw"]
    _assert_same(model(values), rebuilt(values))
    assert len(rebuilt.weights) == len(model.weights)


def test_the_users_model_is_left_alone() -> None:
    model = _shared()
    tower = model.get_layer("tower")
    before = [(layer.name, layer.output.name) for layer in (*tower.layers, model.get_layer("dense"))]
    rewrite_graph(copy_graph(model), repeat)
    after = [(layer.name, layer.output.name) for layer in (*tower.layers, model.get_layer("dense"))]
    assert before == after
    keras.Model(model.inputs, model.get_layer("dense").output)  # still one call of it


def test_a_rewritten_model_is_saved_and_loaded(tmp_path) -> None:
    model = _randomize(_shared())
    rebuilt = rewrite_graph(copy_graph(model), repeat)
    rebuilt.save(tmp_path / "model.keras")
    values = _values(model)
    _assert_same(model(values), keras.saving.load_model(tmp_path / "model.keras")(values))


def test_paths_survive_a_second_trace() -> None:
    graph = copy_graph(_shared())
    again = trace_graph(rewrite_graph(graph, repeat), graph.paths)
    assert sorted(node.path for node in again.nodes) == sorted(node.path for node in graph.nodes)


def test_consumers_producers_and_outputs() -> None:
    graph = copy_graph(_shared())
    nodes = {node.path: node for node in graph.nodes}
    joined = nodes["joined"]
    assert [node.path for node in graph.consumers(joined.output)] == ["dense"]
    assert graph.only_consumer(joined.output) is None  # the model returns it, too
    assert graph.is_output(joined.output)
    assert graph.producer(joined.inputs[0]).path == "tower/norm"
    assert graph.producer(graph.inputs["a"]) is None
    assert graph.only_consumer(nodes["tower/dense"].output).kind == "Add"


def test_calls_can_be_replaced() -> None:
    start = keras.Input((2,))
    model = keras.Model(start, layers.ReLU(name="relu")(start * 2.0))

    def call(node, *args, **kwargs):
        return args[0] if node.path == "relu" else repeat(node, *args, **kwargs)

    np.testing.assert_array_equal(rewrite_graph(copy_graph(model), call)(np.array([[-1.0, 1.0]])), [[-2.0, 2.0]])


def test_operations_with_constants_and_several_outputs(tmp_path) -> None:
    start = keras.Input((6,))
    left, right = ops.split(start * np.arange(6, dtype="float32"), 2, axis=-1)
    model = keras.Model(start, [ops.einsum("ab,ac->abc", left, right), left[:, ::2], ops.mean(right, axis=-1)])
    rebuilt = rewrite_graph(copy_graph(model), repeat)
    rebuilt.save(tmp_path / "model.keras")
    values = _values(model)
    _assert_same(model(values), rebuilt(values))
    _assert_same(model(values), keras.saving.load_model(tmp_path / "model.keras")(values))


def test_masks_reach_the_layers_behind() -> None:
    words = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True, name="embedding")(words)
    inner_start = keras.Input((5, 4))
    inner = keras.Model(inner_start, layers.LSTM(3, name="lstm")(layers.Dropout(0.5)(inner_start)), name="inner")
    model = keras.Model(words, [inner(x), layers.GlobalAveragePooling1D()(x)])
    rebuilt = rewrite_graph(copy_graph(model), repeat)
    values = np.array([[1, 2, 0, 0, 0], [3, 1, 4, 2, 6]])
    _assert_same(model(values), rebuilt(values), 1e-6)
    assert not np.allclose(rebuilt(values)[1][0], np.asarray(model.layers[1](values))[0].mean(axis=0))


def test_a_frozen_base_model_keeps_its_flags_and_its_mode() -> None:
    base = _tower()
    base.trainable = False
    start = keras.Input((4,))
    model = keras.Model(start, layers.Dense(2, name="head")(base(start, training=False)))
    graph = copy_graph(model)
    norm = next(node for node in graph.nodes if node.path == "tower/norm")
    assert norm.kwargs["training"] is False
    rebuilt = rewrite_graph(graph, repeat)
    assert [variable.path.split("/")[-1] for variable in rebuilt.trainable_variables] == ["kernel", "bias"]
    values = _values(model)
    _assert_same(model(values, training=True), rebuilt(values, training=True))


def test_dropout_still_switches_with_training() -> None:
    start = keras.Input((50,))
    inner_start = keras.Input((50,))
    inner = keras.Model(inner_start, layers.Dropout(0.5)(inner_start), name="inner")
    rebuilt = rewrite_graph(copy_graph(keras.Model(start, inner(start))), repeat)
    ones = np.ones((2, 50), "float32")
    np.testing.assert_array_equal(rebuilt(ones), ones)
    assert (np.asarray(rebuilt(ones, training=True)) == 0).any()


def test_losses_are_kept() -> None:
    start = keras.Input((3,))
    dense = layers.Dense(2, kernel_regularizer="l2", activity_regularizer="l1", name="dense")
    model = keras.Model(start, dense(start))
    rebuilt = rewrite_graph(copy_graph(model), repeat)
    values = _values(model)
    model(values), rebuilt(values)
    assert len(rebuilt.losses) == 2
    _assert_same(sum(model.losses), sum(rebuilt.losses))


def test_bytes_become_what_a_nested_model_takes() -> None:
    inner_start = keras.Input((3,), dtype="float32")
    inner = keras.Model(inner_start, inner_start / 2.0, name="inner")
    start = keras.Input((3,), dtype="uint8")
    model = keras.Model(start, inner(start))
    values = np.array([[1, 2, 255]], "uint8")
    rebuilt = rewrite_graph(copy_graph(model), repeat)
    np.testing.assert_array_equal(rebuilt(values), [[0.5, 1.0, 127.5]])
    np.testing.assert_array_equal(model(values), rebuilt(values))


def test_sequential_models_and_models_of_a_class_of_their_own() -> None:
    class Trainer(keras.Model):
        """Functional, with a way of training of its own."""

    class Doubling(keras.Model):
        """Functional by its inputs, but not by what it does."""

        def call(self, inputs, training=None):
            return 2 * super().call(inputs, training=training)

    start = keras.Input((3,))
    sequential = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="dense")])
    assert [node.path for node in trace_graph(sequential).nodes] == ["dense"]
    assert is_functional(Trainer(start, layers.Dense(2)(start)))
    assert not is_functional(Doubling(start, layers.Dense(2)(start)))


def test_models_without_a_graph_are_refused() -> None:
    class Plain(keras.Model):
        def call(self, inputs):
            return inputs

    for model in (Plain(), keras.Sequential([layers.Dense(2)])):
        assert not is_functional(model)
        with pytest.raises(ModelError, match="expected a functional or sequential model that is built"):
            trace_graph(model)


def test_copies_of_operations_keep_weights_and_flags() -> None:
    norm = layers.BatchNormalization(name="norm")
    norm.build((None, 3))
    _randomize(norm)
    norm.gamma.trainable = False
    copy = rename_operation(norm, "other")
    assert copy.name == "other"
    assert [variable.trainable for variable in copy.variables] == [False, True, False, False]
    _assert_same(norm.get_weights(), copy.get_weights())
    assert copy.gamma is not norm.gamma
    dense = layers.Dense(2, activation="softmax", name="dense")
    dense.build((None, 3))
    plain = copy_operation(dense, activation="linear")
    assert plain.activation is keras.activations.linear
    assert plain.name == "dense"


def test_unique_names_are_counted() -> None:
    taken = {"dense"}
    assert [unique_name("dense", taken) for _ in range(2)] == ["dense_1", "dense_2"]
    assert taken == {"dense", "dense_1", "dense_2"}


def test_replay_on_other_tensors() -> None:
    graph = copy_graph(_tower())
    other = keras.Input((4,))
    assert keras.Model(other, replay(graph, other, repeat)).output_shape == (None, 3)


def test_keras_still_hands_each_call_to_call_function() -> None:
    """The graph is read with `clone_model(call_function=...)`; this fails if a new Keras changes how that works."""
    start = keras.Input((4,), name="start")
    x = layers.Dense(3, name="dense")(start)
    model = keras.Model(start, ops.add(layers.Dropout(0.5, name="dropout")(x, training=False), x))
    seen = []

    def call(operation, *args, **kwargs):
        seen.append((operation.name, len(keras.tree.flatten(args)), sorted(kwargs)))
        return operation(*args, **kwargs)

    clone = keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)
    assert [entry[0] for entry in seen][:2] == ["dense", "dropout"]
    assert seen[1][2] == ["training"]
    assert len(seen) == 3
    assert seen[2][1] == 2
    assert clone.get_layer("dense") is model.get_layer("dense")
