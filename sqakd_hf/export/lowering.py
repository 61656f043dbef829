"""From symbols to ONNX's own operators: integers in the initialisers, QuantizeLinear and DequantizeLinear around them.

A student's value is `(code - zero_point) * scale`. Here its codes become integers `i = factor * code + offset` of a
type that engines compute with, such that the value is `(i - z) * scale / factor` for a whole `z`; nothing else
changes, but for the order of a few float operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from .symbols import DEQUANTIZE, DOMAIN, QUANTIZE


CONTAINERS = ("int8", "packed")
INT8 = np.iinfo(np.int8)
FREE_RANGE = "a range that does not hold zero (integer_zero_point=False)"
# Operators that put elements elsewhere, and zeros between.
MOVES = {"Flatten", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


@dataclass(frozen=True)
class Placement:
    """What became of one symbol.

    Args:
        name (`str`): The module in the student: a layer, for its weight, or a quantizer.
        kind (`str`): `"weight"` or `"activation"`.
        levels (`int`): Number of codes.
        storage (`str`): The type of the integers, such as `"int8"`.
        tensor (`str`): The graph's name of the integers.
        factor, offset (`int`): `integer = factor * code + offset`; each channel of a weight may have a whole multiple
            of that, negative where the slope of the BatchNorm that was folded into it is.
        channel_axis (`int`, *optional*): The axis of a weight's output channels.
        call (`int`): Which use of the quantizer it is, from 0, where a layer is called several times.
        reason (`str`, *optional*): Why the values are computed by float operations instead of DequantizeLinear.
    """

    name: str
    kind: str
    levels: int
    storage: str
    tensor: str
    factor: int = 1
    offset: int = 0
    channel_axis: int | None = None
    reason: str | None = None
    call: int = 0


def lower(model: ir.Model, container: str, signed_activations: bool = False) -> list[Placement]:
    """Replace all symbols of `model`, in place, and return what became of each.

    Args:
        model (`ir.Model`): As exported from [`~sqakd_hf.export.symbols.Symbolic`].
        container (`str`): `"int8"`: 8-bit integers for codes of every width, for speed. `"packed"`: weights in the
            narrowest type there is (INT2, INT4, INT8), for bytes.
        signed_activations (`bool`, *optional*, defaults to `False`): int8 activations with a zero point of 0, bounded
            in front of QuantizeLinear, instead of uint8 ones that are bounded behind it.
    """
    graph = _Graph(model.graph)
    placements = []
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == DEQUANTIZE:
            placements.append(_Weight(graph, node).lower(container))
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == QUANTIZE:
            activation = _Activation(graph, node)
            placements.append(activation.lower_signed() if signed_activations else activation.lower())
    model.graph.sort()
    RemoveUnusedNodesPass()(model)  # and what only they used; what engines fuse must have no other user
    ClearMetadataAndDocStringPass()(model)  # the exporter's notes, of paths and lines on this machine
    model.opset_imports.pop(DOMAIN, None)
    return placements


class _Graph:
    """The few operations on a graph that lowering needs."""

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


def _only_user(value: ir.Value) -> ir.Node | None:
    """Return the one node that uses `value`, if there is one and the value is no output of the graph."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _array(value: ir.Value) -> np.ndarray:
    return value.const_value.numpy()


class _Weight:
    """One weight: its codes and its range as arrays, and the operators around it."""

    def __init__(self, graph: _Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.name = node.attributes["name"].as_string()
        self.levels = node.attributes["levels"].as_int()
        self.axis = node.attributes["axis"].as_int()
        self.codes, self.scale, self.zero_point = (_array(value) for value in node.inputs)
        self.scale = self.scale.astype(np.float64)
        self.channel_axis = node.attributes["channel_axis"].as_int()
        if self.axis < 0:
            self.axis = None
        self._join_transpose()

    def _join_transpose(self) -> None:
        """Take the transpose between a linear layer's weight and its product into the codes."""
        user = _only_user(self.node.outputs[0])
        if user is None or user.op_type != "Transpose":
            return
        permutation = list(user.attributes["perm"].as_ints())
        self.codes = np.ascontiguousarray(self.codes.transpose(permutation))
        self.axis = None if self.axis is None else permutation.index(self.axis)
        self.channel_axis = permutation.index(self.channel_axis)
        self.graph.replace(user, self.node.outputs[0])

    def lower(self, container: str) -> Placement:
        """Fold a BatchNorm into range and bias, write the integers and what dequantizes them."""
        integers, factor, offset, reason = self._integers(container)
        step = self.scale / factor
        norm = self._batch_norm()
        if norm is not None:
            slopes = norm.slopes()
            flipped = _flipped(integers, slopes)
            if reason is not None or (container == "packed" and _narrowest(flipped) > _narrowest(integers)):
                # No integer kernel will see the sign of the step.
                step = step * slopes
                norm.fold()
                self.axis = 0
            elif flipped.max(initial=0) <= INT8.max:  # -128 has no negative: there, BatchNorm stays what it is
                step = np.where(slopes == 0, step, step * np.abs(slopes))
                integers = flipped
                norm.fold()
                self.axis = 0
        if reason is None and container == "int8":
            integers, step = self._widened(integers, step)
        output, tensor, storage = self._write(integers, step.astype(np.float32), container, reason, offset)
        self.graph.replace(self.node, output)
        return Placement(self.name, "weight", self.levels, storage, tensor, factor, offset, self.channel_axis, reason)

    def _integers(self, container: str) -> tuple[np.ndarray, int, int, str | None]:
        """Return the integers, the two numbers that make them of codes, and why there is no whole zero point."""
        codes = self.codes.astype(np.int16)
        if container == "packed" and self.levels <= 4:
            return codes, 1, 0, "2-bit integers, which the kernels of ONNX Runtime can't take"
        halves = np.round(2 * self.zero_point.astype(np.float64))
        # Mirrored ranges have a zero point in their middle, up to the rounding of float32.
        rounding = 4 * self.levels * np.finfo(np.float32).eps
        centre = self.levels // 2 if container == "int8" else 0  # int8 is what every engine takes
        if np.abs(2 * self.zero_point - halves).max() > rounding or len(set(halves)) > 1:
            return codes - centre, 1, -centre, "a zero point of its own for each channel"
        for factor in (1, 2) if container == "int8" else (1,):  # doubled codes need one bit more
            offset = -factor * halves[0] / 2
            ends = offset, factor * (self.levels - 1) + offset
            if offset % 1 == 0 and INT8.min <= ends[0] and ends[1] <= INT8.max:
                return codes * factor + int(offset), factor, int(offset), None
        return codes - centre, 1, -centre, "a zero point between two codes"

    def _widened(self, integers: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Multiply each channel of a convolution's integers by a whole number, and divide its step by it.

        Engines round a channel's bias to a whole number of products of its two steps. With few bits these are wide,
        and so is that rounding, which moves codes. Wider integers make it finer, and change nothing else; of those
        that 8 bits hold, the multiple is chosen for which the bias is nearest to a whole number.
        """
        conv, operand = _only_user(self.node.outputs[0]), self._operand()
        has_bias = conv is not None and len(conv.inputs) > 2 and conv.inputs[2] is not None
        if not has_bias or conv.op_type != "Conv" or operand is None or not conv.inputs[2].is_initializer():
            return integers, step
        # Processors without instructions for products of 8 bits add two of them in 16: with 256 codes on the other
        # side, half must do.
        levels = operand.attributes["levels"].as_int()
        largest = np.abs(integers.reshape(len(integers), -1)).max(1)
        room = np.maximum((127 if levels < 256 else 64) // np.maximum(largest, 1), 1)
        step = np.broadcast_to(step, len(integers))
        units = float(_array(operand.inputs[1]).item()) / (1 + operand.attributes["binary"].as_int()) * step
        bias = _array(conv.inputs[2]).astype(np.float64)
        multiples = np.arange(1, room.max() + 1)
        in_units = bias[:, None] * multiples / units[:, None]
        error = np.abs(in_units - np.round(in_units)) / multiples
        error[multiples > room[:, None]] = np.inf
        best = multiples[error.argmin(1)]
        self.axis = 0
        return integers * best.astype(np.int16).reshape(-1, *(1,) * (integers.ndim - 1)), step / best

    def _operand(self) -> ir.Node | None:
        """Return the quantizer, of one range, of what this weight is multiplied by."""
        user = _only_user(self.node.outputs[0])
        value = None if user is None else user.inputs[0]
        while value is not None and (producer := value.producer()) is not None:
            if producer.domain == DOMAIN and producer.op_type == QUANTIZE:
                return producer if producer.inputs[1].shape.numpy() == (1,) else None
            value = producer.inputs[0] if producer.op_type in MOVES else None
        return None

    def _batch_norm(self) -> "_BatchNorm | None":
        """Return the normalisation of what this weight computes, if nothing else sees that."""
        conv = _only_user(self.node.outputs[0])
        if conv is None or conv.op_type != "Conv" or self.axis not in (None, 0):
            return None
        norm = _only_user(conv.outputs[0])
        if norm is None or norm.op_type != "BatchNormalization":
            return None
        constants = [*norm.inputs[1:], *(value for value in conv.inputs[2:] if value is not None)]
        return _BatchNorm(self.graph, conv, norm) if all(value.is_initializer() for value in constants) else None

    def _write(
        self, integers: np.ndarray, scale: np.ndarray, container: str, reason: str | None, offset: int
    ) -> tuple[ir.Value, str, str]:
        """Insert the integers and what computes their values; return the values, the integers' name and type."""
        if self.axis is not None and scale.shape == (1,):
            scale = np.repeat(scale, integers.shape[self.axis])
        if reason is not None:
            return self._write_shifted(integers, scale, container, offset)
        return self._write_dequantized(integers, scale, container, signed=True)

    def _write_dequantized(
        self, integers: np.ndarray, scale: np.ndarray, container: str, signed: bool
    ) -> tuple[ir.Value, str, str]:
        bits = _narrowest(integers, signed) if container == "packed" else 8
        dtype = ir.DataType[f"{'' if signed else 'U'}INT{bits}"]
        stored = self.graph.constant(f"{self.name}.weight", integers.astype(dtype.numpy()), dtype)
        options = {} if self.axis is None else {"axis": self.axis}
        scales = self.graph.constant(f"{self.name}.weight_scale", scale if options else scale.reshape(()))
        name = f"{self.name}.weight_value"
        output = self.graph.insert(
            self.node, "DequantizeLinear", [stored, scales], name, shape=ir.Shape(integers.shape), **options
        )
        return output, stored.name, str(dtype.name).lower()

    def _write_shifted(
        self, integers: np.ndarray, scale: np.ndarray, container: str, offset: int
    ) -> tuple[ir.Value, str, str]:
        """Write codes plus `offset` and a float shift, for zero points that no integer type has."""
        output, tensor, storage = self._write_dequantized(integers, scale, container, signed=offset < 0)
        shape = [-1 if axis == self.axis else 1 for axis in range(integers.ndim)]
        shift = ((self.zero_point.astype(np.float64) + offset) * scale).astype(np.float32).reshape(shape)
        shift = self.graph.constant(f"{self.name}.weight_shift", shift)
        value = self.graph.insert(
            self.node, "Sub", [output, shift], f"{self.name}.weight_shifted", shape=ir.Shape(integers.shape)
        )
        return value, tensor, storage


class _BatchNorm:
    """A convolution and the normalisation after it."""

    def __init__(self, graph: _Graph, conv: ir.Node, norm: ir.Node) -> None:
        self.graph, self.conv, self.norm = graph, conv, norm
        self.weight, self.bias, self.mean, self.variance = (
            _array(value).astype(np.float64) for value in norm.inputs[1:5]
        )

    def slopes(self) -> np.ndarray:
        """Return by what each channel is multiplied, `(C,)`."""
        return self.weight / np.sqrt(self.variance + self.norm.attributes["epsilon"].as_float())

    def fold(self) -> None:
        """Give the convolution the bias of both, and remove the normalisation."""
        own = 0.0 if len(self.conv.inputs) < 3 or self.conv.inputs[2] is None else _array(self.conv.inputs[2])
        bias = self.bias + (own - self.mean) * self.slopes()
        value = self.graph.constant(f"{self.norm.inputs[2].name}.folded", bias.astype(np.float32))
        self.conv.resize_inputs(3)
        self.conv.replace_input_with(2, value)
        self.graph.replace(self.norm, self.conv.outputs[0])


def _flipped(integers: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Return the integers with the sign of their channel's slope, 0 for a slope of 0."""
    return integers * np.sign(slopes).astype(np.int16).reshape(-1, *(1,) * (integers.ndim - 1))


def _narrowest(integers: np.ndarray, signed: bool = True) -> int:
    """Return the bits of the narrowest type of ONNX that holds the integers."""
    for bits in (2, 4):
        first = -(2 ** (bits - 1)) if signed else 0
        if first <= integers.min(initial=0) and integers.max(initial=0) < first + 2**bits:
            return bits
    return 8


class _Activation:
    """One quantizer of activations: its range, and the operators in front of it."""

    def __init__(self, graph: _Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.name = node.attributes["name"].as_string()
        self.levels = node.attributes["levels"].as_int()
        self.axis = node.attributes["axis"].as_int()
        self.is_binary = bool(node.attributes["binary"].as_int())
        self.x = node.inputs[0]
        self.scale, self.zero_point = (_array(value).astype(np.float32) for value in node.inputs[1:])
        self.options = {} if self.axis < 0 else {"axis": self.axis}
        if self.axis < 0:
            self.scale, self.zero_point = self.scale.reshape(()), self.zero_point.reshape(())

    def lower(self) -> Placement:
        """Write the integers and what dequantizes them."""
        if self.is_binary:
            return self._lower_binary()
        if not self._holds_zero():
            return self._lower_free_range(FREE_RANGE)
        self.range = [
            self.graph.constant(f"{self.name}.scale", self.scale),
            self.graph.constant(f"{self.name}.zero_point", self.zero_point.astype(np.uint8)),
        ]
        codes = self._codes(self.x)
        self._dequantize(codes, self.range)
        return self._placement("uint8", codes)

    def lower_signed(self) -> Placement:
        """Write int8 with a zero point of 0, and nothing between QuantizeLinear and DequantizeLinear."""
        if self.axis >= 0:
            return self.lower()  # those who want zero points of 0 take no ranges of channels in any form
        if self.is_binary:
            return self._lower_signed_binary()
        if not self._holds_zero():
            return self._lower_free_range(FREE_RANGE)
        zero = float(self.zero_point)
        if -zero < INT8.min or self.levels - 1 - zero > INT8.max:
            return self._lower_free_range("integers that do not fit into int8 with a zero point of 0")
        x, first, last = self.x, 0, self.levels - 1
        while (producer := x.producer()) is not None and _only_user(x) is not None:
            if (bounds := _bounds(producer)) is None:
                break
            # The bound that comes later has the last word.
            first, last = (min(max(self._code(end), first), last) for end in bounds)
            x = producer.inputs[0]
        if (first - zero, last - zero) != (INT8.min, INT8.max):
            ends = [
                self.graph.constant(f"{self.name}.bound_{code}", np.float32((code - zero) * self.scale))
                for code in (first, last)
            ]
            x = self.graph.insert(self.node, "Clip", [x, *ends], f"{self.name}.bounded", shape=self.x.shape)
        codes = self._quantized_symmetrically(x, self.scale)
        return self._placement("int8", codes, offset=-int(zero))

    def _holds_zero(self) -> bool:
        return not (self.zero_point % 1).any() and self.zero_point.min() >= 0 and self.zero_point.max() < self.levels

    def _quantized_symmetrically(self, x: ir.Value, scale: np.ndarray) -> ir.Value:
        """Insert int8 codes of `x` with a zero point of 0, and what dequantizes them; return the codes."""
        quantization = [
            self.graph.constant(f"{self.name}.scale", scale),
            self.graph.constant(f"{self.name}.zero_point", np.zeros(scale.shape, np.int8)),
        ]
        codes = self.graph.insert(
            self.node,
            "QuantizeLinear",
            [x, *quantization],
            f"{self.name}.codes",
            ir.DataType.INT8,
            self.x.shape,
            **self.options,
        )
        self._dequantize(codes, quantization)
        return codes

    def _lower_signed_binary(self) -> Placement:
        """Write {-s, +s} as -1 and 1; `scale` is the distance of the two values."""
        half = self.scale / 2
        values = [self.graph.constant(f"{self.name}.{name}", end) for name, end in (("upper", half), ("lower", -half))]
        bounded = self.graph.insert(
            self.node, "Where", [self._is_above(), *values], f"{self.name}.bounded", shape=self.x.shape
        )
        codes = self._quantized_symmetrically(bounded, half)
        return self._placement("int8", codes, factor=2, offset=-1)

    def _placement(self, storage: str, codes: ir.Value, **facts: int | str) -> Placement:
        call = self.node.attributes["call"].as_int()
        return Placement(self.name, "activation", self.levels, storage, codes.name, call=call, **facts)

    def _codes(self, x: ir.Value, first: int = 0, last: int = 255) -> ir.Value:
        """Return the codes of `x`, of which those before `first` and after `last` become these.

        Rounding never swaps two numbers. So what only chooses among numbers, or bounds them, may as well choose among
        codes: in front of it QuantizeLinear follows what computes the numbers, and engines fuse the two.
        """
        producer = x.producer()
        if producer is not None and _only_user(x) is not None and self.axis < 0:
            if (bounds := _bounds(producer)) is not None:
                # The bound that comes later has the last word.
                ends = (min(max(self._code(end), first), last) for end in bounds)
                return self._codes(producer.inputs[0], *ends)
            if producer.op_type == "MaxPool" and len(producer.outputs) == 1:
                return self._again(producer, [self._codes(producer.inputs[0], first, last)], x.shape)
            if producer.op_type == "Concat":
                return self._again(producer, [self._codes(part, first, last) for part in producer.inputs], x.shape)
        codes = self._insert("QuantizeLinear", [x, *self.range], x.shape, **self.options)
        # Of integers: engines do not fuse QuantizeLinear with what is before a Clip in front of it.
        bounds = (first or None, min(last, self.levels - 1))
        if bounds != (None, 255):
            ends = [None if end in (None, 255) else self._bound(end) for end in bounds]
            codes = self._insert("Clip", [codes, *ends], x.shape)
        return codes

    def _code(self, value: float) -> int:
        with np.errstate(over="ignore"):
            code = np.rint(np.float32(value) / self.scale) + self.zero_point
        return int(np.clip(code, 0, self.levels - 1))

    def _bound(self, code: int) -> ir.Value:
        return self.graph.constant(f"{self.name}.code_{code}", np.uint8(code))

    def _again(self, node: ir.Node, inputs: list[ir.Value], shape: ir.Shape | None) -> ir.Value:
        """Insert what `node` does, on codes."""
        return self._insert(node.op_type, inputs, shape, **node.attributes)

    def _insert(self, operator: str, inputs: list[ir.Value | None], shape: ir.Shape | None, **options) -> ir.Value:
        return self.graph.insert(
            self.node, operator, inputs, f"{self.name}.codes", ir.DataType.UINT8, shape, **options
        )

    def _dequantize(self, codes: ir.Value, quantization: list[ir.Value]) -> None:
        values = self.graph.insert(
            self.node,
            "DequantizeLinear",
            [codes, *quantization],
            f"{self.name}.value",
            shape=self.x.shape,
            **self.options,
        )
        self.graph.replace(self.node, values)

    def _lower_binary(self) -> Placement:
        """Write {-s, +s} as 127 and 129 around 128; `scale` is the distance of the two values."""
        codes = self._insert("Where", [self._is_above(), self._bound(129), self._bound(127)], self.x.shape)
        scales = self.graph.constant(f"{self.name}.scale", self.scale / 2)
        zeros = self.graph.constant(f"{self.name}.zero_point", np.full(self.scale.shape, 128, np.uint8))
        self._dequantize(codes, [scales, zeros])
        return self._placement("uint8", codes, factor=2, offset=127)

    def _is_above(self) -> ir.Value:
        threshold = self.graph.constant(f"{self.name}.threshold", np.float32(0))
        return self.graph.insert(
            self.node, "GreaterOrEqual", [self.x, threshold], f"{self.name}.above", ir.DataType.BOOL, self.x.shape
        )

    def _lower_free_range(self, reason: str) -> Placement:
        """Compute the values of a grid that no integer type expresses as the quantizer does, in float."""
        shape = self.x.shape
        along = [-1 if place == self.axis else 1 for place in range(len(shape))] if self.axis >= 0 else ()
        whole = np.floor(self.zero_point)
        ends = [
            self.graph.constant(f"{self.name}.{end}", np.float32(value))
            for end, value in (("first", 0), ("last", self.levels - 1))
        ]
        scales, zeros, wholes, parts = (
            self.graph.constant(f"{self.name}.{name}", array.reshape(along))
            for name, array in (
                ("scale", self.scale),
                ("zero_point", self.zero_point),
                ("zero_point_whole", whole),
                ("zero_point_part", self.zero_point - whole),
            )
        )
        # The whole part is added to what was rounded, as the quantizer does: ties round alike.
        x = self.x
        for operator, inputs in (
            ("Div", [scales]),
            ("Add", [parts]),
            ("Round", []),
            ("Add", [wholes]),
            ("Clip", ends),
        ):
            x = self.graph.insert(self.node, operator, [x, *inputs], f"{self.name}.codes", shape=shape)
        codes = x
        value = self.graph.insert(self.node, "Sub", [codes, zeros], f"{self.name}.centred", shape=shape)
        value = self.graph.insert(self.node, "Mul", [value, scales], f"{self.name}.value", shape=shape)
        self.graph.replace(self.node, value)
        return self._placement("float", codes, reason=reason)


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return the ends between which a node holds its first input, if that is all it does and they are constant."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type in ("Min", "Max") and len(node.inputs) == 2:
        end = node.inputs[1].const_value
        if end is None or end.size != 1:
            return None
        return (-np.inf, float(end.numpy().item())) if node.op_type == "Min" else (float(end.numpy().item()), np.inf)
    given = [*node.inputs[1:], None, None][:2]
    if node.op_type != "Clip" or any(end is not None and end.const_value is None for end in given):
        return None
    lower, upper = (None if end is None else float(_array(end)) for end in given)
    return -np.inf if lower is None else lower, np.inf if upper is None else upper
