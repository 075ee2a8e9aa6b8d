"""What is known of each Keras layer type, in one table: one more layer is one more row.

`variables` are the layer's own weights in the order in which Keras stores them; `kernels` are those that
compression may change. Biases, norms and statistics never are. A layer that is not in the table is left as
it is and reported. Imports nothing, so that files can be inspected without a framework.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRule:
    """What is known of one layer type.

    Args:
        variables: names of its own variables in stored order; an optional bias comes last. `gamma` and
            `beta` are absent where the layer's options `scale` and `center` are false.
        kernels: the names among `variables` that compression may change.
        frozen: the names among `variables` that are never trained.
        aliases: the names among `variables` that are stored a second time inside the layer.
        children: attribute names of the layers inside it, with the class of each.
    """

    variables: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    children: tuple[tuple[str, str], ...] = ()


_DENSE = LayerRule(("kernel", "bias"), ("kernel",))
_SEPARABLE = LayerRule(("depthwise_kernel", "pointwise_kernel", "bias"), ("depthwise_kernel", "pointwise_kernel"))
_CELL = LayerRule(("kernel", "recurrent_kernel", "bias"), ("kernel", "recurrent_kernel"))
_NORM = LayerRule(("gamma", "beta"))
_ATTENTION = LayerRule(
    children=(
        ("query_dense", "EinsumDense"),
        ("key_dense", "EinsumDense"),
        ("value_dense", "EinsumDense"),
        ("gate_dense", "EinsumDense"),
        ("output_dense", "EinsumDense"),
    )
)
_MOVING = ("moving_mean", "moving_variance")
_STATISTICS = ("mean", "variance", "count")

LAYERS: dict[str, LayerRule] = {
    **dict.fromkeys(("Dense", "EinsumDense"), _DENSE),
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _DENSE),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _DENSE),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _DENSE),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _SEPARABLE),
    "Embedding": LayerRule(("embeddings",), ("embeddings",)),
    **dict.fromkeys(("SimpleRNNCell", "LSTMCell", "GRUCell", "ConvLSTMCell"), _CELL),
    "SimpleRNN": LayerRule(children=(("cell", "SimpleRNNCell"),)),
    "LSTM": LayerRule(children=(("cell", "LSTMCell"),)),
    "GRU": LayerRule(children=(("cell", "GRUCell"),)),
    **dict.fromkeys(("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), LayerRule(children=(("cell", "ConvLSTMCell"),))),
    # Wrappers: the class of what is inside stands in their configuration.
    **dict.fromkeys(("RNN", "StackedRNNCells", "Bidirectional", "TimeDistributed", "QuantizedLayer"), LayerRule()),
    "SpectralNormalization": LayerRule(("kernel", "vector_u"), frozen=("vector_u",), aliases=("kernel",)),
    **dict.fromkeys(("MultiHeadAttention", "GroupQueryAttention"), _ATTENTION),
    "BatchNormalization": LayerRule(("gamma", "beta", *_MOVING), frozen=_MOVING),
    **dict.fromkeys(("LayerNormalization", "GroupNormalization"), _NORM),
    "RMSNormalization": LayerRule(("scale",)),
    "UnitNormalization": LayerRule(),
    "Normalization": LayerRule(_STATISTICS, frozen=_STATISTICS),
    "PReLU": LayerRule(("alpha",)),
    # Quantizers: their variables are ranges, trained with `ranges="learned"` only.
    "FakeQuant": LayerRule(("minimum", "maximum", "seen"), frozen=("minimum", "maximum", "seen")),
    "SetMask": LayerRule(),
}

KERNEL_NAMES = frozenset(name for rule in LAYERS.values() for name in rule.kernels)
"""Every variable name that compression may change."""
