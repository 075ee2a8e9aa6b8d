"""The layers that Keras 2 and Keras 3 both have, and how the options of one say what those of the other do: one table.

A layer that is not in the table does not cross. An option without a counterpart is left out where it changes nothing,
and is an error that names it otherwise. Initializers are left out: the weights are there already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import ModelError
from compress.legacy.gates import HARD_SIGMOID

LAYERS = frozenset((
    "Activation", "ActivityRegularization", "Add", "AdditiveAttention", "AlphaDropout", "Attention", "Average",
    "AveragePooling1D", "AveragePooling2D", "AveragePooling3D", "BatchNormalization", "Bidirectional",
    "CategoryEncoding", "CenterCrop", "Concatenate", "Conv1D", "Conv1DTranspose", "Conv2D", "Conv2DTranspose", "Conv3D",
    "Conv3DTranspose", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "Cropping1D", "Cropping2D", "Cropping3D", "Dense",
    "DepthwiseConv1D", "DepthwiseConv2D", "Dot", "Dropout", "ELU", "EinsumDense", "Embedding", "Flatten", "GRU",
    "GRUCell", "GaussianDropout", "GaussianNoise", "GlobalAveragePooling1D", "GlobalAveragePooling2D",
    "GlobalAveragePooling3D", "GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D", "GroupNormalization",
    "Identity", "LSTM", "LSTMCell", "LayerNormalization", "LeakyReLU", "Masking", "MaxPooling1D", "MaxPooling2D",
    "MaxPooling3D", "Maximum", "Minimum", "MultiHeadAttention", "Multiply", "Normalization", "PReLU", "Permute", "RNN",
    "RandomBrightness", "RandomContrast", "RandomCrop", "RandomFlip", "RandomRotation", "RandomTranslation",
    "RandomZoom", "ReLU", "RepeatVector", "Rescaling", "Reshape", "Resizing", "SeparableConv1D", "SeparableConv2D",
    "SimpleRNN", "SimpleRNNCell", "Softmax", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D",
    "StackedRNNCells", "Subtract", "TimeDistributed", "UnitNormalization", "UpSampling1D", "UpSampling2D",
    "UpSampling3D", "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D",
))  # fmt: skip
"""Classes that both have under the same name."""

RECURRENT = frozenset(("RNN", "LSTM", "GRU", "SimpleRNN", "Bidirectional", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"))

_RECURRENT_EXTRAS = {"zero_output_for_mask"}  # both take it, one among its keyword arguments

_RENAMED_CLASSES = {
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "SyncBatchNormalization": "BatchNormalization",
    "LSTMV2": "LSTM",
    "GRUV2": "GRU",
}
_TO_KERAS3 = {"LeakyReLU": {"alpha": "negative_slope"}}
_TO_KERAS2 = {"LeakyReLU": {"negative_slope": "alpha"}}
_WITHOUT_EFFECT = frozenset((
    "adjustment", "autocast", "batch_input_shape", "batch_shape", "build_input_shape", "dynamic", "flash_attention",
    "fused", "implementation", "input_dim", "input_length", "input_shape", "key_shape", "query_shape", "quantization",
    "force_generator", "renorm_clipping", "renorm_momentum", "rng_type", "robust_masking", "softmax_robust_masking",
    "use_cudnn", "value_shape",
))  # fmt: skip
"""Options that say how to compute, or what is known already, and not what comes out."""
_NEUTRAL = {
    "groups": 1,
    "data_format": "channels_last",
    "fill_mode": "constant",
    "score_mode": "dot",
    "value_range": (0, 255),
}
"""Values of options which a layer without the option has."""
_KERAS2_ACTIVATIONS = frozenset((
    "elu", "exponential", "gelu", "linear", "mish", "relu", "selu", "sigmoid", "softmax", "softplus", "softsign",
    "swish", "tanh",
))  # fmt: skip
_KERAS3_ACTIVATIONS = _KERAS2_ACTIVATIONS | {"leaky_relu", "log_softmax", "relu6", "silu"}


class NoTwin(ModelError):
    """A layer or option that has no counterpart."""


@dataclass(frozen=True)
class Dialect:
    """One of the two: where its classes are, and what it calls things.

    Args:
        keras: the package, `keras` or `tf_keras`.
        options: names of options by class, as the other calls them.
        activations: the names of activations that mean the same in both.
        renamed_activations: names of activations, as the other calls them.
        gates: the names of activations that recurrent gates may have besides, as their weights take the difference.
        name: what errors call it.
    """

    keras: Any
    options: Mapping[str, Mapping[str, str]]
    activations: frozenset[str]
    renamed_activations: Mapping[str, str]
    gates: frozenset[str]
    name: str


def keras3() -> Dialect:
    """Return the dialect of Keras 3."""
    import keras

    return Dialect(keras, _TO_KERAS3, _KERAS3_ACTIVATIONS, {"swish": "silu"}, frozenset((HARD_SIGMOID,)), "Keras 3")


def keras2() -> Dialect:
    """Return the dialect of tf_keras, which is imported."""
    import tf_keras

    return Dialect(tf_keras, _TO_KERAS2, _KERAS2_ACTIVATIONS, {"silu": "swish"}, frozenset(), "Keras 2")


def translate_layer(
    kind: str,
    config: Mapping[str, Any],
    target: Dialect,
    custom: Callable[[Mapping[str, Any]], Any] | None = None,
    without_activation: bool = False,
) -> Any:
    """Return a layer of `target` that computes what the serialised one of the other does, not yet built.

    Args:
        kind: its class.
        config: what its `get_config` returned.
        target: what to translate to.
        custom: makes a layer from a node of a class that is in neither; by default such a layer does not cross.
        without_activation: leave out the activation, which is made by itself.

    Raises:
        NoTwin: the layer or an option has no counterpart; the message names both.
    """
    kind = _RENAMED_CLASSES.get(kind, kind)
    name = str(config.get("name", kind))[:60]
    if kind not in LAYERS:
        raise NoTwin(f"{name!r} is a {kind[:60]}, which {target.name} does not have.")
    cls = getattr(target.keras.layers, kind)
    accepted = _options_of(cls) | (_RECURRENT_EXTRAS if kind in RECURRENT else set())
    given = {}
    for key, value in config.items():
        option = target.options.get(kind, {}).get(key, key)
        if key.endswith("_initializer") or (key == "activation" and without_activation):
            continue
        if kind == "Embedding" and key == "dtype" and "int" in str(_dtype(value)):
            continue  # early releases noted the dtype of the indices here
        if option not in accepted:
            same = _NEUTRAL.get(key) == (tuple(value) if isinstance(value, list) else value)
            if key in _WITHOUT_EFFECT or key == "trainable" or not value or same:
                continue
            raise NoTwin(f"{name!r}: {kind} in {target.name} has no option {key}. Received: {str(value)[:80]}")
        given[option] = _translate_value(key, value, target, custom, name)
    if kind == "BatchNormalization" and isinstance(given.get("axis"), (list, tuple)):
        if len(given["axis"]) != 1:
            raise NoTwin(f"{name!r}: BatchNormalization in {target.name} has one axis. Received: {given['axis']}")
        given["axis"] = given["axis"][0]
    if isinstance(given.get("name"), str):
        given["name"] = given["name"].replace("/", "_")
    try:
        layer = cls(**given)
        layer.trainable = bool(config.get("trainable", True))
        return layer
    except Exception as error:  # options of the wrong type; each constructor raises what it likes
        raise NoTwin(
            f"{name!r}: {target.name} cannot make this {kind}: {' '.join(str(error).split())[:200]}"
        ) from error


def activation_name(value: Any) -> str:
    """Return the name of a serialised activation; what tfmot put around it is taken off."""
    while isinstance(value, dict):
        inner = value.get("config")
        if value.get("class_name") == "NoOpActivation":
            return "linear"
        value = inner.get("activation") if isinstance(inner, dict) else inner if inner is not None else "linear"
    return "linear" if value is None else str(value)


def _translate_value(
    key: str, value: Any, target: Dialect, custom: Callable[[Mapping[str, Any]], Any] | None, name: str
) -> Any:
    if key == "recurrent_activation" and activation_name(value) in target.gates:
        return activation_name(value)
    if key.endswith("activation"):
        return translate_activation(value, target, name)
    if key == "dtype":
        return _dtype(value)
    if key.endswith("_regularizer"):
        return _penalty(value, target.keras.regularizers, target.keras.regularizers.Regularizer, name)
    if key.endswith("_constraint"):
        return _penalty(value, target.keras.constraints, target.keras.constraints.Constraint, name)
    if isinstance(value, dict) and "class_name" in value:
        return _nested(value, target, custom)
    if isinstance(value, list) and value and all(isinstance(item, dict) and "class_name" in item for item in value):
        return [_nested(item, target, custom) for item in value]
    return value


def _nested(node: Mapping[str, Any], target: Dialect, custom: Callable[[Mapping[str, Any]], Any] | None) -> Any:
    """Return a layer that another one holds, such as a cell."""
    kind, config = str(node["class_name"]), node.get("config")
    if kind in ("Functional", "Sequential", "Model"):
        raise NoTwin(f"a {kind} model inside a layer does not cross.")
    if custom is not None and kind not in LAYERS and kind not in _RENAMED_CLASSES:
        return custom(node)
    return translate_layer(kind, config if isinstance(config, dict) else {}, target, custom)


def translate_activation(value: Any, target: Dialect, name: str) -> str:
    """Return what `target` calls a serialised activation.

    Raises:
        NoTwin: it has none that computes the same; `hard_sigmoid` is the name of two functions.
    """
    known = activation_name(value)
    known = target.renamed_activations.get(known, known)
    if known not in target.activations:
        other = " (its hard_sigmoid computes something else)" if known == HARD_SIGMOID else ""
        raise NoTwin(
            f"{name!r}: {target.name} has no activation {known[:60]!r}{other}.",
            "It is a function whose code no file holds: in Keras 2, put a layer that computes it in its place."
            if "lambda" in known
            else None,
        )
    return known


def _dtype(value: Any) -> Any:
    """Return the name of a dtype policy."""
    if isinstance(value, dict):
        inner = value.get("config")
        value = inner.get("name") if isinstance(inner, dict) else None
    return value if isinstance(value, str) else None


def _penalty(value: Any, module: Any, base: type, name: str) -> Any:
    """Return a regularizer or constraint, made from its class and plain numbers."""
    if value is None:
        return None
    kind, config = (value, {}) if isinstance(value, str) else (value.get("class_name"), value.get("config") or {})
    cls = getattr(module, kind, None) if isinstance(kind, str) and kind.isidentifier() else None
    plain = isinstance(config, dict) and all(not isinstance(item, dict) for item in config.values())
    if isinstance(value, str) and plain and value in ("l1", "l2"):
        return module.get(value)
    if not (inspect.isclass(cls) and issubclass(cls, base) and plain):
        raise NoTwin(f"{name!r} has the regularizer or constraint {str(kind)[:60]!r}, which is not known.")
    return cls(**config)


def _options_of(cls: type) -> set[str]:
    """Return the options that the constructors of a layer accept."""
    found: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters
            found |= set(parameters)
            if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                break
    return (
        found
        - {"self", "args", "kwargs", "autocast", "dynamic", "weights", "implementation", "input_shape"}
        - set(_INTERNAL)
    )


_INTERNAL = ("conv_op", "pool_function", "pool_mode", "pool_dimensions", "force_generator", "rng_type")
