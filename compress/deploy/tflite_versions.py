"""Versions of TFLite operators whose tensors became integers: what a file asks of a runtime.

Each version is the first of the runtime's that has the kernel, as TensorFlow's converter counts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ai_edge_litert import schema_py_generated as schema

if TYPE_CHECKING:
    from compress.deploy.tflite_flatbuffer import TfliteFile

Type, Op = schema.TensorType, schema.BuiltinOperator

_INT8_IS_2 = {
    Op.ADD, Op.SUB, Op.MUL, Op.SQUARED_DIFFERENCE, Op.MAXIMUM, Op.MINIMUM, Op.MAX_POOL_2D, Op.AVERAGE_POOL_2D,
    Op.TRANSPOSE, Op.SLICE, Op.STRIDED_SLICE, Op.GATHER, Op.PACK, Op.UNPACK, Op.PAD, Op.PADV2, Op.MIRROR_PAD,
    Op.CONCATENATION, Op.SOFTMAX, Op.LOG_SOFTMAX, Op.LOGISTIC, Op.TANH, Op.MEAN, Op.SUM, Op.REDUCE_MAX, Op.REDUCE_MIN,
    Op.RELU, Op.RELU6, Op.RSQRT, Op.ABS, Op.EXP, Op.LOG, Op.GELU, Op.BATCH_MATMUL, Op.RESIZE_BILINEAR,
    Op.RESIZE_NEAREST_NEIGHBOR, Op.SPACE_TO_BATCH_ND, Op.BATCH_TO_SPACE_ND, Op.SPACE_TO_DEPTH, Op.DEPTH_TO_SPACE,
    Op.SPLIT_V, Op.ARG_MAX, Op.ARG_MIN, Op.L2_NORMALIZATION, Op.TRANSPOSE_CONV,
}  # fmt: skip
_INT8 = {Op.TILE: 3, Op.REVERSE_V2: 3, Op.BROADCAST_TO: 3, Op.CONV_2D: 3, Op.DEPTHWISE_CONV_2D: 3, Op.SPLIT: 2}
_INT16 = {
    Op.ADD: 3, Op.SUB: 5, Op.MUL: 4, Op.MAX_POOL_2D: 3, Op.AVERAGE_POOL_2D: 3, Op.TRANSPOSE: 5, Op.SLICE: 4,
    Op.GATHER: 4, Op.PACK: 3, Op.UNPACK: 4, Op.PAD: 3, Op.PADV2: 3, Op.MIRROR_PAD: 3, Op.CONCATENATION: 3,
    Op.SOFTMAX: 3, Op.LOGISTIC: 3, Op.TANH: 3, Op.MEAN: 3, Op.REDUCE_MAX: 3, Op.REDUCE_MIN: 3, Op.RELU: 3, Op.RELU6: 3,
    Op.RSQRT: 3, Op.ABS: 3, Op.EXP: 2, Op.LOG: 2, Op.BATCH_MATMUL: 3, Op.RESIZE_BILINEAR: 4,
    Op.RESIZE_NEAREST_NEIGHBOR: 4, Op.SPACE_TO_BATCH_ND: 4, Op.BATCH_TO_SPACE_ND: 4, Op.SPLIT: 4, Op.BROADCAST_TO: 3,
    Op.MAXIMUM: 4, Op.MINIMUM: 4, Op.LEAKY_RELU: 2, Op.CONV_2D: 4, Op.DEPTHWISE_CONV_2D: 5, Op.TRANSPOSE_CONV: 3,
    Op.FULLY_CONNECTED: 7,
}  # fmt: skip
_INT4_WEIGHTS = {Op.CONV_2D: 7, Op.DEPTHWISE_CONV_2D: 7, Op.FULLY_CONNECTED: 10}
_DATA_INPUT = {Op.SPLIT: 1, Op.TRANSPOSE_CONV: 2}
"""The input whose type decides, where it is not the first."""

_WEIGHTED = {Op.CONV_2D, Op.DEPTHWISE_CONV_2D, Op.FULLY_CONNECTED, Op.BATCH_MATMUL}


def operator_version(file: TfliteFile, graph: schema.SubGraphT, operator: schema.OperatorT) -> int:
    """Return the version that an operator needs for the types of its tensors; 1 where they ask for nothing."""
    code = file.code(operator)
    types = [graph.tensors[i].type if i >= 0 else None for i in operator.inputs]
    data = types[min(_DATA_INPUT.get(code, 0), len(types) - 1)] if types else None
    if code == Op.DEQUANTIZE:
        return _dequantize_version(graph.tensors[operator.inputs[0]])
    if code == Op.QUANTIZE:
        return 2 if graph.tensors[operator.outputs[0]].type == Type.INT16 else 1
    if code in _WEIGHTED and data == Type.FLOAT32:
        return _hybrid_version(code, operator, graph.tensors[operator.inputs[1]])
    if code in _INT4_WEIGHTS and types[1] == Type.INT4:
        return _INT4_WEIGHTS[code]
    if data == Type.INT16:
        return _INT16.get(code, 1)
    if data != Type.INT8:
        return 1
    if code == Op.FULLY_CONNECTED:
        return 6 if len(operator.inputs) == 2 else 5 if operator.builtinOptions.keepNumDims else 4
    if code == Op.TRANSPOSE_CONV and len(types) > 3:
        return 3
    return 2 if code in _INT8_IS_2 else _INT8.get(code, 1)


def _dequantize_version(tensor: schema.TensorT) -> int:
    if tensor.type == Type.INT4:
        return 6
    if tensor.type in (Type.INT16, Type.FLOAT16):
        return 3
    if tensor.type == Type.INT8:
        return 5 if is_per_channel(tensor) else 2
    return 1


def _hybrid_version(code: int, operator: schema.OperatorT, weight: schema.TensorT) -> int:
    """Return the version for float activations and integer weights."""
    if weight.type not in (Type.INT8, Type.INT4):
        return 1
    channels = is_per_channel(weight)
    if code == Op.CONV_2D:
        return 5 if channels else 2
    if code == Op.DEPTHWISE_CONV_2D:
        return 6 if channels else 4
    if code == Op.FULLY_CONNECTED:
        return 12 if channels else 9 if operator.builtinOptions.asymmetricQuantizeInputs else 3
    return 4 if operator.builtinOptions.asymmetricQuantizeInputs else 1


def is_per_channel(tensor: schema.TensorT) -> bool:
    """Return whether a tensor has more than one scale."""
    found = tensor.quantization
    return found is not None and found.scale is not None and len(found.scale) > 1
