"""The wrappers that TensorFlow Model Optimization left in a model: taken off, with what they knew of the layer inside.

What the model computes with them on is put into the weights: `kernel * mask` of pruning, the nearest centroids of
clustering. Quantizers are carried over by `compress.legacy.quantizers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from compress.errors import ModelError
from compress.legacy.files import NamedArray

_KINDS: dict[str, str] = {
    "PruneLowMagnitude": "pruning",
    "ClusterWeights": "clustering",
    "ClusterWeightsMHA": "clustering",
    "QuantizeWrapper": "quantization",
    "QuantizeWrapperV2": "quantization",
    "QuantizeAnnotate": "annotation",
}
_STATE = re.compile(
    r"(mask|threshold|pruning_step|optimizer_step|barrier_cost)(_\d+)?"
    r"|(cluster_centroids|pulling_indices|ori_weights_vars)_.*|.*_(min|max)"
)
INPUT_QUANTIZER = "QuantizeLayer"
"""The layer that rounds a model's input."""


@dataclass(frozen=True)
class Wrapper:
    """A wrapper that was taken off.

    Args:
        kind: what it did.
        name: its own name, by which other layers called it.
        inner: name of the layer inside.
        options: its configuration, without the layer.
    """

    kind: Literal["pruning", "clustering", "quantization", "annotation"]
    name: str
    inner: str
    options: Mapping[str, Any]

    def owns(self, array: NamedArray) -> bool:
        """Return whether a weight belongs to the wrapper or the layer inside, by its name."""
        return array.name.partition("/")[0] in (self.name, self.inner)

    def is_state(self, array: NamedArray) -> bool:
        """Return whether a weight is what the wrapper keeps for itself."""
        return self.owns(array) and _STATE.fullmatch(leaf(array.name)) is not None

    def name_inside(self, array: NamedArray) -> str:
        """Return the name of a weight as the layer inside knows it, such as `"kernel"` or `"lstm_cell/kernel"`."""
        name = array.name.removeprefix(f"{self.name}/")
        return name.removeprefix(f"{self.inner}/")


def leaf(name: str) -> str:
    """Return the last part of a weight's name."""
    return name.rpartition("/")[2]


def unwrap(node: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Wrapper]]:
    """Return the layer inside the wrappers around a serialised layer, and the wrappers, outermost first."""
    wrappers = []
    while node.get("class_name") in _KINDS:
        options = node.get("config")
        inner = options.get("layer") if isinstance(options, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("config"), Mapping):
            raise ModelError(f"a {node['class_name']} holds no layer.")
        rest = {key: value for key, value in options.items() if key != "layer"}
        names = str(options.get("name", "")), str(inner["config"].get("name", ""))
        wrappers.append(Wrapper(_KINDS[node["class_name"]], *names, rest))
        node = inner
    return node, wrappers


def masked(weights: dict[str, np.ndarray], state: list[NamedArray]) -> int:
    """Multiply weights by their masks, in place, and return how many there were.

    Args:
        weights: by name, those of the layer inside.
        state: what the wrapper kept; masks have no other names than their shapes.
    """
    masks = [array.value for array in state if leaf(array.name).startswith("mask")]
    free = [name for name in weights if "bias" not in name]
    for mask in masks:
        for name in free:
            if weights[name].shape == mask.shape:
                weights[name] = weights[name] * mask.astype(weights[name].dtype)
                free.remove(name)
                break
        else:
            raise ModelError(f"a mask of shape {mask.shape} fits no weight of its layer.")
    return len(masks)


def clustered(weights: dict[str, np.ndarray], state: list[NamedArray], wrapper: Wrapper) -> int:
    """Replace weights by their centroids, in place, and return how many kernels were clustered."""
    found = {leaf(array.name): array.value for array in state}
    count = 0
    for key, centroids in found.items():
        if not key.startswith("cluster_centroids_"):
            continue
        name = _clustered_name(weights, key.removeprefix("cluster_centroids_"))
        indices = found.get(f"pulling_indices_{name}")
        fits = indices is not None and indices.shape == weights[name].shape and centroids.ndim in (1, 2)
        if not fits or (indices.size and not 0 <= indices.min() <= indices.max() < centroids.shape[-1]):
            raise ModelError(f"the clusters of {wrapper.inner!r} do not fit its weight {name!r}.")
        channels = wrapper.options.get("data_format") if centroids.ndim > 1 else None
        weights[name] = _nearest(
            weights[name], centroids, indices, bool(wrapper.options.get("preserve_sparsity")), channels
        )
        count += 1
    return count


def _clustered_name(weights: Mapping[str, np.ndarray], name: str) -> str:
    if name in weights:
        return name
    fitting = [each for each in weights if leaf(each) == leaf(name)]
    if len(fitting) != 1:
        raise ModelError(f"the clusters of the weight {name[:80]!r} fit no weight.")
    return fitting[0]


def _nearest(
    weight: np.ndarray, centroids: np.ndarray, indices: np.ndarray, keep_zeros: bool, data_format: str | None
) -> np.ndarray:
    """Return the centroid nearest to each weight, as tfmot finds them anew at each call; a tie goes to the first.

    Args:
        weight: as training moved it.
        centroids: `(clusters,)`, or `(channels, clusters)`.
        indices: which centroid each weight had in the last training step.
        keep_zeros: weights that had the centroid nearest to zero keep it, and it is zero.
        data_format: where channels are, for centroids by channel.
    """
    if centroids.ndim == 1:
        if keep_zeros:
            zero = np.argmin(np.abs(centroids))
            centroids = np.where(np.arange(len(centroids)) == zero, 0, centroids).astype(centroids.dtype)
        nearest = np.argmin(np.abs(weight[..., None] - centroids), axis=-1)
        values = centroids[nearest]
        return np.where(centroids[indices] == 0, 0, values).astype(weight.dtype) if keep_zeros else values
    axis = 1 if data_format == "channels_first" else weight.ndim - 1
    parts = [
        _nearest(np.take(weight, index, axis), row, np.take(indices, index, axis), keep_zeros, None)
        for index, row in enumerate(centroids)
    ]
    return np.stack(parts, axis)
