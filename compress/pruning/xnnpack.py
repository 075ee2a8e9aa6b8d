"""Which layers LiteRT's sparse kernels could run: the 1x1 convolutions of a net that XNNPACK can turn to NCHW.

XNNPACK decides for the largest connected part of the net at a time (`subgraph.c`, rewriting for NCHW): it begins with a
3x3 convolution of stride 2 over 3 channels, ends with global average pooling, and everything between must be of a few
kinds. One layer that is not keeps the whole part dense. On x86 processors with AVX it leaves all dense anyway. It looks
for such parts only where the file stores a weight sparsely; then zeros of weights that are stored densely count too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import keras

from compress.errors import ModelError, UsageError
from compress.models.graph import Graph, Node, copy_graph
from compress.models.patterns import matches
from compress.models.walking import list_kernels

MINIMUM_SPARSITY = 2 / 3
"""The share of zeros in the 1x1 convolutions of a part up to which XNNPACK computes it densely.

Recent versions count the weights of a Dense layer behind the pooling too, whose zeros then matter as well.
"""

EXPECTATION = (
    "no speed is promised: on Arm LiteRT may run the layers that qualify faster, once more than two thirds of their "
    "weights (recent versions count a Dense layer behind the pooling too) are zeros and the file stores them sparsely "
    "(export --sparse); on x86 processors with AVX it computes them densely"
)

_ACTIVATIONS = ("linear", "relu", "relu6", "sigmoid", "hard_silu", "hard_swish", "elu", "leaky_relu", "silu", "swish")
_ELEMENTWISE = ("ReLU", "LeakyReLU", "ELU", "Relu", "Relu6", "Sigmoid", "HardSilu", "Silu", "Elu", "LeakyRelu")
_MERGING = ("Add", "Multiply")
_TRANSPARENT = ("Dropout", "Identity", "SpatialDropout2D", "ActivityRegularization")


@dataclass(frozen=True)
class XnnpackVerdict:
    """Whether LiteRT's sparse kernels accept a layer.

    Args:
        path: path of the layer.
        qualifies: whether they do, once two thirds of its part of the net are zeros.
        reason: why not; empty where they do.
    """

    path: str
    qualifies: bool
    reason: str = ""


def lint_xnnpack(model: keras.Model) -> list[XnnpackVerdict]:
    """Return a verdict on each layer of `model` that has a kernel, in their order."""
    layers = dict.fromkeys(kernel.layer_path for kernel in list_kernels(model))
    try:
        graph = copy_graph(model)
    except ModelError as error:
        reason = f"the calls of the model cannot be traced: {error.message.splitlines()[0]}"
        return [XnnpackVerdict(path, False, reason) for path in layers]
    verdicts = _Linter(graph).verdicts()
    return [verdicts.get(path) or XnnpackVerdict(path, False, "is not in the graph of the model") for path in layers]


def select_xnnpack(model: keras.Model, include: Sequence[str] = ("*",)) -> tuple[str, ...]:
    """Return the paths of the layers that qualify and fit `include`.

    Raises:
        UsageError: there is none; the reasons of the first 1x1 convolutions are in it.
    """
    verdicts = [verdict for verdict in lint_xnnpack(model) if matches(verdict.path, include)]
    chosen = tuple(verdict.path for verdict in verdicts if verdict.qualifies)
    if not chosen:
        reasons = [f"{verdict.path}: {verdict.reason}" for verdict in verdicts]
        reasons.sort(key=lambda reason: "its part of the net" not in reason)  # those of 1x1 convolutions say most
        raise UsageError(
            f"expected a layer that LiteRT's sparse kernels accept. Received: {'; '.join(reasons[:3]) or 'no kernels'}",
            "See bmcompress inspect --xnnpack, or prune without the profile.",
        )
    return chosen


class _Linter:
    """Finds the parts of a graph that XNNPACK would turn to NCHW together."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._problems = {id(node): self._problem(node) for node in graph.nodes}

    def verdicts(self) -> dict[str, XnnpackVerdict]:
        """Return a verdict by path for every call with a kernel; a shared layer qualifies where all its calls do."""
        found: dict[str, XnnpackVerdict] = {}
        stops: dict[int, str] = {}
        for node in self._graph.nodes:
            reason = _reason_itself(node)
            if reason is None:
                part = self._part(node)
                if id(part[0]) not in stops:
                    stops[id(part[0])] = next(self._stops(part), "")
                reason = stops[id(part[0])] and f"its part of the net {stops[id(part[0])]}"
            if node.path not in found or reason:
                found[node.path] = XnnpackVerdict(node.path, not reason, reason)
        return found

    def _part(self, start: Node) -> list[Node]:
        """Return the calls of fitting kinds that tensors connect to `start`, in the order of the graph."""
        seen = {id(start): start}
        waiting = [start]
        while waiting:
            node = waiting.pop()
            for other in self._neighbours(node):
                if id(other) not in seen and not self._problems[id(other)]:
                    seen[id(other)] = other
                    waiting.append(other)
        return [node for node in self._graph.nodes if id(node) in seen]

    def _neighbours(self, node: Node) -> Iterator[Node]:
        if not _enters(node):
            yield from filter(None, map(self._graph.producer, node.inputs))
        yield from (each for each in self._graph.consumers(node.output) if not _enters(each))

    def _stops(self, part: list[Node]) -> Iterator[str]:
        """Yield what keeps a part from being turned, if anything does."""
        members = {id(node) for node in part}
        for node in part:
            for tensor in () if _enters(node) else node.inputs:
                producer = self._graph.producer(tensor)
                if producer is None:
                    yield f"begins with an input of the model at {node.path!r}, not with a 3x3 convolution of stride 2"
                elif id(producer) not in members:
                    yield f"reads {producer.path!r}, which {self._problems[id(producer)]}"
            readers = self._graph.consumers(node.output)
            # Pooling may end the part. What it makes may also be read inside, as for squeeze and excitation, not both.
            if _leaves(node) and not any(id(reader) in members for reader in readers):
                continue
            if self._graph.is_output(node.output):
                yield f"has an output of the model at {node.path!r}, which is no global average pooling at its end"
            for reader in readers:
                if id(reader) not in members:
                    yield f"is read by {reader.path!r}, which {self._problems[id(reader)] or 'begins another part'}"

    def _problem(self, node: Node) -> str:
        """Return why a call keeps its part from being turned; empty where it does not."""
        layer, kind = node.operation, node.kind
        if kind in (*_TRANSPARENT, *_ELEMENTWISE, *_MERGING, "Activation"):
            return _elementwise_problem(node)
        if kind == "ZeroPadding2D":
            return "" if self._pads(node) else "pads what no convolution alone reads"
        if kind == "BatchNormalization":
            before = self._graph.producer(node.inputs[0])
            folds = before is not None and before.kind in ("Conv2D", "DepthwiseConv2D") and _is_linear(before.operation)
            alone = folds and self._graph.only_consumer(before.output) is node
            return "" if alone else "does not follow a convolution into which it could be folded"
        if kind == "GlobalAveragePooling2D":
            return _format_problem(layer)
        if kind == "UpSampling2D":
            return "" if layer.interpolation == "bilinear" else f"resizes by {layer.interpolation!r}, not bilinear"
        if kind == "Conv2D":
            return self._convolution_problem(node)
        if kind == "DepthwiseConv2D":
            return self._depthwise_problem(node)
        return f"is {_article(kind)} {kind}"

    def _convolution_problem(self, node: Node) -> str:
        layer = node.operation
        common = _format_problem(layer) or _activation_problem(layer)
        if common or layer.groups != 1 or {*layer.dilation_rate} != {1}:
            return common or "has groups or dilation"
        if _is_pointwise(layer):
            return "" if self._padding(node) == 0 else "is padded"
        if not _enters(node):
            return f"is a convolution of {_size(layer)} and stride {layer.strides[0]}"
        return "" if self._padding(node) == 1 else "is not padded by 1 on all sides (ZeroPadding2D(1) before it would)"

    def _depthwise_problem(self, node: Node) -> str:
        layer = node.operation
        common = _format_problem(layer) or _activation_problem(layer)
        size, stride = {*layer.kernel_size}, {*layer.strides}
        if common or {*layer.dilation_rate} != {1} or layer.depth_multiplier != 1:
            return common or "has dilation or a depth multiplier"
        if size not in ({3}, {5}) or stride not in ({1}, {2}):
            return f"is a depthwise convolution of {_size(layer)} and stride {layer.strides[0]}"
        wanted = layer.kernel_size[0] // 2
        if self._padding(node) != wanted:
            return f"is not padded by {wanted} on all sides (ZeroPadding2D({wanted}) before it would)"
        return ""

    def _padding(self, node: Node) -> int | None:
        """Return by how much a convolution is padded on every side, or `None` where sides differ."""
        layer = node.operation
        if layer.padding == "same":
            # With a stride, LiteRT leaves it to the kernel where to pad, which these kernels cannot.
            return layer.kernel_size[0] // 2 if {*layer.strides} == {1} else None
        before = self._graph.producer(node.inputs[0])
        return self._pads(before) if before is not None and before.kind == "ZeroPadding2D" else 0

    def _pads(self, node: Node) -> int | None:
        """Return by how much a padding layer pads on every side for the one convolution that reads it."""
        reader = self._graph.only_consumer(node.output)
        sides = {side for sides in node.operation.padding for side in sides}
        known = reader is not None and reader.kind in ("Conv2D", "DepthwiseConv2D") and len(sides) == 1
        return sides.pop() if known and reader.operation.padding == "valid" else None


def _reason_itself(node: Node) -> str | None:
    """Return why a layer is none that sparse kernels are for, whatever stands around it."""
    layer = node.operation
    if not isinstance(layer, keras.layers.Conv2D):
        return f"is {_article(node.kind)} {node.kind}; sparse kernels are for 1x1 convolutions"
    if not _is_pointwise(layer):
        return f"is a convolution of {_size(layer)} and stride {layer.strides[0]}, not of 1x1 and stride 1"
    if layer.groups != 1 or (common := _format_problem(layer) or _activation_problem(layer)):
        return "has groups" if layer.groups != 1 else common
    return None


def _is_pointwise(layer: keras.layers.Conv2D) -> bool:
    return {*layer.kernel_size} == {1} and {*layer.strides} == {1}


def _enters(node: Node) -> bool:
    """Return whether a call is of the kind that a part begins with."""
    if node.kind != "Conv2D":
        return False
    layer = node.operation
    return {*layer.kernel_size} == {3} and {*layer.strides} == {2} and layer.kernel.shape[2] == 3


def _leaves(node: Node) -> bool:
    return node.kind == "GlobalAveragePooling2D"


def _elementwise_problem(node: Node) -> str:
    operation, kind = node.operation, node.kind
    if any(len(tensor.shape) != 4 for tensor in node.inputs):
        return f"is {_article(kind)} {kind} of tensors that are not 4-D"
    if kind in _MERGING:
        return "" if len(node.inputs) > 1 else f"is {_article(kind)} {kind} of a constant"
    if kind == "Activation":
        return _activation_problem(operation)
    return f"is {_article(kind)} {kind} that takes several operators in LiteRT" if _is_compound(operation) else ""


def _is_compound(operation: keras.Operation) -> bool:
    """Return whether an activation that is a layer or an operation has options for which LiteRT has no operator."""
    if isinstance(operation, keras.layers.ReLU):
        bound = operation.max_value
        return bool(operation.threshold or bound not in (None, 6) or (bound and operation.negative_slope))
    return type(operation).__name__ in ("ELU", "Elu") and operation.alpha != 1


def _is_linear(layer: keras.Layer) -> bool:
    return keras.activations.serialize(layer.activation) == "linear"


def _activation_problem(layer: keras.Layer) -> str:
    name = keras.activations.serialize(layer.activation)
    return "" if name in _ACTIVATIONS else f"has the activation {name if isinstance(name, str) else 'of a class'}"


def _format_problem(layer: keras.Layer) -> str:
    return "" if layer.data_format == "channels_last" else f"has data_format={layer.data_format!r}"


def _size(layer: keras.Layer) -> str:
    return "x".join(map(str, layer.kernel_size))


def _article(word: str) -> str:
    return "an" if word[:1] in "AEIOU" else "a"
