"""Which activation ends each output of a model: `softmax`, `sigmoid` or `linear`.

The answer is read from the model's own config, walking back from the output through layers that only pass
values on, so shared layers and nested models are followed. Where the config does not tell (subclassed
models, custom layers), it is read off the outputs for a few samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_PASS_ON = {
    "AlphaDropout", "Cast", "Cropping1D", "Cropping2D", "Cropping3D", "Dropout", "Flatten", "GaussianDropout",
    "GaussianNoise", "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D", "Identity",
    "Permute", "Reshape", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "Squeeze",
}  # fmt: skip
_ACTIVATION_LAYERS = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
_UNBOUNDED_LAYERS = {
    "Add",
    "Subtract",
    "BatchNormalization",
    "LayerNormalization",
    "Rescaling",
    "Normalization",
}


def model_outputs(model: Any) -> tuple[dict[str, Any] | None, bool]:
    """Return the output tensors of `model` by name, in Keras' order, and whether the model returns a dict.

    The tensors are `None` for a model without symbolic outputs, such as a subclassed one.
    """
    if not getattr(model, "outputs", None):
        return None, False
    tensors = list(model.outputs)
    structure = _config(model).get("output_layers")
    keyed = isinstance(structure, dict) and len(structure) == len(tensors)
    names = sorted(structure) if keyed else list(getattr(model, "output_names", None) or [])
    if len(set(names)) != len(tensors):  # one layer that is an output twice
        names = [f"output_{index}" for index in range(len(tensors))]
    return dict(zip(names, tensors, strict=True)), keyed


def find_activations(model: Any) -> list[str | None]:
    """Return per output `"softmax"`, `"sigmoid"`, `"linear"`, or `None` where the config does not tell."""
    count = len(model.outputs) if getattr(model, "outputs", None) else 1
    try:
        return [_model_activation(_config(model), index) for index in range(count)]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        return [None] * count  # a config of the user's own making; the outputs will tell


def probe_activation(outputs: np.ndarray) -> str:
    """Return the activation that `outputs` `(samples, ...)` look like they come from."""
    values = np.asarray(outputs, np.float64)
    if values.size == 0 or not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        return "linear"
    # Each value of an 8-bit softmax is off by up to 1/512.
    slack = min(0.1, max(1e-2, values.shape[-1] / 512))
    if values.shape[-1] > 1 and np.allclose(values.sum(-1), 1, atol=slack):
        return "softmax"
    return "sigmoid"


def _config(model: Any) -> dict[str, Any]:
    try:
        return model.get_config()
    except Exception:  # user code runs here; what it does not tell is found in other ways
        return {}


def _model_activation(config: dict[str, Any], output_index: int) -> str | None:
    """Return the activation of one output of the model that `config` describes."""
    layers = config["layers"]
    if "output_layers" not in config:  # Sequential
        for layer in reversed(layers):
            found = _layer_activation(layer, 0)
            if found != "pass on":
                return found
        return None
    by_name = {layer["config"].get("name", layer.get("name")): layer for layer in layers}
    name, node_index, tensor_index = _references(config["output_layers"])[output_index]
    while name in by_name:
        layer = by_name[name]
        found = _layer_activation(layer, tensor_index)
        if found != "pass on":
            return found
        nodes = layer.get("inbound_nodes", [])
        sources = _references(nodes[node_index]) if node_index < len(nodes) else []
        if len(sources) != 1:
            return None
        name, node_index, tensor_index = sources[0]
    return None


def _layer_activation(layer: dict[str, Any], tensor_index: int) -> str | None:
    """Return the activation of one serialised layer, `"pass on"` if it has none, `None` if unknown."""
    kind, config = layer["class_name"], layer["config"]
    if kind == "InputLayer":
        return None
    if "layers" in config:
        return _model_activation(config, tensor_index)
    if kind == "TimeDistributed":
        return _layer_activation(config["layer"], tensor_index)
    if kind in _ACTIVATION_LAYERS:
        return _ACTIVATION_LAYERS[kind]
    if kind in _PASS_ON or (kind == "Activation" and config.get("activation") == "linear"):
        return "pass on"
    if kind in _UNBOUNDED_LAYERS:
        return "linear"
    activation = config.get("activation", "")
    if isinstance(activation, dict):  # a custom function
        activation = activation.get("config", "")
    if activation == "":
        return None
    return activation if activation in ("softmax", "sigmoid") else "linear"


def _references(node: Any) -> list[tuple[str, int, int]]:
    """Return every `(layer name, node index, tensor index)` inside a serialised structure, in order."""
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            return _references(node["config"]["keras_history"])
        return [found for key in sorted(node) for found in _references(node[key])]
    if isinstance(node, (list, tuple)):
        if len(node) == 3 and isinstance(node[0], str) and all(isinstance(part, int) for part in node[1:]):
            return [(node[0], node[1], node[2])]
        return [found for part in node for found in _references(part)]
    return []
