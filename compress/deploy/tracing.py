"""From a Keras model to a SavedModel, which both converters read and which needs none of the user's code.

Models with a half-precision policy are traced in single precision, and recurrent layers without cuDNN,
because no runtime on a CPU knows either; the model is put back as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np

from compress.deploy.conversion import DETACHED, WEIGHT
from compress.deploy.detaching import detach_weights
from compress.deploy.records import Format
from compress.deploy.runtimes import one_line
from compress.deploy.signature import ModelSignature, name_outputs, pack_inputs, read_signature
from compress.errors import ExportError, SetupError
from compress.models.walking import find_all_layers
from compress.quantization.deployment import deploy_model, is_fake_quantized
from compress.quantization.stored import Compute, save_weights

_HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class SavedModel:
    """A SavedModel on disk.

    Args:
        folder: where it is.
        endpoints: `(name, batch)` of each entry point; `batch` is `None` where any size is taken.
        outputs: names of the outputs in the model's order.
        compute: how a file of a quantized model is to compute; `None` for a float model.
        output_steps: the step of the integers behind each output of a quantized model, `None` where it is float.
    """

    folder: Path
    endpoints: list[tuple[str, int | None]]
    outputs: list[str]
    compute: Compute | None = None
    output_steps: tuple[float | None, ...] = ()

    @property
    def weights(self) -> Path:
        """The file with the integers that a file of a quantized model is to hold."""
        return self.folder.with_suffix(".weights.npz")


def write_saved_model(
    model: keras.Model, signature: ModelSignature, folder: Path, formats: Collection[Format] = get_args(Format)
) -> SavedModel:
    """Trace `model` for any batch size and for single samples, and write both as one SavedModel.

    Of a fake-quantized model the float model with marked activations is traced, and its integers stand beside it.

    Args:
        model: any built Keras model.
        signature: its inputs.
        folder: where to write.
        formats: which files are to be made of it; for ONNX large weights are written beside their graph.

    Raises:
        ExportError: the model cannot be traced at all.
        ModelError: the model is fake-quantized and not calibrated.
        SetupError: the folder cannot be written.
    """
    return (_write_quantized if is_fake_quantized(model) else _write)(model, signature, folder, formats)


def _write(model: keras.Model, signature: ModelSignature, folder: Path, formats: Collection[Format]) -> SavedModel:
    import tensorflow as tf

    names: list[str] = []

    def serve(*flat: Any) -> dict[str, Any]:
        outputs = model(pack_inputs(signature, list(flat)), training=False)
        names[:] = name_outputs(model, outputs, tuple(info.name for info in signature.inputs))
        return {name: tf.identity(output) for name, output in zip(names, keras.tree.flatten(outputs), strict=True)}

    _refuse_state(model)
    functions: dict[tuple[str, int | None], Any] = {}
    first_error: Exception | None = None
    with single_precision(model):
        for name, batch in (("serve", None), ("serve_single", 1)):
            if functions and "tflite" not in formats:  # only that converter may need another choice
                continue
            function = tf.function(serve, input_signature=_specs(signature, batch), autograph=False)
            try:
                function.get_concrete_function()
            except Exception as error:  # user code runs here; some of it needs to know the batch size
                first_error = first_error or error
                continue
            functions[name, batch] = function
        if not functions:
            raise ExportError(
                f"model {model.name!r} cannot be traced to a graph. Received: {one_line(first_error)}",
                "A layer whose call() depends on values (Python `if`, NumPy) has to be rewritten with keras.ops.",
            ) from first_error
        detached = "onnx" in formats and detach_weights(model, serve, _specs(signature, next(iter(functions))[1]))
        try:
            if detached:
                function, weights = detached
                _save(model, folder / DETACHED, {next(iter(functions)): function})
                for i, weight in enumerate(weights):
                    np.save(folder / DETACHED / f"{WEIGHT}{i}.npy", keras.ops.convert_to_numpy(weight))
            if "tflite" in formats or not detached:
                _save(model, folder, functions)
        except (OSError, tf.errors.ResourceExhaustedError, tf.errors.PermissionDeniedError) as error:
            raise SetupError(f"{folder} cannot be written. Received: {one_line(error)}", "Free some space.") from error
    return SavedModel(folder, list(functions), list(names))


def _specs(signature: ModelSignature, batch: int | None) -> list[Any]:
    import tensorflow as tf

    return [tf.TensorSpec((batch, *info.shape[1:]), info.dtype, name=info.name) for info in signature.inputs]


def _save(model: keras.Model, folder: Path, functions: dict[tuple[str, int | None], Any]) -> None:
    """Write functions of the model as the entry points of a SavedModel, which holds the variables that they read."""
    import tensorflow as tf

    signatures = {name: function.get_concrete_function() for (name, _), function in functions.items()}
    module = tf.Module()
    module.read = list({id(v): v for concrete in signatures.values() for v in concrete.variables}.values())
    try:
        tf.saved_model.save(module, str(folder), signatures=signatures)
    except (AssertionError, ValueError):  # they read tables or the like; Keras knows where layers keep these
        shutil.rmtree(folder, ignore_errors=True)
        archive = keras.export.ExportArchive()
        archive.track(model)
        for (name, _), function in functions.items():
            archive.add_endpoint(name, function)
        archive.write_out(str(folder), verbose=False)


def _write_quantized(
    model: keras.Model, signature: ModelSignature, folder: Path, formats: Collection[Format]
) -> SavedModel:
    deployment = deploy_model(model)
    saved = _write(deployment.model, signature, folder, formats)
    saved = replace(saved, compute=deployment.compute, output_steps=deployment.output_steps)
    save_weights(saved.weights, deployment.weights)
    return saved


def trace_file(source: str, folder: str, formats: list[Format], modules: list[str]) -> dict[str, Any]:
    """Write the model in a `.keras` file as a SavedModel; what a child does for other backends.

    Args:
        source: the file.
        folder: where to write.
        formats: which files are to be made of it.
        modules: where its custom classes and functions are defined.
    """
    try:
        objects = {name: item for module in modules for name, item in vars(import_module(module)).items()}
        model = keras.saving.load_model(source, custom_objects=objects, compile=False)
    except Exception as error:  # user code runs here
        reason = str(error).rpartition("Exception encountered: ")[2]  # Keras puts it last, after the configuration
        raise ExportError(
            "expected a model that another process can open, as files are made by TensorFlow. Received: "
            f"{' '.join(reason.split())[:200]}",
            "Put custom classes into a module that can be imported, or export under KERAS_BACKEND=tensorflow.",
        ) from error
    saved = write_saved_model(model, read_signature(model), Path(folder), formats)
    facts = {"compute": saved.compute, "output_steps": saved.output_steps}
    return {"folder": str(saved.folder), "endpoints": saved.endpoints, "outputs": saved.outputs, **facts}


@contextmanager
def single_precision(model: keras.Model) -> Iterator[None]:
    """Make the layers of `model` compute in float32 and recurrent layers without cuDNN inside the block."""
    layers = find_all_layers(model)
    policies = [(layer, layer.dtype_policy) for layer in layers if _is_reduced(layer.dtype_policy)]
    kernels = [(layer, layer.use_cudnn) for layer in layers if getattr(layer, "use_cudnn", False)]
    try:
        for layer, _ in policies:
            layer.dtype_policy = "float32"
        for layer, _ in kernels:
            layer.use_cudnn = False
        yield
    finally:
        for layer, policy in policies:
            layer.dtype_policy = policy
        for layer, value in kernels:
            layer.use_cudnn = value


def computes_in_half(model: keras.Model) -> bool:
    """Return whether some layer computes in float16 or bfloat16."""
    return any(layer.compute_dtype in _HALF for layer in find_all_layers(model))


def _refuse_state(model: keras.Model) -> None:
    for layer in find_all_layers(model):
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            raise ExportError(
                f"expected layers that keep no state between calls. Received: layer {layer.name!r} with stateful=True",
                "Rebuild the model with stateful=False, and its state as an input and output if you need it.",
            )


def _is_reduced(policy: Any) -> bool:
    plain = isinstance(policy, keras.dtype_policies.DTypePolicy) and policy.quantization_mode is None
    return plain and not isinstance(policy, keras.dtype_policies.DTypePolicyMap) and policy.compute_dtype in _HALF
