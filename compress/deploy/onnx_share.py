"""How much of an ONNX file runs in integer kernels: read from the graph that ONNX Runtime makes of it by default."""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

from compress.deploy.conversion import Places
from compress.deploy.onnx_digests import bodies
from compress.deploy.onnx_graph import attribute
from compress.deploy.onnx_shapes import read_sizes
from compress.deploy.runtimes import one_line
from compress.errors import ExportError

_INTEGER_KERNELS = {
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "NhwcMaxPool", "QAttention",
    "QGemm",
}  # fmt: skip
_NO_ARITHMETIC = {
    "Cast", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "DequantizeLinear", "DynamicQuantizeLinear",
    "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool", "Pad", "QuantizeLinear",
    "Range", "ReduceMax", "ReduceMin", "ReorderInput", "ReorderOutput", "Reshape", "Resize", "ReverseSequence", "Shape",
    "Size", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
_RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}  # gates
_SUFFIX = re.compile(r"(:\d+)?(_token_\d+|_nchwc|_nhwc)?$")  # of nodes that ONNX Runtime makes anew
_Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class QuantizedShare:
    """What ONNX Runtime does with a file under its default options.

    Args:
        operators: operator -> how often it is in the optimized graph.
        macs: multiply-accumulates of one sample.
        quantized_macs: those of them in integer kernels.
        float_operators: `(operator, node)` of arithmetic on floats that is left.
        uncounted: nodes whose multiply-accumulates are not known, such as loops.
    """

    operators: dict[str, int]
    macs: int
    quantized_macs: int
    float_operators: tuple[tuple[str, str], ...]
    uncounted: tuple[str, ...]

    @property
    def share(self) -> float:
        """Fraction of the counted multiply-accumulates that integer kernels do; 1 for a file that has none at all."""
        return self.quantized_macs / self.macs if self.macs else float(not self.uncounted)


def quantized_share(file: str | Path | bytes) -> QuantizedShare:
    """Return what runs in integers and what in float when ONNX Runtime opens a file.

    Args:
        file: an `.onnx` file or its bytes.

    Raises:
        ExportError: ONNX Runtime cannot open the file.
    """
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    model, optimized = onnx.load_from_string(content), optimize(content)
    kinds = {_SUFFIX.sub("", node.name): node.op_type for node in optimized.graph.node if node.name}
    sizes = read_sizes(model)
    counts, uncounted = {}, []
    for node in model.graph.node:
        if node.op_type in _MACS:
            macs = _count(node, sizes)
            if macs is None:
                uncounted.append(node.name)
            else:
                counts[node.name] = macs
        elif any(bodies(item) for item in node.attribute):
            uncounted.append(node.name)
    return QuantizedShare(
        operators=dict(sorted(Counter(node.op_type for node in optimized.graph.node).items())),
        macs=sum(counts.values()),
        quantized_macs=sum(macs for name, macs in counts.items() if _is_integer(kinds.get(name, ""))),
        float_operators=tuple(_float_nodes(optimized, model)),
        uncounted=tuple(uncounted),
    )


def float_operators(content: bytes, places: Places) -> list[tuple[str, str]]:
    """Return `(operator, layer)` of the arithmetic that ONNX Runtime does on floats, in the order of the graph.

    Args:
        content: bytes of an `.onnx` file.
        places: where nodes come from; one of no layer is told by the last layer with weights before it.

    Raises:
        ExportError: ONNX Runtime cannot open the file.
    """
    model = onnx.load_from_string(content)
    makers = {name: node for node in model.graph.node for name in node.output}
    found = []
    for operator, name in _float_nodes(optimize(content), model):
        layer = places.layer_path(name)
        before = None if layer else _layer_before(name, model, makers, places)
        found.append((operator, layer or (f"after {before}" if before else "")))
    return list(dict.fromkeys(found))


def optimize(content: bytes) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime runs for a file under its default options.

    Raises:
        ExportError: ONNX Runtime cannot open the file.
    """
    with tempfile.TemporaryDirectory(prefix="bmcompress-") as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 4
        try:
            onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no public base
            raise ExportError(
                f"the ONNX file cannot be opened by ONNX Runtime {onnxruntime.__version__}. Received: {one_line(error)}"
            ) from error
        return onnx.load(path)


def _is_integer(operator: str) -> bool:
    return operator.startswith("QLinear") or operator in _INTEGER_KERNELS


def _float_nodes(optimized: onnx.ModelProto, model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Return `(operator, node)` of arithmetic whose result is float; the nodes are named as in the file."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in optimized.graph.input}
    kinds.update((tensor.name, tensor.data_type) for tensor in optimized.graph.initializer)
    makers = {name: node.name for node in model.graph.node for name in node.output}
    found = []
    for node in optimized.graph.node:
        kind = _result_kind(node, kinds)
        kinds.update((name, kind) for name in node.output)
        if kind == onnx.TensorProto.FLOAT and not _is_integer(node.op_type) and node.op_type not in _NO_ARITHMETIC:
            if node.op_type == "Sum" and len(node.input) == 1:
                continue  # which passes its input on
            found.append((node.op_type, makers.get(node.output[0], _SUFFIX.sub("", node.name))))
    return found


def _result_kind(node: onnx.NodeProto, kinds: dict[str, int]) -> int | None:
    """Return the type of a node's result as far as arithmetic on floats is concerned."""
    fixed = {
        "DequantizeLinear": onnx.TensorProto.FLOAT, "QuantizeLinear": onnx.TensorProto.UINT8,
        "DynamicQuantizeLinear": onnx.TensorProto.UINT8, "MatMulInteger": onnx.TensorProto.INT32,
        "ConvInteger": onnx.TensorProto.INT32, "Shape": onnx.TensorProto.INT64, "Size": onnx.TensorProto.INT64,
        "Less": onnx.TensorProto.BOOL, "LessOrEqual": onnx.TensorProto.BOOL, "Greater": onnx.TensorProto.BOOL,
        "GreaterOrEqual": onnx.TensorProto.BOOL, "Equal": onnx.TensorProto.BOOL, "Not": onnx.TensorProto.BOOL,
    }  # fmt: skip
    if node.op_type in fixed:
        return fixed[node.op_type]
    if node.op_type == "Cast":
        return attribute(node, "to")
    if _is_integer(node.op_type):
        return kinds.get(node.input[0])
    if any(bodies(item) for item in node.attribute):
        return onnx.TensorProto.FLOAT  # whose bodies may do anything
    place = 1 if node.op_type == "Where" else 0
    return next((kinds[name] for name in node.input[place:] if kinds.get(name) is not None), onnx.TensorProto.FLOAT)


def _layer_before(name: str, model: onnx.ModelProto, makers: dict[str, onnx.NodeProto], places: Places) -> str | None:
    """Return the nearest layer with weights before a node, or `None`."""
    waiting = [node for node in model.graph.node if node.name == name]
    seen: set[str] = set()
    while waiting:
        node = waiting.pop(0)
        for source in node.input:
            maker = makers.get(source)
            if maker is None or maker.name in seen:
                continue
            if layer := places.layer_path(maker.name):
                return layer
            seen.add(maker.name)
            waiting.append(maker)
    return None


def _count(node: onnx.NodeProto, sizes: _Sizes) -> int | None:
    shapes = [sizes.get(name) for name in (node.output[0], *node.input[:2])]
    if node.op_type in _RECURRENT:
        kernels = [sizes.get(name) for name in node.input[1:3]]
        if shapes[1] is None or None in kernels:
            return None
        return shapes[1][0] * sum(math.prod(kernel) for kernel in kernels)
    return None if None in shapes else _MACS[node.op_type](*shapes)


_Shape = tuple[int, ...]
_MACS: dict[str, Callable[[_Shape, _Shape, _Shape], int]] = {
    "Conv": lambda output, x, kernel: math.prod(output) * math.prod(kernel[1:]),
    "ConvInteger": lambda output, x, kernel: math.prod(output) * math.prod(kernel[1:]),
    "ConvTranspose": lambda output, x, kernel: math.prod(x) * math.prod(kernel[1:]),
    "Gemm": lambda output, x, kernel: math.prod(x) * output[-1],
    "MatMul": lambda output, x, kernel: math.prod(output) * x[-1],
    "MatMulInteger": lambda output, x, kernel: math.prod(output) * x[-1],
    **dict.fromkeys(_RECURRENT, lambda output, x, kernel: 0),  # counted by their kernels and steps
}
