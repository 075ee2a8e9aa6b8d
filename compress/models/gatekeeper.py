"""What a model file may name and ask for: known classes, sizes that its weights account for, finite weights.

An allow-list, because lists of known attacks are never complete; nothing is imported to decide. The attacks
it must withstand are those of CVE-2024-3660, CVE-2025-1550, CVE-2025-8747, CVE-2025-9906, CVE-2025-12058
and CVE-2026-1462.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ModelError

if TYPE_CHECKING:
    from compress.models.weight_store import WeightGroup

_KERAS_CLASSES = frozenset((
    "DTypePolicy", "FloatDTypePolicy", "Functional", "Initializer", "InputSpec", "Layer", "Loss",
    "Metric", "Model", "Operation", "Optimizer", "Quantizer", "Regularizer", "Sequential",
))  # fmt: skip
_KERAS_MODULES = frozenset((
    "keras.activations", "keras.constraints", "keras.distillation", "keras.dtype_policies",
    "keras.initializers", "keras.layers", "keras.losses", "keras.metrics", "keras.models", "keras.ops",
    "keras.optimizers", "keras.optimizers.legacy", "keras.optimizers.schedules", "keras.quantizers",
    "keras.random", "keras.regularizers", "keras.src.models.functional", "keras.src.models.model",
    "keras.src.models.sequential",
))  # fmt: skip
_KERAS_PACKAGES = (
    "keras.src.ops.",
    "keras.src.layers.",
    "keras.src.applications.",
)  # parts without a public name
OWN_CLASSES = {
    "FakeQuant": "compress.quantization.layers",
    "QuantizedLayer": "compress.quantization.layers",
    "SetMask": "compress.models.masks",
}
"""Our own layers, which a file may name: they run no code of the file. Class -> module that registers it."""
_TORCH_OPTIMIZERS = frozenset(("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "Nadam", "RMSprop", "SGD"))
_PLAIN_VALUES = frozenset(("__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__"))
_RUNS_CODE = {
    "Lambda": "Replace it by a layer such as Activation or Rescaling, or by keras.ops in a functional model.",
    "TFSMLayer": "Save the model that it wraps as .keras.",
    "TorchModuleWrapper": "Rebuild the module from Keras layers.",
    "JaxLayer": "Rebuild it from Keras layers.",
    "FlaxLayer": "Rebuild it from Keras layers.",
    "__lambda__": "Replace the lambda by a named function of keras.activations, or by a layer.",
    "__typespec__": None,
}
_NOT_FUNCTIONS = frozenset(("get", "serialize", "deserialize", *dir(builtins)))
_SIZE_FACTOR = 1.1
_SIZE_SLACK = 1_000_000
_MAX_INPUT_ELEMENTS = 1 << 31
_CHANNELS_FIRST = "channels_first"
_NORMS = frozenset(
    (
        "BatchNormalization",
        "LayerNormalization",
        "GroupNormalization",
        "RMSNormalization",
        "Normalization",
        "PReLU",
    )
)


def check_classes(config: dict[str, Any], allow_imports: tuple[str, ...] = ()) -> None:
    """Raise ModelError for the first object in `config` that is neither Keras' own nor allowed."""
    for node, where in _objects(config, "the model"):
        if problem := _find_unsafe(node, where):
            raise problem
        if _is_keras(node):
            continue
        _name, packages = describe_custom(node)
        if not set(packages) & set(allow_imports):
            raise refuse_custom(node, where)


def custom_classes(config: dict[str, Any]) -> list[str]:
    """Return the names of all classes and functions in `config` that are not Keras' own, sorted."""
    found = {describe_custom(node)[0] for node, _ in _objects(config, "") if not _is_keras(node)}
    return sorted(found | {node["class_name"] for node, _ in _objects(config, "") if node["class_name"] in _RUNS_CODE})


def describe_custom(node: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the full name of a serialised object and the packages, any of which vouches for it.

    The package that defines it comes before the one that it was registered under.
    """
    module, registered = node.get("module"), node.get("registered_name")
    name = str(node.get("config") if node["class_name"] == "function" else node["class_name"])
    registered = name if node["class_name"] == "function" else registered
    is_registered = isinstance(registered, str) and ">" in registered
    packages = [registered.partition(">")[0]] if is_registered else []
    if isinstance(module, str) and module.partition(".")[0] not in ("keras", "builtins"):
        return f"{module}.{name}"[:120], [module.partition(".")[0], *packages]
    if is_registered:
        return registered[:120], packages
    if module is None:
        return name[:120], ["__main__"]
    return f"{module}.{name}"[:120], packages


def is_keras_object(class_name: str, module: str | None) -> bool:
    """Return whether a class of this name and module is part of Keras and runs no code of the file."""
    return class_name not in _RUNS_CODE and _is_keras({"class_name": class_name, "module": module})


def is_torch_optimizer(class_name: str, module: Any) -> bool:
    """Return whether this is what Keras calls one of its own optimizers in files saved on its PyTorch backend."""
    return (
        class_name in _TORCH_OPTIMIZERS and module == f"keras.src.backend.torch.optimizers.torch_{class_name.lower()}"
    )


class SizeLimit:
    """Counts the weights that layers ask for, up to what is stored: Keras allocates before it compares.

    Args:
        stored_elements: how many numbers are stored.
    """

    def __init__(self, stored_elements: int):
        self._stored = stored_elements
        self._limit, self._taken = _SIZE_FACTOR * stored_elements + _SIZE_SLACK, 0

    def take(self, node: dict[str, Any]) -> None:
        """Count a serialised model or layer; raise ModelError if it and those before ask for too much."""
        for each, where in _objects(node, "the model"):
            inner = each.get("config")
            if not isinstance(inner, dict):
                continue
            if each["class_name"] == "InputLayer" and _elements(inner.get("batch_shape")) > _MAX_INPUT_ELEMENTS:
                raise ModelError(f"{where} declares an input that cannot fit in memory: {inner['batch_shape']}")
            asked = _implied_elements(each["class_name"], inner, each)
            self._taken += asked
            if self._taken > self._limit:
                raise ModelError(
                    f"{where} asks for {asked:,} weights, but the file holds {self._stored:,} in all: "
                    "a size bomb, or weights that are missing."
                )


def check_values(weights: WeightGroup, allow_nonfinite: bool) -> None:
    """Raise ModelError if a weight cannot be read or, unless allowed, holds NaN or infinity."""
    broken = []
    for group in weights.walk():
        for stored in group.weights:
            values = stored.read()
            if values.dtype.kind == "f" and not _all_finite(values):
                broken.append(f"{group.name or group.path or 'model'}/{stored.key}")
    if broken and not allow_nonfinite:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        tensors = "1 tensor contains" if len(broken) == 1 else f"{len(broken)} tensors contain"
        raise ModelError(
            f"{tensors} NaN or infinity: {', '.join(broken[:3])}{more}",
            "Training diverged: use an earlier checkpoint.",
        )


def _all_finite(values: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        if np.isfinite(values.sum(dtype=np.float64)):  # no copy; NaN and infinity survive a sum
            return True
    return bool(np.isfinite(values).all())


def _objects(node: Any, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every serialised object inside `node`, with the nearest layer's name for messages."""
    if isinstance(node, list):
        for item in node:
            yield from _objects(item, where)
    elif isinstance(node, dict):
        if isinstance(node.get("class_name"), str):
            inner = node.get("config")
            name = inner.get("name") if isinstance(inner, dict) else None
            if isinstance(name, str) and not node["class_name"].startswith("__"):
                where = f"{name[:60]!r} ({node['class_name'][:60]})"
            yield node, where
        elif "class_name" in node and "config" in node:
            raise ModelError(f"{where} names a class by a {type(node['class_name']).__name__}, expected a string.")
        for item in node.values():
            if isinstance(item, (dict, list)):
                yield from _objects(item, where)


def _find_unsafe(node: dict[str, Any], where: str) -> ModelError | None:
    """Return the error for an object that could run code or read files, or `None`."""
    kind, inner = node["class_name"], node.get("config")
    if kind in _RUNS_CODE:
        return ModelError(f"{where} holds a {kind}, which can run any code; it is never loaded.", _RUNS_CODE[kind])
    if isinstance(inner, dict) and isinstance(inner.get("vocabulary"), str):
        return ModelError(
            f"{where} reads its vocabulary from {inner['vocabulary'][:80]!r}; a model file may not read other files.",
            "Build the layer with the vocabulary as a list.",
        )
    return None


def _is_keras(node: dict[str, Any]) -> bool:
    """Return whether a serialised object is one of Keras' own classes or functions, or of ours."""
    kind, module, registered = node["class_name"], node.get("module"), node.get("registered_name")
    if module is not None and OWN_CLASSES.get(kind) == module:
        return registered in (None, f"bmcompress>{kind}")
    if kind in _PLAIN_VALUES:
        return True
    if kind == "function":
        name = node.get("config")
        known = module == "builtins" or (isinstance(module, str) and _is_keras_module(module))
        return known and isinstance(name, str) and name.isidentifier() and name not in _NOT_FUNCTIONS
    if isinstance(registered, str) and registered != kind:
        return False  # Keras looks among registered classes first
    if module == "keras":
        return kind in _KERAS_CLASSES
    if is_torch_optimizer(kind, module):
        return True
    if module is None and "module" not in node:  # nested objects of older files
        return kind.isidentifier() and kind[0].isupper()
    return isinstance(module, str) and _is_keras_module(module) and kind.isidentifier() and kind[0].isupper()


def _is_keras_module(module: str) -> bool:
    return module in _KERAS_MODULES or module.startswith(_KERAS_PACKAGES)


def refuse_custom(node: dict[str, Any], where: str) -> ModelError:
    """Return the error for an object whose class is neither Keras' own nor allowed."""
    name, packages = describe_custom(node)
    if not packages:
        return ModelError(f"{where} names {name!r}, which is no layer or function that a model may use.")
    package = packages[0]
    if package == "__main__":
        return ModelError(
            f"{where} needs the custom class or function {name!r}, which was defined in a script.",
            "Move it into a package, decorate it with @keras.saving.register_keras_serializable(package), "
            "save the model again and pass --allow-import PACKAGE.",
        )
    return ModelError(
        f"{where} needs the custom class or function {name!r}, which is not part of Keras.",
        f"If you trust it, pass --allow-import {package}.",
    )


def _implied_elements(kind: str, config: dict[str, Any], node: dict[str, Any]) -> int:
    """Return a lower bound of the weights that a layer allocates, from its options and stated shapes."""
    channels = max((_channels(shape, config) for shape in _stated_shapes(node)), default=1)
    if kind in _NORMS:
        return channels
    kernel = prod(_sizes(config.get("kernel_size")))
    groups = max(1, _size(config.get("groups")))
    if kind == "Embedding":
        return _size(config.get("input_dim")) * _size(config.get("output_dim"))
    if kind == "EinsumDense":
        return channels * max([1, *_sizes(config.get("output_shape"))])
    if kind in ("MultiHeadAttention", "GroupQueryAttention"):
        heads = _size(config.get("num_heads") or config.get("num_query_heads"))
        return channels * heads * _size(config.get("key_dim") or config.get("head_dim"))
    if "filters" in config:
        filters = _size(config["filters"])
        return filters * channels if kind.startswith("Separable") else kernel * filters * channels // groups
    if "depth_multiplier" in config:
        return kernel * channels * _size(config["depth_multiplier"])
    return channels * _size(config["units"]) if "units" in config else 0


def _stated_shapes(node: dict[str, Any]) -> Iterator[list[Any]]:
    """Yield every shape in a layer's `build_config` and `inbound_nodes`."""
    pending: list[Any] = [node.get("build_config"), node.get("inbound_nodes")]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list):
            if item and all(dim is None or isinstance(dim, int) for dim in item):
                yield item
            else:
                pending.extend(item)


def _channels(shape: list[Any], config: dict[str, Any]) -> int:
    axis = 1 if config.get("data_format") == _CHANNELS_FIRST and len(shape) > 1 else -1
    return max(1, _size(shape[axis]))


def _size(value: Any) -> int:
    """Return a positive integer option, or 1 for anything else."""
    return value if isinstance(value, int) and value > 0 else 1


def _sizes(value: Any) -> list[int]:
    return [_size(item) for item in value] if isinstance(value, list) else [_size(value)]


def _elements(shape: Any) -> int:
    return prod(_sizes(shape)) if isinstance(shape, list) else 1
