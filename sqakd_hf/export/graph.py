"""The few operations on a graph of ONNX that lowering needs."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


INT8 = np.iinfo(np.int8)
# Operators that put elements elsewhere, and zeros between.
MOVES = {"Flatten", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


class Graph:
    """A graph, and names in it that are unique."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._names = {value.name for node in graph for value in node.outputs} | set(graph.initializers)

    def constant(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """Add an initialiser; `name` is made unique."""
        unique = self._unique(name)
        tensor = ir.tensor(array, dtype=dtype, name=unique)
        value = ir.Value(
            name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.initializers[unique] = value
        return value

    def insert(
        self,
        before: ir.Node,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType = ir.DataType.FLOAT,
        shape: ir.Shape | None = None,
        **attributes: int | ir.Attr,
    ) -> ir.Value:
        """Insert a node in front of another one and return its output."""
        name = self._unique(name)
        output = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
        node = ir.node(operator, inputs, attributes or None, outputs=[output], name=name)
        self.graph.insert_before(before, node)
        return output

    def _unique(self, name: str) -> str:
        unique, number = name, 1
        while unique in self._names:
            unique, number = f"{name}.{number}", number + 1
        self._names.add(unique)
        return unique

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let `value` take the place of the node's output."""
        (old,) = node.outputs
        if old.is_graph_output():
            value.name, old.name = old.name, f"{old.name}.replaced"
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the one node that uses `value`, if there is one and the value is no output of the graph."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def array_of(value: ir.Value) -> np.ndarray:
    """Return what an initialiser holds."""
    return value.const_value.numpy()
