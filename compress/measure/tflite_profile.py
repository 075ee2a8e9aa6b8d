"""The time of each operator of a `.tflite` file, each made a file of its own and run alone in LiteRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from compress.deploy.litert import LiteRtRuntime
from compress.deploy.runtimes import one_line
from compress.measure.children import random_array, random_inputs
from compress.measure.profiling import median_ms
from compress.measure.tflite_contents import operator_name
from compress.measure.timing import time_runs

_WARM_UP = 10
_HIDDEN = {"WHILE", "IF", "CALL", "CALL_ONCE", "STABLEHLO_COMPOSITE"}
_KERNELS = {"convolution", "depthwise", "MatMul", "Conv2D", "Conv3D", "einsum", "Einsum", "BiasAdd"}
"""What names of computations with weights end in."""
_EMPTY = -1


def profile(path: str, threads: int, batch: int, runs: int) -> dict[str, Any]:
    """Return the facts of a profile; runs in the child process."""
    runtime = LiteRtRuntime(Path(path), threads)
    inputs = random_inputs(runtime, batch, np.random.default_rng(0))
    whole = time_runs(lambda: runtime.run(inputs), runs, _WARM_UP)
    content = Path(path).read_bytes()
    tables = schema.Model.GetRootAs(content)
    model = schema.ModelT.InitFromObj(tables)
    graph = model.subgraphs[0]
    shapes = {each["index"]: each["shape"] for each in runtime.tensor_details()}
    operators = []
    for index, operator in enumerate(graph.operators):
        kind = operator_name(tables, tables.Subgraphs(0).Operators(index))
        name = _name(graph.tensors[operator.outputs[0]]) if len(operator.outputs) else ""
        found: dict[str, Any] = {"type": kind, "name": name, "labels": _labels(model, operator)}
        try:
            if kind in _HIDDEN:
                raise ValueError("what it calls is not timed")
            alone = _Alone(model, operator, shapes, threads)
            found["time_ms"] = float(np.mean(time_runs(alone.run, runs, _WARM_UP))) / 1e6
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # LiteRT, for what it cannot run alone
            found |= {"time_ms": None, "reasons": {"time_ms": f"cannot be run alone: {one_line(error)}"}}
        operators.append(found)
    return {"runtime": f"ai-edge-litert {runtime.version}", "whole_ms": median_ms(whole), "operators": operators}


def _labels(model: schema.ModelT, operator: Any) -> list[str]:
    """Return the names that may tell the layer: of the weighing part of what was merged, of the rest, of weights."""
    tensors = model.subgraphs[0].tensors
    own = [label for index in operator.outputs for label in _name(tensors[index]).split(";")]
    own.sort(key=lambda label: label.rpartition("/")[2].partition("_")[0] not in _KERNELS)
    constants = [tensors[i] for i in operator.inputs if i != _EMPTY and _holds_data(model, tensors[i])]
    labels = own + [label for tensor in constants for label in _name(tensor).split(";")]
    return [label for label in labels if "/" in label]


def _name(tensor: Any) -> str:
    return (tensor.name or b"").decode(errors="replace")


def _holds_data(model: schema.ModelT, tensor: Any) -> bool:
    data = model.buffers[tensor.buffer].data
    return data is not None and len(data) > 0


class _Alone:
    """One operator as a model of its own, opened and with inputs."""

    def __init__(self, model: schema.ModelT, operator: Any, shapes: dict[int, Any], threads: int):
        self._interpreter = Interpreter(model_content=_cut_out(model, operator, shapes), num_threads=threads)
        self._interpreter.allocate_tensors()
        generator = np.random.default_rng(0)
        for details in self._interpreter.get_input_details():
            array = random_array(generator, tuple(details["shape"]), np.dtype(details["dtype"]).name, details["name"])
            self._interpreter.set_tensor(details["index"], array)
        self.run = self._interpreter.invoke


def _cut_out(model: schema.ModelT, operator: Any, shapes: dict[int, Any]) -> bytes:
    """Return a file with one operator; what it reads is an input where the file does not hold it."""
    graph = model.subgraphs[0]
    cut = schema.ModelT()
    cut.version, cut.operatorCodes = model.version, model.operatorCodes
    cut.buffers = [schema.BufferT()]
    new = schema.SubGraphT()
    new.tensors, places = [], {}
    for index in dict.fromkeys([*operator.inputs.tolist(), *operator.outputs.tolist(), *_intermediates(operator)]):
        if index == _EMPTY:
            continue
        old = graph.tensors[index]
        tensor = schema.TensorT()
        vars(tensor).update(vars(old))
        tensor.shape, tensor.shapeSignature = np.array(shapes.get(index, old.shape), np.int32), None
        tensor.buffer = 0
        if _holds_data(model, old):
            cut.buffers.append(model.buffers[old.buffer])
            tensor.buffer = len(cut.buffers) - 1
        places[index] = len(new.tensors)
        new.tensors.append(tensor)
    alone = schema.OperatorT()
    vars(alone).update(vars(operator))
    alone.inputs = np.array([places.get(index, _EMPTY) for index in operator.inputs.tolist()], np.int32)
    alone.outputs = np.array([places[index] for index in operator.outputs.tolist()], np.int32)
    if _intermediates(operator):
        alone.intermediates = np.array([places[index] for index in _intermediates(operator)], np.int32)
    new.operators = [alone]
    given = [index for index in dict.fromkeys(operator.inputs.tolist()) if index != _EMPTY]
    new.inputs = np.array(
        [places[i] for i in given if not new.tensors[places[i]].buffer and not graph.tensors[i].isVariable], np.int32
    )
    new.outputs = alone.outputs
    cut.subgraphs = [new]
    builder = flatbuffers.Builder(1024)
    builder.Finish(cut.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _intermediates(operator: Any) -> list[int]:
    return [] if operator.intermediates is None else [int(each) for each in operator.intermediates]
