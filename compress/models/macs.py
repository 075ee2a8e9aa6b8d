"""Multiply-accumulate operations of Keras layers for one sample, from saved options, shapes and kernels.

Biases, activations, norms, pooling and look-ups count as zero, as in the usual published numbers. A layer
without a formula, or with an axis of unknown length, gives `None`: a partial sum is said to be one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from compress.models.layer_table import LAYERS
from compress.models.shapes import Options, Shape, flat_size, infer_output, spatial

_COSTLY_WITHOUT_WEIGHTS = frozenset((
    "AdditiveAttention", "Cholesky", "Conv", "ConvTranspose", "Correlate", "Cross", "DepthwiseConv",
    "Det", "Dot", "DotProductAttention", "Einsum", "Eigh", "FFT", "FFT2", "IFFT2", "IRFFT", "Inner",
    "Inv", "Kron", "Lambda", "LstSq", "MelSpectrogram", "Matmul", "Norm", "Outer", "QR", "RFFT", "STFT",
    "STFTSpectrogram", "SVD", "SeparableConv", "Solve", "SolveTriangular", "TFSMLayer", "Tensordot",
    "Vdot",
))  # fmt: skip


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Args:
        kind: class name.
        options: its saved configuration.
        inputs: the shapes that it receives, batch axis included.
        kernels: path inside the layer and shape of each kernel, such as `("query/kernel", (8, 2, 4))`.
        has_weights: whether anything is stored for it.
        is_keras: whether the class is Keras' own.
    """

    kind: str
    options: Options
    inputs: list[Shape]
    kernels: tuple[tuple[str, tuple[int, ...]], ...] = ()
    has_weights: bool = False
    is_keras: bool = True


def count_macs(call: LayerCall) -> int | None:
    """Return the multiply-accumulates of one call for batch 1, or `None` if unknown."""
    rule = _RULES.get(call.kind)
    try:
        if rule:
            return rule(call)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None  # options of another Keras version, or damaged ones
    if not call.is_keras or call.kind in _COSTLY_WITHOUT_WEIGHTS:
        return None
    return None if call.has_weights and call.kind not in LAYERS else 0


def has_formula(kind: str) -> bool:
    """Return whether layers of this class can be counted, given shapes and weights."""
    return kind in _RULES


def _kernel_size(call: LayerCall) -> int | None:
    """Return the elements of all kernels; none stored means that they are not known, unless packed (int4)."""
    policy = call.options.get("dtype")
    packed = isinstance(policy, dict) and "int4" in str(policy).lower()
    return sum(prod(shape) for _, shape in call.kernels) if call.kernels and not packed else None


def _times(*factors: int | None) -> int | None:
    return None if None in factors else prod(factor for factor in factors if factor is not None)


def _per_position(call: LayerCall) -> int | None:
    """Dense: every position but the last axis uses the whole kernel."""
    return _times(flat_size(call.inputs[0][1:-1]), _kernel_size(call))


def _per_output(call: LayerCall) -> int | None:
    """Convolution: every output position uses the whole kernel; grouped kernels are stored without zeros."""
    output = infer_output(call.kind, call.options, call.inputs)
    return None if output is None else _times(flat_size(spatial(output, call.options)), _kernel_size(call))


def _per_input(call: LayerCall) -> int | None:
    """Transposed convolution: every input position uses the whole kernel."""
    return _times(flat_size(spatial(call.inputs[0], call.options)), _kernel_size(call))


def _einsum(call: LayerCall) -> int | None:
    """Every index of the equation once: kernel elements times the input axes that it does not share."""
    left, _, _ = call.options["equation"].replace(" ", "").partition("->")
    data, _, kernel = left.partition(",")
    letters = data.replace("...", "")
    shape = call.inputs[0]
    if data.startswith("..."):
        lead, tail = shape[: len(shape) - len(letters)], shape[len(shape) - len(letters) :]
    else:
        lead, tail = (), shape
    free = [dim for letter, dim in zip(letters, tail, strict=True) if letter not in kernel]
    axes = (*lead, *free)[1:]  # without the batch
    return _times(flat_size(axes), _kernel_size(call))


def _recurrent(call: LayerCall) -> int | None:
    """Every step uses every kernel of the cell."""
    return _times(call.inputs[0][1], _kernel_size(call))


def _convolutional_recurrent(call: LayerCall) -> int | None:
    """Every step convolves the input and the state, both at the output's resolution."""
    frame = (call.inputs[0][0], *call.inputs[0][2:])
    rank = call.kind[-2:]
    output = infer_output(f"Conv{rank}", call.options, [frame])
    if output is None:
        return None
    return _times(call.inputs[0][1], flat_size(spatial(output, call.options)), _kernel_size(call))


def _attention(call: LayerCall) -> int | None:
    """Four projections, then scores and mixtures: `T * S * heads * (key_dim + value_dim)`."""
    options, query = call.options, call.inputs[0]
    value = call.inputs[1] if len(call.inputs) > 1 else query
    heads = options.get("num_heads") or options["num_query_heads"]
    key_dim = options.get("key_dim") or options["head_dim"]
    value_dim = options.get("value_dim") or key_dim
    if _kernel_size(call) is None:
        return None
    total: int | None = 0
    for path, shape in call.kernels:
        source = value if path.startswith(("key", "value")) else query
        part = _times(flat_size(source[1:-1]), prod(shape))
        total = None if total is None or part is None else total + part
    axes = options.get("attention_axes") or list(range(1, len(query) - 1))
    attended_query = flat_size(tuple(query[axis] for axis in axes))
    attended_value = flat_size(tuple(value[axis] for axis in axes))
    rest = flat_size(tuple(dim for axis, dim in enumerate(query[:-1]) if axis and axis not in axes))
    scores = _times(rest, attended_query, attended_value, heads * (key_dim + value_dim))
    return None if total is None or scores is None else total + scores


def _dot_attention(call: LayerCall) -> int | None:
    query, value = call.inputs[0], call.inputs[1]
    if query[-1] is None or value[-1] is None:
        return None
    return _times(flat_size(query[1:-1]), value[-2], query[-1] + value[-1])


def _inner(options: Options, call: LayerCall, inputs: list[Shape]) -> int | None:
    """Count the wrapped layer, with the kernels of the wrapper."""
    wrapped = options["layer"]
    return count_macs(LayerCall(wrapped["class_name"], wrapped["config"], inputs, call.kernels, call.has_weights))


def _wrapped(call: LayerCall) -> int | None:
    return _inner(call.options, call, call.inputs)


def _each_step(call: LayerCall) -> int | None:
    frame = (call.inputs[0][0], *call.inputs[0][2:])
    return _times(call.inputs[0][1], _inner(call.options, call, [frame]))


def _nothing(call: LayerCall) -> int:
    return 0


_RULES: dict[str, Callable[[LayerCall], Any]] = {
    "Dense": _per_position,
    "EinsumDense": _einsum,
    "Embedding": _nothing,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D"), _per_output),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _per_output),  # both stages give the output's positions
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _per_input),
    **dict.fromkeys(("SimpleRNN", "LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), _convolutional_recurrent),
    **dict.fromkeys(("MultiHeadAttention", "GroupQueryAttention"), _attention),
    "Attention": _dot_attention,
    **dict.fromkeys(("Bidirectional", "SpectralNormalization", "QuantizedLayer"), _wrapped),
    "TimeDistributed": _each_step,
    **dict.fromkeys(("FakeQuant", "SetMask"), _nothing),
}
