"""Output shapes of Keras layers from their saved options, for the places where a file does not state them.

Shapes include the batch axis; an unknown axis is `None`. Layers that are not in the table give `None`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

Shape = tuple[int | None, ...]
Options = dict[str, Any]

_ELEMENTWISE = frozenset((
    "Activation", "ActivityRegularization", "AlphaDropout", "BatchNormalization", "Dropout", "ELU",
    "GaussianDropout", "GaussianNoise", "GroupNormalization", "Identity", "LayerNormalization",
    "LeakyReLU", "Masking", "Normalization", "PReLU", "RMSNormalization", "ReLU", "Rescaling",
    "Softmax", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "UnitNormalization",
    "RandomBrightness", "RandomContrast", "RandomFlip", "RandomRotation", "RandomTranslation",
    "RandomZoom", "Relu", "Relu6", "Sigmoid", "Tanh", "Gelu", "Silu", "Negative", "Absolute", "Exp",
    "Log", "Sqrt", "Square",
))  # fmt: skip
_MERGES = frozenset(("Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Average", "Maximum", "Minimum"))


def infer_output(kind: str, options: Options, inputs: list[Shape]) -> Shape | None:
    """Return the shape that a layer gives, or `None` where that is not known.

    Args:
        kind: class name of the layer.
        options: its saved configuration.
        inputs: the shapes that it is called with.
    """
    if not inputs:
        return None
    try:
        if kind in _ELEMENTWISE:
            return inputs[0]
        if kind in _MERGES:
            return _broadcast(inputs)
        rule = _RULES.get(kind)
        return rule(options, inputs) if rule else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError):
        return None  # options of another Keras version, or damaged ones


def flat_size(shape: Shape) -> int | None:
    """Return the number of elements, or `None` if an axis is unknown."""
    return None if None in shape else prod(dim for dim in shape if dim is not None)


def channels_first(options: Options) -> bool:
    """Return whether the channel axis comes before the spatial axes."""
    return options.get("data_format") == "channels_first"


def spatial(shape: Shape, options: Options) -> Shape:
    """Return the spatial axes of an image-like shape."""
    return shape[2:] if channels_first(options) else shape[1:-1]


def _with_spatial(shape: Shape, options: Options, axes: Shape, channels: int | None) -> Shape:
    return (shape[0], channels, *axes) if channels_first(options) else (shape[0], *axes, channels)


def _channels(shape: Shape, options: Options) -> int | None:
    return shape[1] if channels_first(options) else shape[-1]


def as_tuple(value: Any, rank: int) -> tuple[Any, ...]:
    """Return an option that is given once or per axis as one value per axis."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * rank


def _slide(size: int | None, kernel: int, stride: int, padding: str, dilation: int = 1) -> int | None:
    """Return the length of an axis after a sliding window."""
    if size is None:
        return None
    if padding in ("same", "causal"):
        return -(-size // stride)
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def _convolve(options: Options, inputs: list[Shape]) -> Shape:
    axes = spatial(inputs[0], options)
    rank = len(axes)
    windows = zip(
        axes,
        as_tuple(options["kernel_size"], rank),
        as_tuple(options.get("strides", 1), rank),
        as_tuple(options.get("dilation_rate", 1), rank),
        strict=True,
    )
    padding = options["padding"]
    out = tuple(_slide(size, kernel, stride, padding, dilation) for size, kernel, stride, dilation in windows)
    channels = options.get("filters")
    if channels is None:  # depthwise
        channels = (_channels(inputs[0], options) or 0) * options["depth_multiplier"] or None
    return _with_spatial(inputs[0], options, out, channels)


def _transpose_convolve(options: Options, inputs: list[Shape]) -> Shape | None:
    axes = spatial(inputs[0], options)
    rank = len(axes)
    extra = options.get("output_padding")
    if extra is not None or any(rate != 1 for rate in as_tuple(options.get("dilation_rate", 1), rank)):
        return None
    out: list[int | None] = []
    for size, kernel, stride in zip(
        axes, as_tuple(options["kernel_size"], rank), as_tuple(options["strides"], rank), strict=True
    ):
        grown = 0 if options["padding"] == "same" else max(kernel - stride, 0)
        out.append(None if size is None else size * stride + grown)
    return _with_spatial(inputs[0], options, tuple(out), options["filters"])


def _pool(options: Options, inputs: list[Shape]) -> Shape:
    axes = spatial(inputs[0], options)
    sizes = as_tuple(options["pool_size"], len(axes))
    strides = as_tuple(options.get("strides") or sizes, len(axes))
    padding = options.get("padding", "valid")
    out = tuple(_slide(size, pool, step, padding) for size, pool, step in zip(axes, sizes, strides, strict=True))
    return _with_spatial(inputs[0], options, out, _channels(inputs[0], options))


def _pool_globally(options: Options, inputs: list[Shape]) -> Shape:
    ones: Shape = (1,) * len(spatial(inputs[0], options)) if options.get("keepdims") else ()
    return _with_spatial(inputs[0], options, ones, _channels(inputs[0], options))


def _resize(factor: int) -> Callable[[Options, list[Shape]], Shape]:
    """Return the rule of padding (`factor` +1) or cropping (-1)."""

    def rule(options: Options, inputs: list[Shape]) -> Shape:
        axes = spatial(inputs[0], options)
        amounts = options["padding" if factor > 0 else "cropping"]
        pairs = [amounts] if len(axes) == 1 else amounts
        out = tuple(
            None if size is None else size + factor * sum(as_tuple(pair, 2))
            for size, pair in zip(axes, pairs, strict=True)
        )
        return _with_spatial(inputs[0], options, out, _channels(inputs[0], options))

    return rule


def _upsample(options: Options, inputs: list[Shape]) -> Shape:
    axes = spatial(inputs[0], options)
    factors = as_tuple(options["size"], len(axes))
    out = tuple(None if size is None else size * factor for size, factor in zip(axes, factors, strict=True))
    return _with_spatial(inputs[0], options, out, _channels(inputs[0], options))


def _flatten(options: Options, inputs: list[Shape]) -> Shape:
    return (inputs[0][0], flat_size(inputs[0][1:]))


def _reshape(options: Options, inputs: list[Shape]) -> Shape:
    target = list(options["target_shape"])
    total = flat_size(inputs[0][1:])
    if -1 in target:
        known = prod(dim for dim in target if dim != -1)
        target[target.index(-1)] = None if total is None else total // known
    return (inputs[0][0], *target)


def _concatenate(options: Options, inputs: list[Shape]) -> Shape:
    axis = options.get("axis", -1) % len(inputs[0])
    sizes = [shape[axis] for shape in inputs]
    joined = None if None in sizes else sum(size for size in sizes if size is not None)
    return (*inputs[0][:axis], joined, *inputs[0][axis + 1 :])


def _recur(options: Options, inputs: list[Shape]) -> Shape | None:
    if options.get("return_state") or "units" not in options:
        return None
    steps: Shape = (inputs[0][1],) if options.get("return_sequences") else ()
    return (inputs[0][0], *steps, options["units"])


def _both_directions(options: Options, inputs: list[Shape]) -> Shape | None:
    inner = options["layer"]
    out = infer_output(inner["class_name"], inner["config"], inputs)
    if out is None or out[-1] is None or options.get("merge_mode") is None:
        return None
    return (*out[:-1], out[-1] * (2 if options["merge_mode"] == "concat" else 1))


def _each_step(options: Options, inputs: list[Shape]) -> Shape | None:
    inner = options["layer"]
    out = infer_output(inner["class_name"], inner["config"], [(inputs[0][0], *inputs[0][2:])])
    return None if out is None else (out[0], inputs[0][1], *out[1:])


def _broadcast(inputs: list[Shape]) -> Shape:
    rank = max(len(shape) for shape in inputs)
    padded = [(1,) * (rank - len(shape)) + shape for shape in inputs]
    out: list[int | None] = []
    for dims in zip(*padded, strict=True):
        wide = [dim for dim in dims if dim != 1]
        out.append(next((dim for dim in wide if dim is not None), None) if wide else 1)
    return tuple(out)


def _project(options: Options, inputs: list[Shape]) -> Shape:
    return (*inputs[0][:-1], options["units"])


def _embed(options: Options, inputs: list[Shape]) -> Shape:
    return (*inputs[0], options["output_dim"])


def _attend(options: Options, inputs: list[Shape]) -> Shape | None:
    return inputs[0] if options.get("output_shape") is None else None


def _einsum(options: Options, inputs: list[Shape]) -> Shape:
    given = as_tuple(options["output_shape"], 1)
    lead = len(options["equation"].rpartition("->")[2].replace("...", "")) - len(given)
    if "..." in options["equation"]:
        lead = len(inputs[0]) - len(given)
    return (*inputs[0][:lead], *given)


_RULES: dict[str, Callable[[Options, list[Shape]], Shape | None]] = {
    "Dense": _project,
    "EinsumDense": _einsum,
    "Embedding": _embed,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D", "SeparableConv1D", "SeparableConv2D"), _convolve),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _convolve),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _transpose_convolve),
    **{f"{kind}Pooling{rank}D": _pool for kind in ("Max", "Average") for rank in (1, 2, 3)},
    **{f"Global{kind}Pooling{rank}D": _pool_globally for kind in ("Max", "Average") for rank in (1, 2, 3)},
    **{f"ZeroPadding{rank}D": _resize(1) for rank in (1, 2, 3)},
    **{f"Cropping{rank}D": _resize(-1) for rank in (1, 2, 3)},
    **{f"UpSampling{rank}D": _upsample for rank in (1, 2, 3)},
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": lambda options, inputs: (inputs[0][0], *(inputs[0][axis] for axis in options["dims"])),
    "RepeatVector": lambda options, inputs: (inputs[0][0], options["n"], inputs[0][1]),
    "Concatenate": _concatenate,
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN"), _recur),
    "Bidirectional": _both_directions,
    "TimeDistributed": _each_step,
    **dict.fromkeys(("MultiHeadAttention", "GroupQueryAttention", "Attention"), _attend),
    **dict.fromkeys(("FakeQuant", "SetMask"), lambda options, inputs: inputs[0]),
    **dict.fromkeys(
        ("SpectralNormalization", "QuantizedLayer"),
        lambda options, inputs: infer_output(options["layer"]["class_name"], options["layer"]["config"], inputs),
    ),
}
