"""Masks hit the requested sparsity exactly, whatever the weights, and a plan that cannot work is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.errors import PassError, UsageError
from compress.models.kernel_layout import KernelLayout, default_layout
from compress.models.walking import Kernel
from compress.pruning.masks import make_masks, require_plan, resolve_sparsity
from compress.pruning.patterns import NM

# Few distinct values, so that ties are the rule; zero and constant kernels are among them.
TIED = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=4, max_side=6), elements=st.sampled_from([-2, -1, -0.0, 0, 1, 2])
)
ANY = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=8), elements=st.floats(width=32, allow_nan=False))
SPARSITY = st.floats(0, 1, exclude_max=True)


def magnitude_mask(weights, sparsity):
    return make_masks([weights], sparsity)[0]


def pruned(mask):
    return int(np.count_nonzero(~mask))


def test_smallest_magnitudes_are_pruned():
    weights = np.array([[0.5, -0.1], [-3.0, 0.2]], np.float32)
    assert magnitude_mask(weights, 0.5).tolist() == [[True, False], [True, False]]


def test_ties_go_by_index_and_zeros_first():
    assert magnitude_mask(np.array([1, -1, 1, -1], np.float32), 0.5).tolist() == [False, False, True, True]
    assert magnitude_mask(np.array([1, 0, -1, -0.0], np.float32), 0.5).tolist() == [True, False, True, False]
    assert magnitude_mask(np.zeros(4, np.float32), 0.25).tolist() == [False, True, True, True]


def test_zeros_go_first_whatever_their_score():
    weights, scores = np.array([1, 0, 2, 0], np.float32), np.array([-3, 9, -2, 8], np.float32)
    assert make_masks([weights], 0.5, score=lambda given: scores)[0].tolist() == [True, False, True, False]
    assert make_masks([weights], 0.75, score="movement", movement=[scores])[0].tolist() == [False, False, True, False]
    assert make_masks([weights], 0.5, score="random")[0].tolist() == [True, False, True, False]


def test_global_ranks_kernels_together_and_leaves_each_its_best():
    small, large = np.array([0.1, 0.2], np.float32), np.array([1, 2, 3, 4], np.float32)
    masks = make_masks([small, large], 0.5, distribution="global")
    assert [mask.tolist() for mask in masks] == [[False, True], [False, False, True, True]]
    masks = make_masks([small, large], 1 / 6, distribution="global")
    assert [mask.tolist() for mask in masks] == [[False, True], [True] * 4]


def test_infinite_weights_are_kept():
    assert magnitude_mask(np.array([np.inf, 1, -np.inf, 2], np.float32), 0.5).tolist() == [True, False, True, False]


def test_taylor_needs_both_weight_and_gradient():
    weights, gradient = np.array([1, 2, 3, 4], np.float32), np.array([9, 1, 0, 1], np.float32)
    assert make_masks([weights], 0.5, score="taylor", gradients=[gradient])[0].tolist() == [True, False, False, True]


def test_one_pattern_sparsity_grows_with_the_schedule():
    weights = [np.arange(1, 11, dtype=np.float32)] * 2
    options = {"paths": ["a/kernel", "b/kernel"], "distribution": {"a": 0.4}, "final": 0.8}
    for sparsity, expected in ((0, [0, 0]), (0.4, [2, 4]), (0.8, [4, 8])):
        assert [pruned(mask) for mask in make_masks(weights, sparsity, **options)] == expected


@given(st.one_of(TIED, ANY), SPARSITY)
def test_exact_sparsity_of_one_kernel(weights, sparsity):
    mask = magnitude_mask(weights, sparsity)
    assert mask.shape == weights.shape
    assert pruned(mask) == round(sparsity * weights.size)
    magnitudes = np.abs(weights)
    assert not mask.any() or mask.all() or magnitudes[~mask].max() <= magnitudes[mask].min()


@given(
    st.lists(TIED, min_size=1, max_size=4),
    SPARSITY,
    st.sampled_from(["global", "erk", "lamp"]),
    st.sampled_from(["magnitude", "random", "taylor"]),
)
def test_exact_sparsity_of_all_kernels_together(weights, sparsity, distribution, score):
    masks = make_masks(weights, sparsity, distribution=distribution, score=score, gradients=weights)
    assert sum(map(pruned, masks)) == round(sparsity * sum(each.size for each in weights))


@given(st.lists(TIED, min_size=2, max_size=4), SPARSITY, st.sampled_from(["global", "erk", "lamp"]))
def test_no_kernel_is_emptied_while_the_total_allows_it(weights, sparsity, distribution):
    masks = make_masks(weights, sparsity, distribution=distribution)
    total = sum(each.size for each in weights)
    assert round(sparsity * total) > total - len(weights) or all(mask.any() for mask in masks)


@given(hnp.arrays(np.float32, (3, 8, 6), elements=st.sampled_from([-1, 0, 1, 2])), st.sampled_from([0.25, 0.5, 0.75]))
def test_blocks_of_two_kernels_share_an_exact_total(weights, sparsity):
    layouts = [default_layout(3), KernelLayout((2,), (1,))]
    other = np.ascontiguousarray(weights.transpose(0, 2, 1))
    masks = make_masks([weights, other], sparsity, distribution="global", pattern="4x1", layouts=layouts)
    assert sum(map(pruned, masks)) == 4 * round(sparsity * 2 * 36)


@given(TIED, SPARSITY, SPARSITY)
def test_more_sparsity_prunes_the_same_weights_and_more(weights, first, second):
    low, high = sorted((first, second))
    mask = magnitude_mask(weights, low)
    again = magnitude_mask(np.where(mask, weights, 0), high)
    zeros = (weights == 0) | ~mask
    assert np.count_nonzero(~again & zeros) == min(pruned(again), np.count_nonzero(zeros))


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan"), "80%", None, True])
def test_impossible_sparsity(sparsity):
    with pytest.raises(UsageError, match="Received: sparsity="):
        magnitude_mask(np.ones(3), sparsity)


def test_nan_is_refused():
    with pytest.raises(PassError, match="NaN in head/kernel"):
        make_masks([np.array([1.0, np.nan])], 0.5, paths=["head/kernel"])


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_other_dtypes(dtype):
    mask = magnitude_mask(np.array([3, -2, 1, -128 if dtype == "int8" else 4], dtype), 0.5)
    assert mask.tolist() == [True, False, False, True]


def test_what_a_pattern_rules_out_is_refused_without_a_plan_too():
    weights = [np.ones((8, 2))]
    with pytest.raises(UsageError, match=r"sparsity 0\.5. Received: sparsity=0\.6"):
        make_masks(weights, 0.6, pattern="2:4")
    with pytest.raises(UsageError, match="same sparsity in every kernel"):
        make_masks(weights, 0.5, pattern="2:4", distribution="lamp")
    with pytest.raises(UsageError, match="0 with 8"):
        make_masks(weights, 0.5, pattern="3x1")


def test_sparsity_of_a_pattern():
    assert resolve_sparsity(None, "2:4") == resolve_sparsity(0.5, NM(2, 4)) == 0.5
    assert resolve_sparsity(0.3333333, NM(2, 3)) == pytest.approx(1 / 3)
    assert resolve_sparsity(0.8, "4x1") == 0.8
    with pytest.raises(UsageError, match=r"pattern 2:4 has sparsity 0\.5\. Received: sparsity=0\.8"):
        resolve_sparsity(0.8, "2:4")
    with pytest.raises(UsageError, match="sparsity='50%'"):
        resolve_sparsity("50%", "2:4")
    with pytest.raises(UsageError, match="sparsity=None"):
        resolve_sparsity(None, "unstructured")


class Shaped:
    """A variable as far as a plan looks at it."""

    def __init__(self, *shape):
        self.shape = shape


STEM = Kernel("stem/kernel", "stem", Shaped(3, 3, 3, 16))
BODY = Kernel("body/kernel", "body", Shaped(3, 3, 16, 32))
HEAD = Kernel("head/kernel", "head", Shaped(2, 1))
GATE = Kernel("gate/kernel", "gate", Shaped(1, 1))


@pytest.mark.parametrize(
    ("kernels", "options", "said"),
    [
        ([BODY], {"sparsity": 1.0}, r"sparsity=1\.0"),
        ([BODY], {"sparsity": 0.5, "score": "l1", "distribution": "lamp"}, "'l1'"),
        ([BODY], {"sparsity": 0.5, "score": "l1"}, "'l1'"),
        ([BODY], {"sparsity": 0.5, "distribution": "best"}, "'best'"),
        ([BODY], {"sparsity": 0.5, "distribution": {"stem": 0.5}}, "matches no layer. Received: 'stem'"),
        ([BODY, STEM], {"sparsity": 0.5, "pattern": "2:4"}, "stem/kernel with 3"),
        ([BODY], {"sparsity": 0.8, "pattern": "2:4"}, r"pattern 2:4 has sparsity 0\.5"),
        ([BODY], {"sparsity": 0.5, "pattern": "2:4", "distribution": "erk"}, "same sparsity in every kernel"),
        ([BODY], {"sparsity": 0.5, "distribution": "lamp", "score": "movement"}, "the score movement"),
        (
            [BODY, HEAD],
            {"sparsity": 0.8},
            r"head/kernel to keep a weight. Received: sparsity=0\.8, which prunes 2 of 2",
        ),
        ([BODY, HEAD], {"sparsity": 0.5, "distribution": {"head": 0.9}}, "prunes 2 of 2"),
        ([BODY], {"sparsity": 0.9999, "pattern": "1x16"}, "prunes 288 of 288"),
        ([HEAD, GATE], {"sparsity": 0.5, "distribution": "global"}, "leaves 1 of 3"),
    ],
    ids=lambda value: "-".join(k.layer_path for k in value) if isinstance(value, list) else str(value),
)
def test_a_plan_that_cannot_work(kernels, options, said):
    with pytest.raises(UsageError, match=said):
        require_plan(kernels, [default_layout(len(kernel.variable.shape)) for kernel in kernels], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.9},
        {"sparsity": 0.5, "pattern": "2:4"},
        {"sparsity": 0.95, "distribution": "lamp", "pattern": "4x1"},
        {"sparsity": 0.8, "distribution": "erk"},
        {"sparsity": 0.8, "distribution": {"body": 0}},
        {"sparsity": 0.8, "distribution": "global", "score": "movement"},
    ],
    ids=str,
)
def test_a_plan_that_works(options):
    require_plan([BODY], [default_layout(4)], **options)
