"""The outputs of every node of an `.onnx` file: a copy of the file returns them beside the model's own.

ONNX Runtime runs quantized kernels only where the float value between a node and its QuantizeLinear is asked for
by nobody. So the copy returns the values behind the DequantizeLinear, and the file computes as it always does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from compress.deploy.onnx_runtime import OnnxRuntime
from compress.deploy.runtimes import one_line
from compress.errors import ModelError
from compress.measure.layer_outputs import INTEGERS, Lineage, Observed

_FLOATS = ("float16", "float32", "float64")
_OUTPUT_SCALE = {
    "QuantizeLinear": 1, "QLinearConv": 6, "QLinearMatMul": 6, "QLinearAdd": 6, "QLinearMul": 6, "QLinearConcat": 0,
    "QLinearGlobalAveragePool": 3, "QLinearAveragePool": 3, "QLinearSoftmax": 3, "QLinearSigmoid": 3,
    "QLinearLeakyRelu": 3, "QGemm": 7,
}  # fmt: skip
"""Position of the scale of the result, with the zero point behind it."""
_KEEPS_SCALE = {"MaxPool", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Identity", "Slice", "Gather"}
_CLAMPS = {"Relu", "Clip"}
_NO_TENSOR = ("Sequence", "SplitToSequence", "Optional", "Shape", "Size", "NonZero", "Constant")
_RECODING = ("QuantizeLinear", "DequantizeLinear")
_HIDDEN = {"If", "Loop", "Scan"}


class OnnxLayers(OnnxRuntime):
    """A loaded `.onnx` file that returns what each of its nodes returns, as real numbers."""

    layers: tuple[str, ...] = ()

    def __init__(self, path: Path, folder: Path):
        try:
            model = onnx.load(path)
        except (DecodeError, OSError, ValueError) as error:
            raise ModelError(f"{path} is not an ONNX model. Received: {one_line(error)}") from error
        graph = _Graph(model.graph)
        wanted = graph.observable()
        own = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in own)
        copy = folder / f"{path.stem}-layers.onnx"
        large = model.ByteSize() > 2**31 - 2**20
        onnx.save(model, copy, save_as_external_data=large)
        try:
            super().__init__(copy, 1)
        except ModelError as error:
            raise ModelError(error.message.replace(str(copy), str(path)), error.help) from error
        self._scales = graph.scales
        dtypes = {info.name: info.dtype for info in self.outputs}
        self.tensors, self._places = graph.describe(wanted, dtypes, [info.name for info in self.outputs])
        self.quantized = bool(graph.scales) or any(
            onnx.TensorProto.DataType.Name(constant.data_type).lower() in INTEGERS and len(constant.dims) > 1
            for constant in model.graph.initializer
        )
        hidden = sorted({node.op_type for node in model.graph.node} & _HIDDEN)
        self.notes = (f"{path.name}: what happens inside {', '.join(hidden)} cannot be observed",) if hidden else ()

    def _invoke(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        values = super()._invoke(arrays)
        return [self._decode(values[place], self.outputs[place].name) for place in self._places]

    def _decode(self, array: np.ndarray, name: str) -> np.ndarray:
        if array.dtype.kind == "f":
            return array.astype("float32")
        scale, zero_point = self._scales[name]
        return ((array.astype("float64") - zero_point) * scale).astype("float32")


class _Graph:
    """Which tensors of a graph to ask for, and how they descend from each other."""

    def __init__(self, graph: onnx.GraphProto):
        self._nodes = list(graph.node)
        self._returned = {value.name for value in graph.output}
        self._constants = {each.name: each for each in graph.initializer}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._dynamic = {value.name for value in graph.input if value.name not in self._constants}
        for node in self._nodes:
            if node.op_type in _HIDDEN or self._dynamic.intersection(node.input):
                self._dynamic.update(node.output)
        self.scales: dict[str, tuple[float, int]] = {}
        for node in self._nodes:
            if (scale := self._read_scale(node)) is not None:
                self.scales[node.output[0]] = scale

    def observable(self) -> dict[str, str]:
        """Return, by tensor to ask for, the tensor whose value it is as the nodes behind read it."""
        found = {}
        for node in self._nodes:
            for name in node.output:
                if name and name in self._dynamic and not self._is_passed_over(node, name):
                    found.setdefault(self._stored_form(name), name)
        return found

    def describe(
        self, wanted: dict[str, str], dtypes: dict[str, str], returned: list[str]
    ) -> tuple[tuple[Observed, ...], list[int]]:
        """Return the observed tensors, and the position of each among what the runtime returns."""
        lineage, places = Lineage(), []
        asked = {source: name for name, source in wanted.items()}
        for node in self._nodes:
            for name in node.output:
                source = asked.get(name)
                if source is None or not (dtypes[source] in _FLOATS or source in self.scales):
                    lineage.skip(name, node.input)
                    continue
                labels = tuple(dict.fromkeys(label for label in (name.removesuffix(":0"), node.name) if label))
                is_output = bool({name, source} & self._returned) or self._is_returned(name)
                lineage.add(
                    name,
                    node.input,
                    lambda parents, labels=labels, kind=node.op_type, is_output=is_output: Observed(
                        labels[0], kind, labels, parents, is_output
                    ),
                )
                places.append(returned.index(source))
        return tuple(lineage.tensors), places

    def _is_passed_over(self, node: onnx.NodeProto, name: str) -> bool:
        """Return whether another tensor stands for this one, or asking for it would change what is computed."""
        inner = node.op_type in _HIDDEN and name not in self._consumers and name not in self._returned
        if inner or node.op_type.startswith(_NO_TENSOR):
            return True
        if node.op_type in _RECODING and node.input[0] in self._dynamic:
            behind_input = node.op_type == "QuantizeLinear" and not self._is_made(node.input[0])
            return not behind_input
        consumers = self._consumers.get(name, [])
        clamped = len(consumers) == 1 and consumers[0].op_type in _CLAMPS and name not in self._returned
        return clamped and self._quantize_behind(consumers[0].output[0]) is not None

    def _stored_form(self, name: str) -> str:
        """Return the real value behind QuantizeLinear and DequantizeLinear, or else the integers, or else `name`."""
        quantize = self._quantize_behind(name)
        integers = name if quantize is None else quantize.output[0]
        if integers not in self.scales or name in self._returned:
            return name
        return next(
            (n.output[0] for n in self._consumers.get(integers, []) if n.op_type == "DequantizeLinear"), integers
        )

    def _quantize_behind(self, name: str) -> onnx.NodeProto | None:
        return next((n for n in self._consumers.get(name, []) if n.op_type == "QuantizeLinear"), None)

    def _is_returned(self, name: str) -> bool:
        """Return whether the model returns the tensor in another coding."""
        reach = [name]
        for _ in range(2):
            behind = [node for each in reach for node in self._consumers.get(each, [])]
            reach = [node.output[0] for node in behind if node.op_type in _RECODING]
            if self._returned.intersection(reach):
                return True
        return False

    def _is_made(self, name: str) -> bool:
        return any(name in node.output for node in self._nodes)

    def _read_scale(self, node: onnx.NodeProto) -> tuple[float, int] | None:
        if node.op_type in _KEEPS_SCALE:
            return self.scales.get(node.input[0])
        place = _OUTPUT_SCALE.get(node.op_type)
        if place is None or place >= len(node.input):
            return None
        numbers = []
        for name in node.input[place : place + 2]:
            values = numpy_helper.to_array(self._constants[name]) if name in self._constants else None
            if values is None or values.size != 1:
                return None
            numbers.append(values.reshape(-1)[0])
        return float(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0
