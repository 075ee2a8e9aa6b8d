"""Which tensor belongs to which layer: names, shapes, values and the order of execution."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from compress.measure.layer_matching import arrange, match_tensors, nearest_matched
from compress.measure.layer_outputs import Observed

RNG = np.random.default_rng(0)


def _side(*tensors, layers=()):
    """A file whose tensors are `(label, parents)`; the last is its output."""
    made = [
        Observed(label, "Op", tuple(label.split(";")), parents, index == len(tensors) - 1)
        for index, (label, parents) in enumerate(tensors)
    ]
    return SimpleNamespace(tensors=tuple(made), layers=tuple(layers))


def _chain(*labels, layers=()):
    return _side(*((label, (index - 1,) if index else ()) for index, label in enumerate(labels)), layers=layers)


def _noise(*shape):
    return RNG.normal(size=(2, 1, *shape))


def _found(a, b, values_a, values_b):
    matches = match_tensors(a, b, values_a, values_b)
    return {a.tensors[i].name: b.tensors[match.position].name for i, match in sorted(matches.items())}


def test_values_find_layers_that_were_fused_or_renamed():
    conv, norm, relu = _noise(4, 4, 3), _noise(4, 4, 3), _noise(4, 4, 3)
    a = _chain("conv", "norm", "relu", layers=("conv", "norm", "relu"))
    b = _chain("net/conv/Conv2D", "x")
    close = norm + 1e-3 * _noise(4, 4, 3)
    assert _found(a, b, [conv, norm, relu], [close, relu]) == {"norm": "net/conv/Conv2D", "relu": "x"}


@pytest.mark.parametrize(("axes", "back"), [((0, 1, 4, 2, 3), (1, 2, 0)), ((0, 1, 3, 4, 2), (2, 0, 1))])
def test_layouts_are_found_by_value(axes, back):
    value = _noise(4, 4, 4)
    other = np.transpose(value, axes)
    (match,) = match_tensors(_chain("a"), _chain("b"), [value], [other]).values()
    assert match.axes == back
    np.testing.assert_array_equal(arrange(other[0], value.shape[1:], match.axes), value[0, 0])


def test_axes_of_one_do_not_matter():
    value = _noise(1, 5)
    assert _found(_chain("a"), _chain("b"), [value], [value.reshape(2, 5, 1, 1, 1)]) == {"a": "b"}


def test_a_wrong_layer_is_found_by_its_name():
    start, wrong_a, wrong_b, end = _noise(6), _noise(6), _noise(6), _noise(2)
    a = _chain("block/one", "block/two", "head", layers=("block/one", "block/two", "head"))
    b = _chain("net_1/block_1/one_1/MatMul", "net_1/block_1/two_1/MatMul", "Identity")
    found = _found(a, b, [start, wrong_a, end], [start, wrong_b, end + 0.3 * _noise(2)])
    assert found == dict(zip(("block/one", "block/two", "head"), (t.name for t in b.tensors), strict=True))


def test_calls_of_a_shared_layer_stay_in_order():
    first, second, end = _noise(99), _noise(99), _noise(2)
    a = _chain("shared", "shared", "end", layers=("shared", "end"))
    b = _chain("shared/MatMul", "shared/MatMul_1", "out")
    # Each call of the damaged layer happens to resemble the other call of the sound one.
    matches = match_tensors(a, b, [first, second, end], [second + _noise(99), first + _noise(99), end + _noise(2)])
    assert {i: match.position for i, match in matches.items()} == {0: 0, 1: 1, 2: 2}


def test_no_pair_turns_the_order_around():
    early, late, end = _noise(6), _noise(6), _noise(2)
    found = _found(_chain("p", "q", "end"), _chain("r", "s", "out"), [early, late, end], [late, early, end])
    assert len(found) == 2


def test_a_tensor_that_differs_before_layers_that_agree_is_none():
    hidden, end = _noise(6), _noise(6, 2)
    a, b = _chain("p", "end"), _chain("q", "out")
    half = hidden + 0.4 * _noise(6)
    assert _found(a, b, [hidden, end], [half, end]) == {"end": "out"}
    assert _found(a, b, [hidden, end], [half, end + 0.4 * _noise(6, 2)]) == {"p": "q", "end": "out"}


def test_unrelated_values_have_no_counterpart():
    assert _found(_chain("p", "end"), _chain("q", "out"), [_noise(99), _noise(2)], [_noise(99), _noise(2)]) == {
        "end": "out"
    }


def test_nearest_matched_looks_through_layers_without_counterpart():
    tensors = _side(("a", ()), ("b", (0,)), ("c", (1,)), ("d", (0,)), ("e", (2, 3))).tensors
    assert nearest_matched(4, tensors, {0: None, 3: None}) == ([0, 3], [1, 2])
