"""An ONNX graph that is being rewritten: who makes and who reads each tensor, kept up to date while nodes change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from compress.deploy.onnx_digests import bodies

_SMALL = 16


class OnnxGraph:
    """The main graph of a model. Call `write` when done; until then the model is not changed.

    Bodies of loops and branches read tensors of the main graph without listing them as inputs; such reads count as
    reads of the node that holds the body.

    Attributes:
        nodes: the nodes, in no order.
        constants: name -> constant tensor.
    """

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, dict[int, onnx.NodeProto]] = {}
        self._taken = {*self.constants, *self.inputs, *self.outputs}
        self._count = 0
        self._small: dict[bytes, str] = {}
        for node in self.nodes:
            self._taken.update(name for inner in _with_bodies(node) for name in (*inner.input, *inner.output))
            self._enter(node)
        self._lift_constant_nodes()

    def maker(self, name: str) -> onnx.NodeProto | None:
        """Return the node that makes a tensor; `None` for inputs and constants."""
        return self._makers.get(name)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """Return the nodes that read a tensor, each once, in the order in which they began to."""
        return list(self._readers.get(name, {}).values())

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """Return the one node that reads a tensor, or `None` where others, or the graph's outputs, need it too."""
        readers = self.readers(name)
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def value(self, name: str) -> np.ndarray | None:
        """Return a constant's values, or `None` for what is no constant."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def new_name(self, wish: str) -> str:
        """Return a name that nothing has."""
        while True:
            self._count += 1
            name = f"{wish}__{self._count}"
            if name not in self._taken:
                self._taken.add(name)
                return name

    def add_constant(self, values: np.ndarray) -> str:
        """Add a constant and return its name; small ones are kept once."""
        tensor = numpy_helper.from_array(values)
        key = tensor.SerializeToString(deterministic=True) if values.size <= _SMALL else None
        if key in self._small:
            return self._small[key]
        tensor.name = self.new_name("constant")
        self.constants[tensor.name] = tensor
        if key is not None:
            self._small[key] = tensor.name
        return tensor.name

    def add(
        self, op_type: str, inputs: list[str], *, name: str = "", outputs: int | list[str] = 1, **options: Any
    ) -> str:
        """Add a node and return its first output.

        Args:
            op_type: operator of the standard domain.
            inputs: names of tensors.
            name: name of the node, which tells its layer.
            outputs: how many outputs, or their names.
            options: attributes.
        """
        names = [self.new_name("tensor") for _ in range(outputs)] if isinstance(outputs, int) else outputs
        node = onnx.helper.make_node(op_type, inputs, names, name=name or op_type, **options)
        self.nodes.append(node)
        self._enter(node)
        return names[0]

    def remove(self, node: onnx.NodeProto) -> None:
        """Take a node out; its outputs have no maker any more."""
        self._leave(node)
        self.nodes = [other for other in self.nodes if other is not node]

    def set_input(self, node: onnx.NodeProto, place: int, name: str) -> None:
        """Let a node read another tensor at one place."""
        self._leave(node)
        while len(node.input) <= place:
            node.input.append("")
        node.input[place] = name
        self._enter(node)

    def move_readers(self, old: str, new: str, *, but: onnx.NodeProto | None = None) -> None:
        """Let all nodes but one that read `old` read `new`; outputs of the graph stay with `old`."""
        for node in self.readers(old):
            if node is not but:
                self.rename_reads(node, old, new)

    def rename_reads(self, node: onnx.NodeProto, old: str, new: str) -> None:
        """Let a node, and its bodies, read `new` wherever it reads `old`."""
        self._leave(node)
        _rename(node, old, new)
        self._enter(node)

    def replace(self, old: str, new: str) -> None:
        """Let `new` take the place of the tensor `old`, whose maker must be gone, also as an output of the graph."""
        self.move_readers(old, new)
        if old in self.outputs:
            self.expose(new, old)

    def expose(self, name: str, output: str) -> None:
        """Let a tensor be the graph's output `output`, which has no maker."""
        maker = self.maker(name)
        if maker is None or name in self.outputs:
            self.add("Identity", [name], outputs=[output])
            return
        self._leave(maker)
        maker.output[list(maker.output).index(name)] = output
        self._enter(maker)
        self.move_readers(name, output)

    def rename_output(self, name: str) -> str:
        """Give the tensor that is the graph's output `name` another name and return it; the output has no maker."""
        maker = self._makers[name]
        new = self.new_name("tensor")
        self._leave(maker)
        maker.output[list(maker.output).index(name)] = new
        self._enter(maker)
        self.move_readers(name, new)
        return new

    def implicit_reads(self, node: onnx.NodeProto) -> list[str]:
        """Return the tensors of the main graph that the bodies of a node read."""
        return [name for name in _reads(node) if name not in node.input]

    def write(self) -> None:
        """Put nodes, sorted, and the constants that they use into the model."""
        graph = self.model.graph
        nodes = self._sorted()
        used = {name for node in nodes for name in _reads(node)} | set(self.outputs)
        kept = [(name, tensor) for name, tensor in self.constants.items() if name in used]
        copies = [_copy(node) for node in nodes]
        tensors = [tensor if tensor.name == name else _copy(tensor) for name, tensor in kept]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(copies)
        _replace_tensors(graph, tensors)

    def _sorted(self) -> list[onnx.NodeProto]:
        order: list[onnx.NodeProto] = []
        done: dict[int, bool] = {}
        stack = [self._makers[name] for name in reversed(self.outputs) if name in self._makers]
        while stack:
            node = stack[-1]
            if id(node) in done:
                stack.pop()
                if not done[id(node)]:
                    done[id(node)] = True
                    order.append(node)
                continue
            done[id(node)] = False
            makers = [self._makers[name] for name in _reads(node) if name in self._makers]
            stack.extend(maker for maker in reversed(makers) if id(maker) not in done)
        return order

    def _lift_constant_nodes(self) -> None:
        """Turn `Constant` nodes of the main graph into constants."""
        for node in [node for node in self.nodes if node.op_type == "Constant"]:
            value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            if value is not None and node.output[0] not in self.outputs:
                tensor = _copy(value)
                tensor.name = node.output[0]
                self.remove(node)
                self.constants[tensor.name] = tensor

    def _enter(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            if name:
                self._makers[name] = node
        for name in _reads(node):
            self._readers.setdefault(name, {})[id(node)] = node

    def _leave(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            self._makers.pop(name, None)
        for name in _reads(node):
            self._readers.get(name, {}).pop(id(node), None)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute of a node, or `default`."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set an attribute of a node, or remove it where `value` is `None`."""
    kept = [item for item in node.attribute if item.name != name]
    new = [] if value is None else [onnx.helper.make_attribute(name, value)]
    copies = [_copy(item) for item in kept]
    del node.attribute[:]
    node.attribute.extend([*copies, *new])


def _reads(node: onnx.NodeProto) -> list[str]:
    """Return the names that a node reads, each once, those that its bodies take from around them too."""
    names = [name for name in node.input if name]
    for item in node.attribute:
        for body in bodies(item):
            own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
            own.update(name for inner in body.node for name in inner.output)
            inside = [name for inner in body.node for name in _reads(inner)]
            inside.extend(value.name for value in body.output)
            names.extend(name for name in inside if name not in own)
    return list(dict.fromkeys(names))


def _rename(node: onnx.NodeProto, old: str, new: str) -> None:
    for i, name in enumerate(node.input):
        if name == old:
            node.input[i] = new
    for item in node.attribute:
        for body in bodies(item):
            for inner in body.node:
                _rename(inner, old, new)
            for value in body.output:
                if value.name == old:
                    value.name = new


def _with_bodies(node: onnx.NodeProto) -> Iterator[Any]:
    yield node
    for item in node.attribute:
        for body in bodies(item):
            for inner in body.node:
                yield from _with_bodies(inner)


def _replace_tensors(graph: onnx.GraphProto, tensors: list[onnx.TensorProto]) -> None:
    copies = [_copy(tensor) for tensor in tensors]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
