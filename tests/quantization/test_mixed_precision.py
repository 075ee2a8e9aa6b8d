"""Bits per layer under a budget, from the Python function and from the options of passes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from pydantic import ValidationError

import compress
from compress.errors import UsageError
from compress.passes.mixed_precision import MixedPrecision
from compress.passes.ptq import PostTrainingQuantization
from compress.quantization.description import describe_quantization
from compress.quantization.mixed_precision import assign_bit_widths, measure_widths, stored_bytes
from compress.quantization.weight_format import WeightFormat

X = np.random.default_rng(0).normal(size=(64, 8, 8, 2)).astype("float32")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    block = keras.Sequential(
        [keras.Input((8, 8, 2)), keras.layers.Conv2D(4, 3, name="first"), keras.layers.BatchNormalization(),
         keras.layers.ReLU(), keras.layers.Conv2D(6, 3, name="second")],
        name="block",
    )  # fmt: skip
    inputs = keras.Input((8, 8, 2))
    pooled = keras.layers.GlobalAveragePooling2D()(block(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="head")(pooled))


@pytest.fixture(scope="module")
def table(model):
    return measure_widths(model, X, samples=32)


def test_sizes_and_operations_by_hand(table):
    assert list(table.loss) == ["block/first", "block/second", "head"]
    assert table.sizes_at_8_bits == {"block/first": 72 + 16, "block/second": 216 + 24, "head": 18 + 12}
    assert table.size_bytes["head"] == {2: 5 + 12, 3: 7 + 12, 4: 9 + 12, 5: 12 + 12, 6: 14 + 12, 8: 18 + 12}
    assert table.bit_operations["block/first"][4] == 36 * 72 * 4 * 8
    assert table.bit_operations["head"][8] == 18 * 8 * 8
    assert stored_bytes((10, 3), WeightFormat(4, (1,), 4, 0)) == 15 + 4 * 9
    assert stored_bytes((10, 3), WeightFormat(4, (1,)), container=True) == 30 + 12


def test_fewer_bits_cost_more(table):
    for losses in table.loss.values():
        assert losses[2] > losses[4] > losses[8] >= 0


@pytest.mark.parametrize("limit", [160, 171, 0.5, 0.6, 0.75])
def test_size_is_kept_to_the_byte_and_integer_programming_is_never_worse(model, table, limit):
    budget = limit if limit > 1 else limit * 358
    losses = {}
    for method in ("ilp", "greedy"):
        bits = table.assign(size=limit, method=method)
        losses[method] = sum(table.loss[path][width] for path, width in bits.items())
        assert table.total_bytes(bits) <= budget
    assert losses["ilp"] <= losses["greedy"]
    quantized = PostTrainingQuantization(bits=table.assign(size=limit), samples=32)(model, (X, None))
    assert describe_quantization(quantized).size_bytes == table.total_bytes(table.assign(size=limit)) <= budget


def test_other_budgets(table):
    bits = table.assign(bit_operations=0.5)
    spent = sum(table.bit_operations[path][width] for path, width in bits.items())
    assert spent <= 0.5 * sum(each[8] for each in table.bit_operations.values())
    limit = sum(each[4] for each in table.loss.values())
    bits = table.assign(max_loss=limit)
    assert sum(table.loss[path][width] for path, width in bits.items()) <= limit
    assert table.total_bytes(bits) <= table.total_bytes(dict.fromkeys(bits, 4))
    with pytest.raises(UsageError, match="expected one budget"):
        table.assign()
    with pytest.raises(UsageError, match="expected one budget"):
        table.assign(size=0.5, max_loss=1.0)
    with pytest.raises(UsageError, match="at least"):
        table.assign(size=10)


def test_unknown_operations_are_said():
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, keras.layers.Dense(3, name="steps")(inputs))
    x = np.ones((4, 5, 4), "float32")
    with pytest.raises(UsageError, match="'steps' without"):
        assign_bit_widths(model, x, bit_operations=0.5)
    assert set(assign_bit_widths(model, x, size=0.9)) == {"steps"}


def test_the_option_of_passes(model):
    quantize = PostTrainingQuantization(mixed=MixedPrecision(size="60%", samples=32), samples=32)
    quantized = quantize(model, (X, None))
    found = describe_quantization(quantized)
    assert found.size_bytes <= 0.6 * 358
    assert {layer.layer for layer in found.layers if layer.weights} == {"block/first", "block/second", "head"}
    assert quantize.needs_data() == ("train",)
    weights_only = {"type": "ptq", "scheme": "int8_weights", "mixed": {"size": "215 B", "exclude": []}}
    with pytest.raises(ValidationError, match="exclude"):
        PostTrainingQuantization(**weights_only)
    excluding = PostTrainingQuantization(
        scheme="int8_weights", exclude=("head",), mixed={"size": "215 B", "samples": 32}
    )
    assert describe_quantization(excluding(model, (X, None))).size_bytes <= 215


def test_option_mistakes():
    assert MixedPrecision(size="2 KiB").size == 2048
    assert MixedPrecision(size="60 %").size == 0.6
    for options in (
        {},
        {"size": 0.5, "bit_operations": 0.5},
        {"size": 0.5, "bits": ()},
        {"size": "60 KIB"},
        {"size": 0},
    ):
        with pytest.raises(ValidationError):
            MixedPrecision(**options)
    with pytest.raises(ValidationError, match="bits or mixed"):
        PostTrainingQuantization(bits=4, mixed={"size": 0.5})
    with pytest.raises(ValidationError, match="integer weights"):
        PostTrainingQuantization(scheme="float16", mixed={"size": 0.5})


def test_public_names():
    assert compress.assign_bit_widths is assign_bit_widths
    assert compress.describe_quantization is describe_quantization
