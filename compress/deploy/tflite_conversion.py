"""A SavedModel becomes a TFLite file that needs nothing but the built-in operators of LiteRT."""

from __future__ import annotations

import re

import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

from compress.deploy.conversion import Places

_PLACE = re.compile(r'fused\["(\w+):", "([^"]+)"')
"""How the converter writes where it is: the operator and the node."""


def to_tflite(
    folder: str,
    endpoints: list[tuple[str, int | None]],
    inputs: list[str],
    outputs: list[str],
    places: Places,
) -> tuple[bytes, int | None]:
    """Return the file and the batch size that it takes (`None`: any), from the first entry point that
    converts.

    Raises:
        ExportError: none of the entry points can be converted.
    """
    errors = []
    for endpoint, batch in endpoints:
        try:
            content = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[endpoint]).convert()
        except Exception as error:  # the converter raises many types; each means that it cannot convert this
            errors.append(error)
            continue
        return order_tensors(content, inputs, outputs), batch
    error = errors[-1]  # of the entry point with the fewest demands on the converter
    if found := _missing_operators(str(error)):
        raise places.error("TFLite", found) from error
    raise places.failure("TFLite", error, next(iter(_PLACE.findall(str(error))), None)) from error


def order_tensors(content: bytes, inputs: list[str], outputs: list[str]) -> bytes:
    """Return the file with its inputs and outputs in the order of these signature names.

    The converter orders them in a way of its own, so two inputs of one shape could be mistaken for each
    other. Only the numbers in the two lists change places; all other bytes stay.
    """
    buffer = bytearray(content)
    model = schema.Model.GetRootAs(buffer)
    signature = model.SignatureDefs(0)
    graph = model.Subgraphs(signature.SubgraphIndex())
    for names, count, tensor, indices in (
        (inputs, signature.InputsLength(), signature.Inputs, graph.InputsAsNumpy()),
        (outputs, signature.OutputsLength(), signature.Outputs, graph.OutputsAsNumpy()),
    ):
        by_name = {tensor(i).Name().decode(): tensor(i).TensorIndex() for i in range(count)}
        indices[:] = [by_name[name] for name in names]
    return bytes(buffer)


def _missing_operators(text: str) -> list[tuple[str, str]]:
    """Return `(operator, node)` of what the converter's message complains about."""
    places = _PLACE.findall(text)
    named = set(re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", text))
    for kind in re.findall(r"(?:Flex|Custom) ops: ([\w, ]+)", text):
        named.update(name.strip().removeprefix("Flex") for name in kind.split(",") if name.strip())
    named = named or set(re.findall(r"'tf\.(\w+)' op", text))
    return [(operator, next((node for op, node in places if op == operator), operator)) for operator in sorted(named)]
