"""The converters, which run in a child process: a SavedModel becomes a TFLite or an ONNX file.

Neither needs Keras or the user's code. The ONNX path freezes the graph itself and checks every operator of
the result, because tf2onnx leaves operators that it does not know in the file and only logs them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from compress.deploy.records import Io, WeightType
from compress.deploy.runtimes import one_line
from compress.errors import ExportError
from compress.quantization.stored import Compute, load_weights

DETACHED, WEIGHT = "detached", "bmcompress_weight_"
"""The folder inside a SavedModel with another one whose entry point takes large weights as inputs, and how these inputs
and the `.npy` files there with their values are named, before a number."""


def convert(
    *,
    folder: str,
    endpoints: list[list[Any]],
    inputs: list[str],
    outputs: list[str],
    layers: list[str],
    model: str,
    files: dict[str, str],
    opset: int,
    quantization: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write each of `files` and return `{format: {"batch": int or None, "notes": [...], "opset": int or None}}`.

    Args:
        folder: the SavedModel.
        endpoints: `[name, batch]` of its entry points, the preferred one first.
        inputs: names of the inputs in the model's order.
        outputs: names of the outputs in the model's order.
        layers: names of all layers, to say where an operator comes from.
        model: name of the model.
        files: format -> path to write.
        opset: ONNX operator set.
        quantization: of a quantized model: the file of its `weights`, how files `compute`, and the options of
            `QuantizedFile`; `None` for a float model.

    Raises:
        ExportError: an operator has no equivalent in the format, named with its layer.
    """
    places = Places(layers, model)
    points = [tuple(endpoint) for endpoint in endpoints]
    results = {}
    for file_format, path in files.items():
        job = (folder, points, inputs, outputs, places)
        if quantization:
            content, batch, notes = _convert_quantized(file_format, job, opset, **quantization)
            Path(path).write_bytes(content)
            version = _opset(file_format, content)
        else:
            batch = _convert_float(file_format, job, path, opset)
            notes = _batch_notes(file_format, batch)
            version = opset if file_format == "onnx" else None
        results[file_format] = {"batch": batch, "notes": notes, "opset": version}
    return results


def _opset(file_format: str, content: bytes) -> int | None:
    """Return the operator set of an ONNX file, which may be newer than asked for where its types need that."""
    if file_format != "onnx":
        return None
    import onnx

    versions = {item.domain: item.version for item in onnx.load_model_from_string(content).opset_import}
    return versions[""]


def _convert_float(file_format: str, job: tuple, path: str, opset: int) -> int | None:
    """Write the file and return the batch size that it takes."""
    if file_format == "tflite":
        from compress.deploy.tflite_conversion import to_tflite

        content, batch = to_tflite(*job)
        Path(path).write_bytes(content)
        return batch
    from compress.deploy.onnx_conversion import to_onnx

    folder, endpoints, inputs, outputs, places = job
    return to_onnx(folder, endpoints[0], inputs, outputs, places, path, opset=opset)


def _convert_quantized(
    file_format: str, job: tuple, opset: int, *, weights: str, compute: Compute, io: Io, weight_type: WeightType
) -> tuple[bytes, int | None, list[str]]:
    stored = load_weights(weights)
    if file_format == "tflite":
        from compress.deploy.tflite_quantized import float_operators, to_quantized_tflite

        content, batch, notes = to_quantized_tflite(*job, stored, compute=compute, io=io)
        return content, batch, notes + _float_notes(file_format, compute, float_operators(content, job[-1]))
    from compress.deploy.onnx_quantized import float_operators, to_quantized_onnx

    folder, endpoints, inputs, outputs, places = job
    content, batch, notes = to_quantized_onnx(
        folder, endpoints[0], inputs, outputs, places, stored, compute=compute, io=io, weights=weight_type, opset=opset
    )
    return content, batch, notes + _float_notes(file_format, compute, float_operators(content, places))


def _batch_notes(file_format: str, batch: int | None) -> list[str]:
    if batch is None:
        return []
    return [f"The {file_format} file takes one sample at a time: the model cannot be converted for any batch size."]


def _float_notes(file_format: str, compute: Compute, found: list[tuple[str, str]]) -> list[str]:
    """Name what stays float in a file that computes in integers."""
    if compute != "integer" or not found:
        return []
    operators: dict[str, list[str]] = {}
    for operator, layer in found:
        operators.setdefault(layer or "outside layers", []).append(operator)
    listed = "; ".join(f"{layer} ({', '.join(names)})" for layer, names in operators.items())
    return [f"In the {file_format} file these compute in float: {listed}."]


def _without_number(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


class Places:
    """Where in a Keras model an operator of a graph comes from.

    Args:
        layers: names of all layers.
        model: name of the model.
    """

    def __init__(self, layers: list[str], model: str):
        self._layers, self._model = set(layers), model

    def layer_path(self, node: str) -> str:
        """Return `"block/conv"` for a node such as `"model_1/block_1/conv_1/Conv2D"`, or `""` for none."""
        path = []
        parts = node.partition("@")[0].split("/")
        # A model that was traced before is called `model_1`, and its layer `conv` is `conv_1`, as another one may be.
        again = self._model not in parts and self._model in map(_without_number, parts)
        for part in parts:
            choices = (_without_number(part), part) if again else (part, _without_number(part))
            name = next((each for each in choices if each in self._layers), None)
            if name is not None and name != self._model:
                path.append(name)
        return "/".join(path)

    def find(self, node: str) -> str:
        """Return where a graph node comes from, as `"layer 'block/conv'"`."""
        path = self.layer_path(node)
        return f"layer {path!r}" if path else f"model {self._model!r} outside its layers, at {node.partition('@')[0]!r}"

    def error(self, file_format: str, found: list[tuple[str, str]]) -> ExportError:
        """Return the error for operators `(operator, node)` that the format lacks."""
        uses = list(dict.fromkeys(f"{operator} in {self.find(node)}" for operator, node in found))
        more = f" and {len(uses) - 5} more" if len(uses) > 5 else ""
        return ExportError(
            f"{file_format} has no equivalent of {len(uses)} operation(s) of the model. "
            f"Received: {'; '.join(uses[:5])}{more}",
            "Rewrite the layer with operations that the format has, or leave it out of the exported model; "
            "another export format may have it.",
        )

    def failure(self, file_format: str, error: Exception, found: tuple[str, str] | None = None) -> ExportError:
        """Return the error for a conversion that failed for another reason, perhaps at `(operator, node)`."""
        where = f" at {found[0]} in {self.find(found[1])}" if found else ""
        return ExportError(
            f"model {self._model!r} cannot be converted to {file_format}{where}. "
            f"Received: {type(error).__name__}: {one_line(error)}",
            "Export parts of the model to find the layer that the converter stumbles over.",
        )
