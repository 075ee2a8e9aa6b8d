"""The integer form of a TFLite graph in which fake quantization is written as QUANTIZE and DEQUANTIZE.

Wherever the inputs of an operator come from integers and its outputs go to integers, the operator itself computes on
integers: the grids are those of the fake quantization and the weights are the stored ones, number by number. This is
the quantized graph of Jacob et al. 2017, arXiv:1712.05877, section 3; TensorFlow's converter would derive scales again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.deploy.tflite_biases import fit_weight, quantize_bias
from compress.deploy.tflite_flatbuffer import INTEGER_TYPES, Op, TfliteFile, Type, has_grid, quantization, read_grid
from compress.deploy.tflite_kernels import KERNELS, Grid, Kernel
from compress.deploy.tflite_weights import FileWeight, WeightTensors
from compress.errors import ExportError

_SIGNED = {Type.UINT8: (Type.INT8, "int8", 128), Type.UINT16: (Type.INT16, "int16", 32768)}
_KEEPS_SIZE = {
    Op.RESHAPE, Op.TRANSPOSE, Op.SQUEEZE, Op.EXPAND_DIMS, Op.SPACE_TO_DEPTH, Op.DEPTH_TO_SPACE, Op.PAD,
}  # fmt: skip
_EXACT = 2.0**-20  # relative error up to which a constant counts as representable
_MARKER = b"FakeQuant"  # in the name of every tensor that a fake quantization made


class IntegerGraph:
    """One subgraph on its way to integers.

    Args:
        file: the open file, which is changed.
        number: index of the subgraph.
        weights: `{tensor: weight}` of the constants of this subgraph that are stored weights.
        tensors: adds and counts the integer tensors of weights.
    """

    def __init__(self, file: TfliteFile, number: int, weights: dict[int, FileWeight], tensors: WeightTensors):
        self._file, self._graph, self._weights, self._tensors = file, file.graphs[number], weights, tensors
        self._operators: list[schema.OperatorT] = []
        self._integers: dict[int, int] = {}  # float tensor -> the integer tensor with its values
        self._aliases: dict[int, int] = {}  # integer tensor -> the one that took its place
        self._written: set[int] = set()  # float tensors that exist in the new graph
        self._moved: dict[tuple[int, Grid], int] = {}
        self._readers: dict[int, list[schema.OperatorT]] = {}

    def lower(self) -> None:
        """Rewrite the subgraph in place."""
        self._make_signed()
        self._drop_guesses()
        for operator in self._graph.operators:
            for index in operator.inputs:
                self._readers.setdefault(int(index), []).append(operator)
        for operator in self._graph.operators:
            code = self._file.code(operator)
            if code == Op.QUANTIZE:
                self._lower_quantize(operator)
            elif code == Op.DEQUANTIZE and self._type(operator.inputs[0]) in INTEGER_TYPES:
                self._integers[int(operator.outputs[0])] = self._resolve(operator.inputs[0])
            elif not self._lower_operator(operator, KERNELS.get(code)):
                self._keep_float(operator)
        for index in self._graph.outputs:
            self._write_float(int(index))
        self._graph.operators = self._operators

    # Preparation

    def _make_signed(self) -> None:
        """Give tensors that the converter made unsigned the signed types of the kernels; the values stay."""
        for tensor in self._graph.tensors:
            if tensor.type not in _SIGNED or tensor.quantization is None or tensor.quantization.scale is None:
                continue
            kind, dtype, offset = _SIGNED[tensor.type]
            data = self._file.model.buffers[tensor.buffer].data
            if data is not None:
                values = np.asarray(data, "uint8").view(f"u{dtype}").astype("int64") - offset
                buffer = schema.BufferT()
                buffer.data = values.astype(dtype).view("uint8")
                tensor.buffer = len(self._file.model.buffers)
                self._file.model.buffers.append(buffer)
            zero_point = int(tensor.quantization.zeroPoint[0]) - offset
            if kind == Type.INT16 and zero_point:
                raise ExportError(
                    f"16-bit activations must have zero in the middle of their range in TFLite. Received: zero point "
                    f"{zero_point} at {tensor.name.decode()!r}",
                    "Quantize them from -32768 to 32767 steps.",
                )
            tensor.type, tensor.quantization = kind, quantization(tensor.quantization.scale, zero_point)

    def _drop_guesses(self) -> None:
        """Remove the rounding that the converter adds after MEAN and the like, although the model has none there."""
        makers = {int(output): operator for operator in self._graph.operators for output in operator.outputs}
        replaced: dict[int, int] = {}
        kept = []
        for operator in self._graph.operators:
            operator.inputs = [replaced.get(int(i), int(i)) for i in operator.inputs]
            code, source = self._file.code(operator), int(operator.inputs[0]) if len(operator.inputs) else -1
            if (code == Op.QUANTIZE and self._is_guess(operator, makers.get(source), makers)) or (
                code == Op.DEQUANTIZE and self._type(source) == Type.FLOAT32
            ):
                replaced[int(operator.outputs[0])] = source
            else:
                kept.append(operator)
        self._graph.operators = kept

    def _is_guess(
        self, quantize: schema.OperatorT, maker: schema.OperatorT | None, makers: dict[int, schema.OperatorT]
    ) -> bool:
        output = self._graph.tensors[quantize.outputs[0]]
        if maker is None or int(quantize.outputs[0]) in self._graph.outputs:
            return False
        before = makers.get(int(maker.inputs[0])) if len(maker.inputs) else None
        while before is not None and (kernel := KERNELS.get(self._file.code(before))) and kernel.moves:
            before = makers.get(int(before.inputs[0]))
        if before is None or self._file.code(before) != Op.DEQUANTIZE:
            return False
        source = self._graph.tensors[before.inputs[0]]
        # The converter joins the names of what it fuses, so a guess may bear the marker of what it reads.
        return read_grid(source) == read_grid(output) and not _markers(output.name) - _markers(source.name)

    # Single operators

    def _lower_quantize(self, operator: schema.OperatorT) -> None:
        source, output = int(operator.inputs[0]), int(operator.outputs[0])
        held = self._integer(source)
        if held is None:
            self._write_float(source)
            self._operators.append(operator)
        elif self._grid(held) == self._grid(output) and self._type(held) == self._type(output):
            self._aliases[output] = held
        else:
            self._operators.append(self._file.twin(operator, [held], [output]))

    def _lower_operator(self, operator: schema.OperatorT, kernel: Kernel | None) -> bool:
        """Add the integer form of an operator, or return False where it has none."""
        if kernel is None or not len(operator.inputs):
            return False
        positions = [i for i in kernel.data or range(len(operator.inputs)) if i < len(operator.inputs)]
        held = {i: self._integer(int(operator.inputs[i])) for i in positions}
        if kernel.moves and held == {positions[0]: None}:
            held = {positions[0]: self._quantize_before(operator, positions[0])}
        known = [index for index in held.values() if index is not None]
        kinds = {self._type(index) for index in known}
        if len(kinds) != 1 or (kinds == {Type.INT16} and not kernel.int16) or not kinds <= {Type.INT8, Type.INT16}:
            return False
        kind = kinds.pop()
        inputs = [int(i) for i in operator.inputs]
        if kernel.output == "index":
            inputs[positions[0]] = known[0]
            self._operators.append(self._file.twin(operator, inputs, operator.outputs))
            self._written.update(int(i) for i in operator.outputs)
            return True
        grids = [self._output_grid(operator, kernel, kind, known, output) for output in operator.outputs]
        if None in grids:
            return False
        changes: list[Callable[[], int]] = []
        for position in positions:
            change = self._data_input(int(operator.inputs[position]), held[position], kind, kernel, grids[0])
            if change is None:
                return False
            changes.append(change)
        weights = self._weight_inputs(operator, kernel, kind, known[0])
        if weights is None:
            return False
        for position, change in zip(positions, changes, strict=True):
            inputs[position] = change()
        for position, index in weights.items():
            inputs[position] = index
        outputs = [
            self._add_integer(int(output), kind, grid) for output, grid in zip(operator.outputs, grids, strict=True)
        ]
        self._operators.append(self._file.twin(operator, inputs, outputs))
        self._integers.update(zip((int(i) for i in operator.outputs), outputs, strict=True))
        return True

    def _quantize_before(self, operator: schema.OperatorT, position: int) -> int | None:
        """Return the quantized input of an operator that moves values which are quantized afterwards, or `None`."""
        index = int(operator.inputs[position])
        if self._type(index) != Type.FLOAT32:
            return None
        if self._file.constant(self._graph, index) is not None:
            return self._table(operator, index)
        if self._file.code(operator) not in _KEEPS_SIZE and index not in {int(i) for i in self._graph.inputs}:
            return None  # fewer values are left to quantize after it
        for kind in (Type.INT8, Type.INT16):
            grids = {self._wanted_grid(int(output), kind) for output in operator.outputs}
            if len(grids) == 1 and None not in grids:
                self._write_float(index)
                return self._move(index, kind, grids.pop())
        return None

    def _table(self, operator: schema.OperatorT, index: int) -> int | None:
        """Return the integers of a table of rows that have one scale, such as an embedding, or `None`."""
        weight = self._weights.get(index)
        if self._file.code(operator) != Op.GATHER or weight is None or weight.scale is None or weight.scale.size > 1:
            return None
        grids = {self._wanted_grid(int(output), Type.INT8) for output in operator.outputs}
        return None if None in grids else self._tensors.add(self._graph, index, weight, False)

    def _output_grid(
        self, operator: schema.OperatorT, kernel: Kernel, kind: int, known: Sequence[int], output: int
    ) -> Grid | None:
        """Return the grid that an output gets, or `None` where the model has it in float."""
        if kernel.output == "same" and (kernel.data is not None and len(kernel.data) == 1):
            return self._grid(known[0])
        wanted = self._wanted_grid(int(output), kind)
        if wanted is None and kernel.output == "same":
            grids = {self._grid(index) for index in known}
            return grids.pop() if len(grids) == 1 else None
        if wanted is not None and isinstance(kernel.output, dict):
            return kernel.output[kind]
        return wanted

    def _wanted_grid(self, index: int, kind: int) -> Grid | None:
        """Return the grid onto which all readers of a float tensor put it, looking past what only moves values."""
        if index in {int(i) for i in self._graph.outputs} or not self._readers.get(index):
            return None
        grids = set()
        for reader in self._readers[index]:
            code = self._file.code(reader)
            kernel = KERNELS.get(code)
            if code == Op.QUANTIZE and self._type(reader.outputs[0]) == kind:
                grids.add(self._grid(int(reader.outputs[0])))
            elif kernel is not None and kernel.moves and (kind == Type.INT8 or kernel.int16):
                grids.update(self._wanted_grid(int(output), kind) for output in reader.outputs)
            elif kernel is None or kernel.output != "index":
                return None
        return grids.pop() if len(grids) == 1 else None

    def _data_input(
        self, index: int, held: int | None, kind: int, kernel: Kernel, grid: Grid
    ) -> Callable[[], int] | None:
        """Return what makes the integer form of an input, or `None` where there is none."""
        if held is not None:
            if kernel.output == "same" and self._grid(held) != grid:
                return lambda: self._move(held, kind, grid)
            return lambda: held
        constant = self._file.constant(self._graph, index)
        if constant is None or constant.dtype != "float32" or constant.size == 0:
            return None
        if index in self._weights:
            weight = self._weights[index]
            if weight.scale is None or weight.scale.size > 1 or kernel.output == "same":
                return None
            return lambda: self._factor(index, weight, kind)
        return self._constant_input(index, constant, kind, grid if kernel.output == "same" else None)

    def _factor(self, index: int, weight: FileWeight, kind: int) -> int:
        """Return the tensor of a weight that its operator reads as it reads activations, so in their type."""
        if kind == Type.INT8:
            return self._tensors.add(self._graph, index, weight, False)
        self._tensors.record(weight, kind)
        name, values = self._graph.tensors[index].name, weight.values.astype("int16")
        return self._file.add_tensor(self._graph, name, kind, quantization=quantization(weight.scale), values=values)

    def _constant_input(
        self, index: int, constant: np.ndarray, kind: int, grid: Grid | None
    ) -> Callable[[], int] | None:
        """Return what makes an integer constant, or `None` where integers would change its values."""
        limit = 127 if kind == Type.INT8 else 32767
        largest = float(np.abs(constant).max())
        if not np.isfinite(largest):
            return None
        scale, zero_point = grid or (float(np.float32(largest / limit)) if largest else 1.0, 0)
        values = np.clip(np.rint(constant / np.float32(scale)) + zero_point, -limit - 1, limit)
        error = np.abs((values - zero_point) * scale - constant).max()
        if grid is None and kind == Type.INT8 and error > _EXACT * largest:
            return None
        if grid is not None and error > scale:
            return None  # beyond the grid, as the great negative number of a mask is
        name = self._graph.tensors[index].name
        dtype = "int8" if kind == Type.INT8 else "int16"
        return lambda: self._file.add_tensor(
            self._graph, name, kind, quantization=quantization(scale, zero_point), values=values.astype(dtype)
        )

    def _weight_inputs(self, operator: schema.OperatorT, kernel: Kernel, kind: int, data: int) -> dict[int, int] | None:
        """Return `{position: tensor}` of the integer weight and bias of an operator, or `None` where it has none."""
        if kernel.weight is None:
            return {}
        index = int(operator.inputs[kernel.weight])
        weight = self._weights.get(index)
        if weight is None or weight.scale is None or weight.source.dtype != "int":
            return None
        if weight.scale.size > 1 and weight.axis != kernel.axis:
            return None
        packs = kernel.int4 and kind == Type.INT8
        has_bias = kernel.bias is not None and len(operator.inputs) > kernel.bias and operator.inputs[kernel.bias] >= 0
        if not has_bias:
            return {kernel.weight: self._tensors.add(self._graph, index, weight, packs)}
        bias = self._file.constant(self._graph, int(operator.inputs[kernel.bias]))
        if bias is None:
            return None
        scale, _ = self._grid(data)
        weight = fit_weight(weight, bias, scale, kind == Type.INT16)
        values, grid = quantize_bias(bias, scale, weight.scale, kind == Type.INT16)
        name = self._graph.tensors[operator.inputs[kernel.bias]].name
        kind_of_bias = Type.INT64 if kind == Type.INT16 else Type.INT32
        added = self._file.add_tensor(self._graph, name, kind_of_bias, quantization=quantization(grid), values=values)
        return {kernel.weight: self._tensors.add(self._graph, index, weight, packs), kernel.bias: added}

    # Tensors

    def _keep_float(self, operator: schema.OperatorT) -> None:
        inputs = []
        for index in map(int, operator.inputs):
            # the converter sometimes lets a float operator read integers
            integers = index >= 0 and self._type(index) in INTEGER_TYPES and self._is_grid(index)
            inputs.append(self._dequantized(index) if integers else index)
            self._write_float(inputs[-1])
        self._operators.append(self._file.twin(operator, inputs, operator.outputs))

    def _dequantized(self, index: int) -> int:
        held = self._resolve(index)
        name = self._graph.tensors[held].name
        added = self._file.add_tensor(self._graph, name, Type.FLOAT32, like=self._graph.tensors[held])
        self._integers[added] = held
        return added

    def _write_float(self, index: int) -> None:
        """Add the DEQUANTIZE that gives a float tensor its values, where only their integers exist so far."""
        held = self._integers.get(index)
        if held is None or index in self._written:
            return
        self._written.add(index)
        self._operators.append(self._file.operator(Op.DEQUANTIZE, [held], [index]))

    def _move(self, held: int, kind: int, grid: Grid) -> int:
        """Return an integer tensor put onto another grid."""
        key = (held, grid)
        if key not in self._moved:
            self._moved[key] = self._add_integer(held, kind, grid)
            self._operators.append(self._file.operator(Op.QUANTIZE, [held], [self._moved[key]]))
        return self._moved[key]

    def _add_integer(self, like: int, kind: int, grid: Grid) -> int:
        tensor = self._graph.tensors[like]
        return self._file.add_tensor(self._graph, tensor.name, kind, like=tensor, quantization=quantization(*grid))

    def _integer(self, index: int) -> int | None:
        """Return the integer tensor with the values of a tensor, or `None`."""
        if index < 0:
            return None
        if self._type(index) in INTEGER_TYPES and self._is_grid(index):
            return self._resolve(index)
        return self._integers.get(index)

    def _resolve(self, index: int) -> int:
        return self._aliases.get(int(index), int(index))

    def _type(self, index: int) -> int:
        return self._graph.tensors[index].type

    def _is_grid(self, index: int) -> bool:
        return has_grid(self._graph.tensors[index])

    def _grid(self, index: int) -> Grid:
        return read_grid(self._graph.tensors[index])


def _markers(name: bytes) -> set[bytes]:
    """Return the parts of a tensor's name that say which quantizers of the model it went through."""
    return {part.rpartition(_MARKER)[0] for part in name.split(b";") if _MARKER in part}
