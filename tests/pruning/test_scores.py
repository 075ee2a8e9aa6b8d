"""Scores: hand-worked values, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from compress.errors import PassError, UsageError
from compress.pruning.scores import SCORES, Movement, Score, ScoreInput, find_score, score_weights

W = np.array([[1, -2], [0, 4]], np.float32)
G = np.array([[-3, 0.5], [9, 0.25]], np.float32)


def scores_of(score, weights=W, gradient=None, movement=None, seed=(0, 0)):
    return score_weights(find_score(score), ScoreInput(weights, gradient, movement, seed), "a/kernel")


def test_by_hand():
    assert scores_of("magnitude").tolist() == [[1, 2], [0, 4]]
    assert scores_of("taylor", gradient=G).tolist() == [[3, 1], [0, 1]]
    assert scores_of("movement", movement=G).tolist() == G.tolist()
    assert scores_of(lambda given: given.weights**2).tolist() == [[1, 4], [0, 16]]
    assert scores_of(Score(lambda given: given.gradient, needs_gradients=True), gradient=G).tolist() == G.tolist()


def test_random_is_seeded():
    first, again, other = (scores_of("random", seed=seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.float32


def test_movement_adds_up_and_skips_pruning():
    movement = Movement([W])
    movement.update([np.array([[2, -1], [1, 4]])])  # w * (now - w): 1 * 1, -2 * 1, 0 * 1, 0
    assert movement.read()[0].tolist() == [[1, -2], [0, 0]]
    movement.restart([np.array([[2, 0], [1, 4]])])  # -1 was pruned: no movement towards zero
    movement.update([np.array([[1, 0], [2, 5]])])  # 2 * -1, 0, 1 * 1, 4 * 1
    assert movement.read()[0].tolist() == [[-1, -2], [1, 4]]


def test_movement_is_what_the_paper_sums_under_sgd():
    weights, rate = W.copy(), 0.1
    movement, expected = Movement([weights]), np.zeros_like(W)
    for step in range(5):
        gradient = np.cos(weights + step)
        expected -= rate * weights * gradient
        weights = weights - rate * gradient
        movement.update([weights])
        movement.restart([weights])
    assert np.allclose(movement.read()[0], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_other_dtypes(dtype):
    smallest = -128 if dtype == "int8" else 4
    assert scores_of("magnitude", np.array([[3, smallest]], dtype)).tolist() == [[3, abs(smallest)]]


def test_refused():
    assert list(SCORES) == ["magnitude", "random", "taylor", "movement"]
    with pytest.raises(UsageError, match="one of .*'taylor'.*Received: 'l1'"):
        find_score("l1")
    with pytest.raises(UsageError, match="data=None"):
        scores_of("taylor")
    with pytest.raises(UsageError, match="needs a training"):
        scores_of("movement")
    with pytest.raises(UsageError, match=r"shape \(2, 2\) for a/kernel. Received: \(2,\)"):
        scores_of(lambda given: given.weights[0])
    with pytest.raises(PassError, match="NaN in a/kernel"):
        scores_of("magnitude", np.array([[1, np.nan]]))
    with pytest.raises(PassError, match="NaN in the gradient of a/kernel"):
        scores_of("taylor", gradient=np.full((2, 2), np.nan))
    with pytest.raises(PassError, match="NaN for a/kernel"):
        scores_of(lambda given: given.weights * np.nan)
