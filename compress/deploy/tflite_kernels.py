"""What LiteRT's integer kernels ask of their tensors: one row per operator that can compute on int8 or int16.

An operator without a row stays float. One more operator is one more row here and one in tflite_versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compress.deploy.tflite_flatbuffer import Op, Type

Grid = tuple[float, int]
"""The scale and the zero point of an activation."""


@dataclass(frozen=True)
class Kernel:
    """An operator's integer kernel.

    Args:
        output: `"rescaled"` (a grid of its own), `"same"` (the grid of its inputs), `"index"` (no quantized tensor), or
            the grids that the kernel fixes, per type.
        data: positions of the inputs that are activations; `None` means all.
        weight: position of the input that is a weight, whose quantized dimension is `axis`.
        bias: position of the bias.
        moves: whether it only moves values, so its output may be quantized before it instead.
        int16: whether the kernel takes int16 too.
        int4: whether the kernel takes weights of 4 bits, two per byte, with int8 activations.
    """

    output: Literal["rescaled", "same", "index"] | dict[int, Grid] = "rescaled"
    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    axis: int | None = 0
    bias: int | None = None
    moves: bool = False
    int16: bool = True
    int4: bool = False


def _fixed(int8: Grid, int16: Grid | None = None) -> Kernel:
    grids = {Type.INT8: int8} | ({Type.INT16: int16} if int16 else {})
    return Kernel(output=grids, int16=int16 is not None)


_MOVE = Kernel(output="same", moves=True)
_MOVE_INT8 = Kernel(output="same", moves=True, int16=False)
_POOL = Kernel(output="same")
_JOIN = Kernel(output="same", data=None, moves=True)
_UNARY, _UNARY_INT8 = Kernel(), Kernel(int16=False)
_BINARY = Kernel(data=(0, 1))
_UNIT_INT16 = (1 / 32768, 0)

KERNELS: dict[int, Kernel] = {
    Op.CONV_2D: Kernel(weight=1, axis=0, bias=2, int4=True),
    Op.DEPTHWISE_CONV_2D: Kernel(weight=1, axis=3, bias=2, int4=True),
    Op.FULLY_CONNECTED: Kernel(weight=1, axis=0, bias=2, int4=True),
    Op.TRANSPOSE_CONV: Kernel(data=(2,), weight=1, axis=0, bias=3),
    Op.BATCH_MATMUL: Kernel(data=(0, 1), axis=None),
    Op.ADD: _BINARY,
    Op.SUB: _BINARY,
    Op.MUL: _BINARY,
    Op.SQUARED_DIFFERENCE: Kernel(data=(0, 1), int16=False),
    Op.MEAN: _UNARY,
    Op.SUM: _UNARY_INT8,
    Op.RELU: _UNARY,
    Op.RELU6: _UNARY,
    Op.RELU_N1_TO_1: _UNARY_INT8,
    Op.LEAKY_RELU: _UNARY,
    Op.PRELU: Kernel(data=(0, 1), int16=False),
    Op.HARD_SWISH: _UNARY_INT8,
    Op.GELU: _UNARY_INT8,
    Op.ELU: _UNARY_INT8,
    Op.EXP: _UNARY,
    Op.LOG: _UNARY,
    Op.ABS: _UNARY,
    Op.RSQRT: _UNARY,
    Op.SOFTMAX: _fixed((1 / 256, -128), _UNIT_INT16),
    Op.LOGISTIC: _fixed((1 / 256, -128), _UNIT_INT16),
    Op.TANH: _fixed((1 / 128, 0), _UNIT_INT16),
    Op.LOG_SOFTMAX: _fixed((16 / 256, 127)),
    Op.L2_NORMALIZATION: _fixed((1 / 128, 0)),
    Op.MAX_POOL_2D: Kernel(output="same", moves=True),
    Op.AVERAGE_POOL_2D: _POOL,
    Op.REDUCE_MAX: Kernel(output="same", moves=True),
    Op.REDUCE_MIN: Kernel(output="same", moves=True),
    Op.RESIZE_BILINEAR: _POOL,
    Op.RESIZE_NEAREST_NEIGHBOR: _MOVE,
    Op.RESHAPE: _MOVE,
    Op.TRANSPOSE: _MOVE,
    Op.SQUEEZE: _MOVE,
    Op.EXPAND_DIMS: _MOVE,
    Op.PAD: _MOVE,
    Op.PADV2: Kernel(output="same", data=(0, 2), moves=True),
    Op.MIRROR_PAD: _MOVE,
    Op.SLICE: _MOVE,
    Op.STRIDED_SLICE: _MOVE,
    Op.GATHER: _MOVE,
    Op.GATHER_ND: _MOVE,
    Op.SPLIT: Kernel(output="same", data=(1,), moves=True),
    Op.SPLIT_V: _MOVE,
    Op.UNPACK: _MOVE,
    Op.TILE: _MOVE_INT8,
    Op.REVERSE_V2: _MOVE_INT8,
    Op.BROADCAST_TO: _MOVE,
    Op.SPACE_TO_BATCH_ND: _MOVE,
    Op.BATCH_TO_SPACE_ND: _MOVE,
    Op.SPACE_TO_DEPTH: _MOVE_INT8,
    Op.DEPTH_TO_SPACE: _MOVE_INT8,
    Op.CONCATENATION: _JOIN,
    Op.PACK: _JOIN,
    Op.MAXIMUM: _JOIN,
    Op.MINIMUM: _JOIN,
    Op.SELECT_V2: Kernel(output="same", data=(1, 2), moves=True),
    Op.SELECT: Kernel(output="same", data=(1, 2), moves=True),
    Op.ARG_MAX: Kernel(output="index", int16=False),
    Op.ARG_MIN: Kernel(output="index", int16=False),
    Op.SHAPE: Kernel(output="index"),
}
"""Operator -> its integer kernel."""
