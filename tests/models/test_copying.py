"""Copies are equal to the original, independent of it, and need no registered custom objects."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from compress.errors import ModelError
from compress.models.copying import copy_model

FACTOR = 3.0


def sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,), name="features"),
            layers.Dense(3, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, seed=7),
            layers.Dense(2, name="head"),
        ]
    )


def several_inputs() -> keras.Model:
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared = layers.Dense(3, name="shared")
    x = keras.ops.maximum(shared(a), shared(b)) * 2.0 + 1.0
    return keras.Model({"a": a, "b": b}, {"mean": keras.ops.mean(x, axis=1), "head": layers.Dense(1)(x)})


def nested() -> keras.Model:
    inputs = keras.Input((4,), name="features")
    inner = sequential()
    return keras.Model(inputs, layers.Dense(2, name="head")(inner(inputs)))


def lambdas() -> keras.Model:
    inputs = keras.Input((4,))
    power = 2
    x = layers.Dense(3, activation=lambda x: keras.ops.relu(x) * FACTOR)(inputs)
    inner = keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: keras.ops.abs(x) ** power)])
    return keras.Model(inputs, inner(x))


def mixed_precision() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, dtype="mixed_float16"),
            layers.Dense(3, dtype="bfloat16"),
            layers.Dense(2, dtype="float32"),
        ]
    )


def unregistered() -> keras.Model:
    def activation(x):
        return keras.ops.tanh(x)

    class Block(layers.Layer):
        def __init__(self, inner=None, **options):
            super().__init__(**options)
            self.inner = inner

        def build(self, shape):
            if not self.inner.built:
                self.inner.build(shape)

        def call(self, x):
            return self.inner(x)

        def get_config(self):
            return {**super().get_config(), "inner": keras.saving.serialize_keras_object(self.inner)}

        @classmethod
        def from_config(cls, config):
            config["inner"] = keras.saving.deserialize_keras_object(config["inner"])
            return cls(**config)

    class Twice(layers.Dense):
        def call(self, x):
            return super().call(x) * 2

    return keras.Sequential([keras.Input((4,)), Block(Twice(3, activation=activation), name="block")])


def subclassed() -> keras.Model:
    class Net(keras.Model):
        def __init__(self, units, **options):
            super().__init__(**options)
            self.units = units
            self.parts = [layers.Dense(units, name="one"), layers.Dense(2, name="two")]

        def build(self, shape):
            self.parts[0].build(shape)
            self.parts[1].build((None, self.units))
            super().build(shape)

        def call(self, x):
            return self.parts[1](self.parts[0](x))

        def get_config(self):
            return {**super().get_config(), "units": self.units}

    model = Net(3)
    model(np.zeros((1, 4), np.float32))
    return model


def samples(model: keras.Model):
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    return {"a": x, "b": -x} if len(getattr(model, "inputs", None) or [0]) == 2 else x


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
@pytest.mark.parametrize(
    "build", [sequential, several_inputs, nested, lambdas, mixed_precision, unregistered, subclassed]
)
def test_same_outputs_and_names(build):
    keras.utils.set_random_seed(0)
    model = build()
    copy = copy_model(model)
    expected = keras.tree.flatten(model(samples(model)))
    received = keras.tree.flatten(copy(samples(model)))
    assert all(np.array_equal(a, b) for a, b in zip(expected, received, strict=True))
    assert copy.name == model.name
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    assert getattr(copy, "input_names", None) == getattr(model, "input_names", None)
    assert not {id(v) for v in copy.variables} & {id(v) for v in model.variables}


def test_random_generators_continue_alike():
    model = sequential()
    x = samples(model)
    model(x, training=True)
    copy = copy_model(model)
    assert np.array_equal(model(x, training=True), copy(x, training=True))


def test_training_the_copy_leaves_the_original():
    class Weighted(keras.Loss):
        def __init__(self, factor=2.0, name="weighted"):
            super().__init__(name=name)
            self.factor = factor

        def call(self, y, p):
            return keras.ops.mean((y - p) ** 2, -1) * self.factor

        def get_config(self):
            return {"factor": self.factor, "name": self.name}

    def error(y, p):
        return keras.ops.mean(keras.ops.abs(y - p), -1)

    model = sequential()
    model.get_layer("first").trainable = False
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10), global_clipnorm=1.0)
    model.compile(optimizer, loss=Weighted(3.0), metrics=[error], steps_per_execution=2, jit_compile=False)
    x, y = samples(model), np.ones((5, 2), np.float32)
    model.fit(x, y, verbose=0)
    copy = copy_model(model)
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    assert copy.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    assert (copy.steps_per_execution, copy.jit_compile) == (2, False)
    assert copy.optimizer is not model.optimizer
    assert int(copy.optimizer.iterations) == 0
    assert copy.optimizer.get_config() == model.optimizer.get_config()
    copy.fit(x, y, epochs=2, verbose=0)
    after = [keras.ops.convert_to_numpy(v) for v in model.variables]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert int(model.optimizer.iterations) == 1
    first = copy.get_layer("first").get_weights()[0]
    assert np.array_equal(first, model.get_layer("first").get_weights()[0])  # frozen in the copy, too
    head = copy.get_layer("head").get_weights()[0]
    assert not np.array_equal(head, model.get_layer("head").get_weights()[0])


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_loss_function_of_any_kind():
    model = sequential()
    model.compile("sgd", loss=lambda y, p: keras.ops.mean((y - p) ** 2, -1) * FACTOR)
    x, y = samples(model), np.ones((5, 2), np.float32)
    assert copy_model(model).evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)


def test_model_that_cannot_be_rebuilt():
    class Fixed(keras.Model):
        def __init__(self, layer):
            super().__init__()
            self.inner = layer

        def call(self, x):
            return self.inner(x)

    model = Fixed(layers.Dense(2))
    model(np.zeros((1, 4), np.float32))
    with pytest.raises(ModelError, match="class Fixed") as error:
        copy_model(model)
    assert "get_config()" in error.value.help
