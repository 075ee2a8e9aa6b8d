"""Patterns: hand-worked masks, exact counts, groups that hold everywhere, and kernels that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.errors import UsageError
from compress.models.kernel_layout import KernelLayout, default_layout, to_matrices
from compress.pruning.patterns import NM, Block, Unstructured, lowest_mask, parse_pattern

TIED = st.sampled_from([-np.inf, 0, 0.5, 1, 2, np.inf])
DENSE = default_layout(2)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("2:4", NM(2, 4)), ("4x1", Block(4, 1)), ("1x16", Block(1, 16)), (" Unstructured ", Unstructured())],
)
def test_parse(text, pattern):
    assert parse_pattern(text) == pattern == parse_pattern(pattern) == parse_pattern(str(pattern))


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "0x4", "2-4", "", "2:4:8", "2:-4", None, 2, "٢:٤", "1:9999999"])
def test_no_pattern(text):
    with pytest.raises(UsageError, match="Received"):
        parse_pattern(text)


def test_2_4_by_hand():
    scores = np.array([[1, 9], [4, 9], [3, 9], [2, 9], [0, 0], [0, 1], [5, 2], [6, 3]], np.float32)
    mask = NM(2, 4).mask(scores, 8, DENSE, scores.shape)
    assert mask.T.astype(int).tolist() == [[0, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]]
    partly = NM(2, 4).mask(scores, 3, DENSE, scores.shape)
    assert partly.T.astype(int).tolist() == [[1, 1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 1, 1, 1]]


def test_2_4_runs_along_the_inputs_of_a_transposed_convolution():
    layout = KernelLayout((3,), (2,))
    scores = np.random.default_rng(0).random((3, 3, 5, 8), np.float32)  # (height, width, outputs, inputs)
    mask = NM(2, 4).mask(scores, 180, layout, scores.shape)
    assert (mask.reshape(3, 3, 5, 2, 4).sum(-1) == 2).all()


def test_blocks_by_hand():
    scores = np.array([[1, 0, 5, 5], [1, 0, 5, 5], [9, 2, 0, 0], [9, 2, 0, 9]], np.float32)
    pattern = Block(2, 1)
    pooled = pattern.pool(scores, DENSE)
    assert pooled.tolist() == [[[1, 0, 5, 5], [9, 2, 0, 4.5]]]
    assert pattern.mask(pooled, 3, DENSE, (4, 4)).astype(int).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [1, 1, 0, 1],
        [1, 1, 0, 1],
    ]
    assert Block(1, 2).pool(scores, DENSE).tolist() == [[[0.5, 5], [0.5, 5], [5.5, 0], [5.5, 4.5]]]


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=6), elements=TIED), st.data())
def test_lowest_mask_is_exact(scores, data):
    count = data.draw(st.integers(0, scores.size))
    mask = lowest_mask(scores, count)
    assert mask.shape == scores.shape
    assert np.count_nonzero(~mask) == count
    assert not mask.any() or mask.all() or scores[~mask].max() <= scores[mask].min()


@given(st.data())
def test_n_of_m_is_exact_in_every_group(data):
    m = data.draw(st.integers(2, 8))
    n = data.draw(st.integers(1, m - 1))
    positions, groups, outputs = (data.draw(st.integers(1, 3)) for _ in range(3))
    shape, layout = data.draw(
        st.sampled_from(
            [
                ((positions, groups * m, outputs), KernelLayout((1,), (2,))),
                ((positions, outputs, groups * m), KernelLayout((2,), (1,))),
                ((groups, m, outputs), KernelLayout((0, 1), (2,))),
            ]
        )
    )
    scores = data.draw(hnp.arrays(np.float32, shape, elements=TIED))
    full = scores.size // m * (m - n)
    count = data.draw(st.integers(0, full))
    partly, whole = (NM(n, m).mask(scores, each, layout, shape) for each in (count, full))
    assert np.count_nonzero(~partly) == count
    matrices = to_matrices(whole, layout)
    kept = matrices.reshape(matrices.shape[0], -1, m, matrices.shape[2]).sum(axis=2)
    assert (kept == n).all()
    assert not (whole & ~partly).any()  # on the way only those go that will go
    groups = to_matrices(scores, layout).reshape(matrices.shape[0], -1, m, matrices.shape[2])
    chosen = matrices.reshape(groups.shape)
    assert (np.where(chosen, -np.inf, groups).max(axis=2) <= np.where(chosen, groups, np.inf).min(axis=2)).all()


@given(st.data())
def test_blocks_are_whole_and_counted(data):
    block = Block(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    shape = (2, rows * block.inputs, columns * block.outputs)
    scores = data.draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0, 0.5, 1, 2])))
    layout = default_layout(3)
    count = data.draw(st.integers(0, 2 * rows * columns))
    mask = block.mask(block.pool(scores, layout), count, layout, shape)
    tiles = mask.reshape(2, rows, block.inputs, columns, block.outputs)
    assert (tiles.all(axis=(2, 4)) == tiles.any(axis=(2, 4))).all()
    assert np.count_nonzero(~mask) == count * block.inputs * block.outputs


@pytest.mark.parametrize(
    ("pattern", "shape", "said"),
    [
        ("2:4", (3, 3, 3, 16), "pattern 2:4 needs a multiple of 4 inputs. Received: stem/kernel with 3"),
        ("4x1", (6, 8), "pattern 4x1 needs a multiple of 4 inputs. Received: stem/kernel with 6"),
        ("1x16", (6, 8), "pattern 1x16 needs a multiple of 16 outputs. Received: stem/kernel with 8"),
    ],
)
def test_a_pattern_that_does_not_fit(pattern, shape, said):
    with pytest.raises(UsageError) as caught:
        parse_pattern(pattern).require_fit("stem/kernel", shape, default_layout(len(shape)))
    assert caught.value.message == said
    assert "exclude=['stem/kernel']" in caught.value.help
