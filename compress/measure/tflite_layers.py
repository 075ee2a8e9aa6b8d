"""The outputs of every operator of a `.tflite` file, read from LiteRT's interpreter after each run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from compress.deploy.litert import LiteRtRuntime
from compress.errors import ModelError
from compress.measure.layer_outputs import INTEGERS, Lineage, Observed
from compress.measure.tflite_contents import DAMAGED, operator_name

_TYPES = {value: name.lower() for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
_FLOATS = ("float16", "float32", "float64")
_RECODING = {"QUANTIZE", "DEQUANTIZE"}
_HIDDEN = {"WHILE", "IF", "CALL", "STABLEHLO_COMPOSITE"}
_EMPTY = -1


class TfliteLayers(LiteRtRuntime):
    """A loaded `.tflite` file that returns what each of its operators returns, as real numbers."""

    layers: tuple[str, ...] = ()

    def __init__(self, path: Path):
        super().__init__(path, 1)
        self._read_graph(path)

    def _open_interpreter(self, path: Path, threads: int) -> Interpreter:
        with warnings.catch_warnings():  # it warns that this is for debugging, which this is
            warnings.simplefilter("ignore")
            return Interpreter(model_path=str(path), num_threads=threads, experimental_preserve_all_tensors=True)

    def _read_graph(self, path: Path) -> None:
        try:
            model = schema.Model.GetRootAs(path.read_bytes())
            graph = model.Subgraphs(0)
            tensors = [graph.Tensors(index) for index in range(graph.TensorsLength())]
            operators = [_Operator(model, graph.Operators(index)) for index in range(graph.OperatorsLength())]
            outputs = {graph.Outputs(index) for index in range(graph.OutputsLength())}
            types = [_TYPES.get(tensor.Type(), "?") for tensor in tensors]
            names = [(tensor.Name() or b"").decode(errors="replace") for tensor in tensors]
            variables = {i for i, tensor in enumerate(tensors) if tensor.IsVariable()}
        except DAMAGED as error:
            raise ModelError(f"{path} is damaged: its tables cannot be read. Received: {error}") from error
        details = {each["index"]: each for each in self._interpreter.get_tensor_details()}
        self._scales = {index: scale for index, each in details.items() if (scale := _scale(each)) is not None}
        lineage, self._indices = Lineage(), []
        read = {index for operator in operators for index in operator.inputs}
        stored = _stored_forms(operators, outputs)
        for operator in operators:
            for index in operator.outputs:
                final = stored.get(index, index)
                recodes = operator.name in _RECODING and operator.inputs[0] in lineage
                inner = operator.name in _HIDDEN and index not in read | outputs  # such as a list that a loop fills
                readable = types[final] in _FLOATS or (types[final] in INTEGERS and final in self._scales)
                if recodes or inner or not readable or index in variables:
                    lineage.skip(index, operator.inputs)
                    continue
                returned = bool({index, final} & outputs) or _returned_by(index, operators, outputs)
                labels = tuple(part for part in names[index].split(";") if part)
                lineage.add(
                    index,
                    operator.inputs,
                    lambda parents, labels=labels, kind=operator.name, returned=returned: Observed(
                        labels[0] if labels else "?", kind, labels or ("?",), parents, returned
                    ),
                )
                self._indices.append(final)
        self.tensors = tuple(lineage.tensors)
        self.quantized = any(name in INTEGERS for name in types)
        hidden = sorted({operator.name for operator in operators} & _HIDDEN)
        self.notes = (f"{path.name}: what happens inside {', '.join(hidden)} cannot be observed",) if hidden else ()

    def _invoke(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        super()._invoke(arrays)
        return [self._read_tensor(index) for index in self._indices]

    def _read_tensor(self, index: int) -> np.ndarray:
        try:
            return self._decode(self._interpreter.get_tensor(index), index)
        except ValueError:  # an operator that was not run, or a kernel that keeps its result to itself
            return np.full((0,), np.nan, "float32")

    def _decode(self, array: np.ndarray, index: int) -> np.ndarray:
        if array.dtype.kind == "f" or index not in self._scales:
            return array.astype("float32") if array.dtype.kind == "f" else array
        scale, zero_point = self._scales[index]
        return ((array.astype("float64") - zero_point) * scale).astype("float32")


class _Operator:
    """Name, inputs and outputs of one operator."""

    def __init__(self, model: Any, operator: Any):
        self.name = operator_name(model, operator)
        self.inputs = [operator.Inputs(i) for i in range(operator.InputsLength()) if operator.Inputs(i) != _EMPTY]
        self.outputs = [operator.Outputs(i) for i in range(operator.OutputsLength()) if operator.Outputs(i) != _EMPTY]


def _stored_forms(operators: list[_Operator], outputs: set[int]) -> dict[int, int]:
    """Return, by float tensor, the integers that the operators behind read instead of it."""
    return {
        operator.inputs[0]: operator.outputs[0]
        for operator in operators
        if operator.name == "QUANTIZE" and operator.inputs[0] not in outputs
    }


def _returned_by(index: int, operators: list[_Operator], outputs: set[int]) -> bool:
    """Return whether the model returns the tensor in another coding."""
    return any(o.name in _RECODING and o.inputs[0] == index and o.outputs[0] in outputs for o in operators)


def _scale(details: dict[str, Any]) -> tuple[float, int] | None:
    """Return scale and zero point of a tensor that is quantized as a whole."""
    found = details["quantization_parameters"]
    if len(found["scales"]) != 1:
        return None
    return float(found["scales"][0]), int(found["zero_points"][0])
