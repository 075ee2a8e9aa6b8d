"""Weights that a TFLite file stores in few bits while its operators compute in float.

An operator with a hybrid kernel reads the integers itself and quantizes its activations as it runs; a table of rows is
read before it becomes float; anything else reads the output of a DEQUANTIZE, which LiteRT computes once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.deploy.tflite_flatbuffer import Op, TfliteFile, Type, quantization
from compress.deploy.tflite_weights import FileWeight, WeightTensors


@dataclass(frozen=True)
class _Hybrid:
    """A kernel for float activations and integer weights: their quantized dimension, `None` where it takes one scale
    only; whether it takes one scale too; whether it takes two values per byte."""

    axis: int | None
    single: bool = True
    int4: bool = False


_HYBRID = {
    Op.FULLY_CONNECTED: _Hybrid(0, int4=True),
    Op.CONV_2D: _Hybrid(0, int4=True),
    Op.DEPTHWISE_CONV_2D: _Hybrid(3, single=False),
    Op.TRANSPOSE_CONV: _Hybrid(0),
    Op.BATCH_MATMUL: _Hybrid(None),
}


def store_weights(
    file: TfliteFile, found: dict[tuple[int, int], FileWeight], tensors: WeightTensors, hybrid: bool
) -> None:
    """Replace every float constant in `found` that some operator still reads by its stored form.

    Args:
        found: `{(subgraph, tensor): weight}`.
        tensors: adds and counts the integer tensors of weights.
        hybrid: whether operators that can read the integers themselves do so; their activations are then quantized to
            8 bits while they run.
    """
    for number, graph in enumerate(file.graphs):
        weights = {tensor: weight for (owner, tensor), weight in found.items() if owner == number}
        _GraphStorage(file, graph, weights, tensors, hybrid).apply()


class _GraphStorage:
    def __init__(
        self,
        file: TfliteFile,
        graph: schema.SubGraphT,
        weights: dict[int, FileWeight],
        tensors: WeightTensors,
        hybrid: bool,
    ):
        self._file, self._graph, self._weights = file, graph, weights
        self._tensors, self._hybrid = tensors, hybrid
        self._operators: list[schema.OperatorT] = []
        self._written: set[int] = set()

    def apply(self) -> None:
        for operator in self._graph.operators or []:
            chosen = operator
            for position, index in enumerate(int(i) for i in operator.inputs):
                weight = self._weights.get(index)
                if weight is None:
                    continue
                if position == 0 and self._is_table(operator, weight):
                    chosen = self._read_rows(operator, index, weight)
                elif position == 1 and self._is_hybrid(operator, weight):
                    chosen = self._make_hybrid(chosen, index, weight)
                else:
                    self._dequantize(index, weight)
            self._operators.append(chosen)
        for index in map(int, self._graph.outputs):
            if index in self._weights:
                self._dequantize(index, self._weights[index])
        self._graph.operators = self._operators

    # Tables of rows

    def _is_table(self, operator: schema.OperatorT, weight: FileWeight) -> bool:
        if self._file.code(operator) != Op.GATHER or weight.source.dtype != "int" or weight.scale is None:
            return False
        options = operator.builtinOptions
        plain = options is None or (not options.batchDims and not options.axis)
        return plain and (weight.scale.size == 1 or weight.axis == 0)

    def _read_rows(self, operator: schema.OperatorT, index: int, weight: FileWeight) -> schema.OperatorT:
        """Add what reads rows of the integer table and return the operator that makes them float.

        GATHER takes one scale for all rows; where they differ, the scales are read like the rows.
        """
        output = int(operator.outputs[0])
        like = self._graph.tensors[output]
        single = weight.scale.size == 1
        scale = weight.scale if single else np.ones(1, "float32")
        table = self._tensors.add(self._graph, index, replace(weight, scale=scale, axis=0), False)
        rows = self._file.add_tensor(self._graph, like.name, Type.INT8, like, quantization(scale))
        self._operators.append(self._file.twin(operator, [table, operator.inputs[1]], [rows]))
        if single:
            return self._file.operator(Op.DEQUANTIZE, [rows], [output])
        values = self._file.add_tensor(self._graph, like.name, Type.FLOAT32, like)
        self._operators.append(self._file.operator(Op.DEQUANTIZE, [rows], [values]))
        column = weight.scale.reshape(-1, *[1] * (weight.values.ndim - 1))
        scales = self._file.add_tensor(self._graph, like.name, Type.FLOAT32, values=column)
        inner = weight.values.ndim - 1
        sizes = [int(size) for size in like.shape]
        sizes[len(sizes) - inner :] = [1] * inner
        read = self._file.add_tensor(self._graph, like.name, Type.FLOAT32, shape=sizes)
        self._operators.append(self._file.twin(operator, [scales, operator.inputs[1]], [read]))
        return self._product(values, read, output)

    # Operators that read integers

    def _is_hybrid(self, operator: schema.OperatorT, weight: FileWeight) -> bool:
        kernel = _HYBRID.get(self._file.code(operator))
        if not self._hybrid or kernel is None or weight.source.dtype != "int" or weight.scale is None:
            return False
        data = operator.inputs[2 if self._file.code(operator) == Op.TRANSPOSE_CONV else 0]
        if self._graph.tensors[data].type != Type.FLOAT32 or self._file.constant(self._graph, int(data)) is not None:
            return False
        return weight.scale.size == 1 or weight.axis == kernel.axis

    def _make_hybrid(self, operator: schema.OperatorT, index: int, weight: FileWeight) -> schema.OperatorT:
        kernel = _HYBRID[self._file.code(operator)]
        if not kernel.single and weight.scale.size == 1:
            channels = weight.values.shape[kernel.axis]
            weight = replace(weight, scale=np.repeat(weight.scale, channels), axis=kernel.axis)
        inputs = [int(i) for i in operator.inputs]
        inputs[1] = self._tensors.add(self._graph, index, weight, kernel.int4)
        if hasattr(operator.builtinOptions, "asymmetricQuantizeInputs"):
            operator.builtinOptions.asymmetricQuantizeInputs = True  # as XNNPACK does whatever this says
        return self._file.twin(operator, inputs, operator.outputs)

    # Float constants that become computed tensors

    def _dequantize(self, index: int, weight: FileWeight) -> None:
        """Let a float tensor be computed from the stored weight, before the operator that reads it first."""
        if index in self._written:
            return
        self._written.add(index)
        tensor, source = self._graph.tensors[index], weight.source
        if source.dtype != "int":
            self._store_floats(index, weight)
        elif weight.scale is not None:
            stored = self._tensors.add(self._graph, index, weight, True)
            self._operators.append(self._file.operator(Op.DEQUANTIZE, [stored], [index]))
        else:
            self._dequantize_rows(index, weight)
        tensor.buffer = 0

    def _store_floats(self, index: int, weight: FileWeight) -> None:
        tensor = self._graph.tensors[index]
        if weight.source.dtype == "float16":
            values = weight.values.astype("float16")
            stored = self._file.add_tensor(self._graph, tensor.name, Type.FLOAT16, values=values)
            self._tensors.record(weight, Type.FLOAT16)
            self._operators.append(self._file.operator(Op.DEQUANTIZE, [stored], [index]))
            return
        bits = np.ascontiguousarray(weight.values, "float32").view("uint32") >> 16
        stored = self._file.add_tensor(self._graph, tensor.name, Type.BFLOAT16, values=bits.astype("uint16"))
        self._tensors.record(weight, Type.BFLOAT16)
        cast = self._file.operator(Op.CAST, [stored], [index])  # DEQUANTIZE does not know the type
        cast.builtinOptionsType, cast.builtinOptions = schema.BuiltinOptions.CastOptions, schema.CastOptionsT()
        cast.builtinOptions.inDataType, cast.builtinOptions.outDataType = Type.BFLOAT16, Type.FLOAT32
        self._operators.append(cast)

    def _dequantize_rows(self, index: int, weight: FileWeight) -> None:
        """Store a weight whose scales lie along several axes, such as groups, as rows with one scale each.

        The rows are those values that share a scale, so the file holds exactly the weight; what follows the DEQUANTIZE
        puts them back into the shape that the operator reads.
        """
        name, source = self._graph.tensors[index].name, weight.source
        values, scale, order = _split_groups(source.values, source.scale, source.group_size, source.axis, weight.order)
        varying = [axis for axis in order if scale.shape[axis] > 1]
        other = [axis for axis in order if scale.shape[axis] == 1]
        by_row = values.transpose(varying + other)
        rows = by_row.reshape(scale.size, -1)
        scales = scale.transpose(varying + other).reshape(-1)
        stored = self._tensors.add(self._graph, index, replace(weight, values=rows, scale=scales, axis=0), True)
        current = self._file.add_tensor(self._graph, name, Type.FLOAT32, shape=list(rows.shape))
        self._operators.append(self._file.operator(Op.DEQUANTIZE, [stored], [current]))
        if varying + other != list(order):
            current = self._reshape(current, by_row.shape)
            turn = [(varying + other).index(axis) for axis in order]
            current = self._computed(Op.TRANSPOSE, current, [turn], [by_row.shape[i] for i in turn])
        sizes = [values.shape[axis] for axis in order]
        if source.group_size is not None:
            place = order.index(source.axis)
            sizes[place : place + 2] = [sizes[place] * sizes[place + 1]]
            if sizes[place] != source.values.shape[source.axis]:  # the last group was filled up
                current = self._reshape(current, sizes)
                sizes[place] = source.values.shape[source.axis]
                current = self._computed(Op.SLICE, current, [[0] * len(sizes), sizes], sizes)
        shape = [int(size) for size in self._graph.tensors[index].shape]
        if weight.factor is None:
            self._reshape(current, shape, index)
            return
        current = self._reshape(current, shape)
        factor = self._file.add_tensor(self._graph, name, Type.FLOAT32, values=weight.factor)
        self._operators.append(self._product(current, factor, index))

    def _product(self, one: int, other: int, output: int) -> schema.OperatorT:
        operator = self._file.operator(Op.MUL, [one, other], [output])
        operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.MulOptions, schema.MulOptionsT()
        return operator

    def _reshape(self, current: int, shape: list[int] | tuple[int, ...], output: int | None = None) -> int:
        return self._computed(Op.RESHAPE, current, [shape], shape, output)

    def _computed(
        self, code: int, current: int, arguments: list, shape: list[int] | tuple[int, ...], output: int | None = None
    ) -> int:
        """Add an operator with int32 arguments and return its output of this shape."""
        name = self._graph.tensors[current].name
        added = [
            self._file.add_tensor(self._graph, name, Type.INT32, values=np.asarray(argument, "int32"))
            for argument in arguments
        ]
        if output is None:
            sizes = [int(size) for size in shape]
            output = self._file.add_tensor(self._graph, name, Type.FLOAT32, shape=sizes)
        self._operators.append(self._file.operator(code, [current, *added], [output]))
        return output


def _split_groups(
    values: np.ndarray, scale: np.ndarray, group_size: int | None, axis: int | None, order: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return values and scales with the grouped axis as two, groups and members, and the order of their axes."""
    scale = scale.reshape((1,) * (values.ndim - scale.ndim) + scale.shape)
    if group_size is None:
        return values, scale, list(order)
    groups = scale.shape[axis]
    missing = groups * group_size - values.shape[axis]
    values = np.pad(values, [(0, missing if i == axis else 0) for i in range(values.ndim)])
    values = values.reshape(*values.shape[:axis], groups, group_size, *values.shape[axis + 1 :])
    scale = np.expand_dims(scale, axis + 1)
    split = [place for old in order for place in ((axis, axis + 1) if old == axis else (old + (old > axis),))]
    return values, scale, split
