from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from compress.errors import ModelError
from compress.models.expansion import expand
from compress.models.graph import copy_graph, repeat, rewrite_graph
from compress.models.subclassed import make_functional


@keras.saving.register_keras_serializable(package="subclassed")
class Unit(layers.Layer):
    def __init__(self, width: int, **options: object):
        super().__init__(**options)
        self.width = width
        self.dense = layers.Dense(width, activation="tanh")
        self.norm = layers.BatchNormalization()

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.norm.build((*input_shape[:-1], self.width))

    def call(self, inputs, training=None):
        return self.norm(self.dense(inputs), training=training)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="subclassed")
class Stack(keras.Model):
    def __init__(self, **options: object):
        super().__init__(**options)
        self.units = [Unit(4), Unit(4)]
        self.dropout = layers.Dropout(0.5)
        self.head = layers.Dense(3, activation="softmax", name="scores")

    def call(self, inputs, training=None):
        x = inputs
        for unit in self.units:
            x = ops.concatenate([x, unit(x, training=training)], axis=-1)
        return self.head(self.dropout(x, training=training))


@keras.saving.register_keras_serializable(package="subclassed")
class Pair(keras.Model):
    def __init__(self, **options: object):
        super().__init__(**options)
        self.shared = layers.Dense(3)

    def call(self, inputs):
        return {"sum": self.shared(inputs["a"]) + self.shared(inputs["b"])}


@keras.saving.register_keras_serializable(package="subclassed")
class OwnWeight(keras.Model):
    def __init__(self, **options: object):
        super().__init__(**options)
        self.dense = layers.Dense(3)
        self.scale = self.add_weight(shape=(3,), name="scale", initializer="ones")

    def call(self, inputs):
        return self.dense(inputs) * self.scale


def _built(model: keras.Model, values: object) -> keras.Model:
    model(values)
    for seed, variable in enumerate(model.weights):
        variable.assign(np.random.default_rng(seed).uniform(0.2, 1.0, variable.shape))
    return model


def _assert_close(expected: object, received: object) -> None:
    for a, b in zip(keras.tree.flatten(expected), keras.tree.flatten(received), strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b), rtol=1e-6, atol=1e-6)


def test_a_subclassed_model_becomes_functional_and_can_be_expanded(tmp_path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
    model = _built(Stack(), values)
    names = [layer.name for layer in model.layers]
    functional = make_functional(model)
    assert [layer.name for layer in functional.layers if layer.weights] == ["units_0", "units_1", "scores"]
    assert [layer.name for layer in model.layers] == names
    assert not {id(v) for v in model.weights} & {id(v) for v in functional.weights}
    _assert_close(model(values), functional(values))
    graph = expand(copy_graph(functional))
    weighty = {node.path for node in graph.nodes if getattr(node.operation, "weights", None)}
    assert weighty == {"units_0/dense", "units_0/norm", "units_1/dense", "units_1/norm", "scores"}
    rebuilt = rewrite_graph(graph, repeat)
    rebuilt.save(tmp_path / "model.keras")
    _assert_close(model(values), keras.saving.load_model(tmp_path / "model.keras")(values))
    first, second = (ops.convert_to_numpy(functional(values, training=True)) for _ in range(2))
    assert (first != second).any()


def test_dicts_of_inputs_and_shared_layers() -> None:
    values = {name: np.full((2, 4), size, "float32") for name, size in (("a", 1.0), ("b", 2.0))}
    model = _built(Pair(), values)
    for functional in (make_functional(model), make_functional(model, values)):
        assert list(functional(values)) == ["sum"]
        assert len(functional.weights) == 2
        _assert_close(model(values), functional(values))


def test_functional_models_are_copied() -> None:
    start = keras.Input((3,))
    model = keras.Model(start, layers.Dense(2)(start))
    copy = make_functional(model)
    assert copy.layers[1] is not model.layers[1]
    _assert_close(model(np.ones((1, 3))), copy(np.ones((1, 3))))


def test_what_cannot_be_traced_is_said() -> None:
    with pytest.raises(ModelError, match=r"call\(\) uses the weight 'own_weight.*/scale'"):
        make_functional(_built(OwnWeight(), np.ones((1, 4), "float32")))
    with pytest.raises(ModelError, match="whose inputs are not known"):
        make_functional(Stack())
