"""From symbols to ONNX's own operators: integers in the initialisers, QuantizeLinear and DequantizeLinear around them.

A student's value is `(code - zero_point) * scale`. Here its codes become integers `i = factor * code + offset` of a
type that engines compute with, such that the value is `(i - z) * scale / factor` for a whole `z`; nothing else
changes, but for the order of a few float operations.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from .activations import Activation
from .graph import MOVES, Graph, only_user
from .integer_tensors import Placement
from .symbolic_model import DEQUANTIZE, DOMAIN, QUANTIZE
from .weights import Weight


CONTAINERS = ("int8", "packed")
# Operators that may stand between a product with a float weight and QuantizeLinear.
FOLLOW = {"Add", "BatchNormalization", "Clip", "Identity", "Mul", "Relu"}


def lower(model: ir.Model, container: str, signed_activations: bool = False) -> list[Placement]:
    """Replace all symbols of `model`, in place, and return what became of each.

    Args:
        model (`ir.Model`): As exported from [`~sqakd_hf.export.symbolic_model.Symbolic`].
        container (`str`): `"int8"`: 8-bit integers for codes of every width. `"packed"`: weights in the narrowest type
            there is (2, 4 or 8 bits), and operators on constants that make the same 8-bit integers of narrower ones.
        signed_activations (`bool`, *optional*, defaults to `False`): int8 activations with a zero point of 0, bounded
            in front of QuantizeLinear, instead of uint8 ones that are bounded behind it; and integers that go into
            DequantizeLinear alone.
    """
    graph = Graph(model.graph)
    placements = []
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == DEQUANTIZE:
            placements.append(Weight(graph, node).lower(container, casts=not signed_activations))
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == QUANTIZE:
            activation = Activation(graph, node)
            placements.append(activation.lower_signed() if signed_activations else activation.lower())
    model.graph.sort()
    RemoveUnusedNodesPass()(model)  # and what only they used; what engines fuse must have no other user
    for node in list(model.graph):
        if _may_become_integers(node):
            _keep_in_float(graph, node)
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)  # the exporter's notes, of paths and lines on this machine
    model.opset_imports.pop(DOMAIN, None)
    return placements


def _may_become_integers(node: ir.Node) -> bool:
    """Return whether ONNX Runtime would make integers of a weight that is in float, with one range for all channels.

    It does so between DequantizeLinear and QuantizeLinear, and puts what is added and multiplied behind a convolution
    into its weight first.
    """
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return False
    weight = node.inputs[1].producer()
    while weight is not None and weight.op_type in {"Slice", "Split", *MOVES}:
        weight = weight.inputs[0].producer()
    if weight is not None and weight.op_type == "DequantizeLinear":
        return False
    value = node.outputs[0]
    while (user := only_user(value)) is not None and user.op_type in FOLLOW:
        if not all(other is None or other is value or other.const_value is not None for other in user.inputs):
            return False
        value = user.outputs[0]
    return user is not None and user.op_type == "QuantizeLinear"


def _keep_in_float(graph: Graph, node: ir.Node) -> None:
    """Let the values that a weight is applied to come from a multiplication instead of DequantizeLinear.

    Codes are centred by one operator and scaled by another.
    """
    reader, value = node, node.inputs[0]
    while (producer := value.producer()) is not None and producer.op_type in {"MaxPool", "Slice", *MOVES}:
        reader, value = producer, producer.inputs[0]  # which ONNX Runtime moves DequantizeLinear behind
    if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[1].shape.numpy() != ():
        return
    codes, scale, zero_point = producer.inputs
    one = graph.constant("one", np.float32(1))
    centred = graph.insert(reader, "DequantizeLinear", [codes, one, zero_point], "centred", shape=value.shape)
    scaled = graph.insert(reader, "Mul", [centred, scale], f"{value.name}.scaled", shape=value.shape)
    reader.replace_input_with(0, scaled)
