"""The converters, which run in a child process: a SavedModel becomes a TFLite or an ONNX file.

Neither needs Keras or the user's code. The ONNX path freezes the graph itself and checks every operator of
the result, because tf2onnx leaves operators that it does not know in the file and only logs them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from compress.deploy.runtimes import one_line
from compress.errors import ExportError


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
) -> dict[str, dict[str, Any]]:
    """Write each of `files` and return `{format: {"batch": int or None, "notes": [...]}}`.

    Args:
        folder: the SavedModel.
        endpoints: `[name, batch]` of its entry points, the preferred one first.
        inputs: names of the inputs in the model's order.
        outputs: names of the outputs in the model's order.
        layers: names of all layers, to say where an operator comes from.
        model: name of the model.
        files: format -> path to write.
        opset: ONNX operator set.

    Raises:
        ExportError: an operator has no equivalent in the format, named with its layer.
    """
    results = {}
    places = Places(layers, model)
    for file_format, path in files.items():
        if file_format == "tflite":
            from compress.deploy.tflite_conversion import to_tflite

            content, batch = to_tflite(folder, [tuple(endpoint) for endpoint in endpoints], inputs, outputs, places)
        else:
            from compress.deploy.onnx_conversion import to_onnx

            content, batch = to_onnx(folder, tuple(endpoints[0]), inputs, outputs, places, opset=opset)
        Path(path).write_bytes(content)
        results[file_format] = {"batch": batch, "notes": _notes(file_format, batch)}
    return results


def _notes(file_format: str, batch: int | None) -> list[str]:
    if batch is None:
        return []
    return [f"The {file_format} file takes one sample at a time: the model cannot be converted for any batch size."]


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
        for part in node.partition("@")[0].split("/"):
            plain = re.sub(r"_\d+$", "", part)
            name = part if part in self._layers else plain
            if name in self._layers and name != self._model:
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
