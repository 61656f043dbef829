"""A quantizer of activations in an exported graph: QuantizeLinear, DequantizeLinear, or float operations."""

import numpy as np
import onnx_ir as ir

from .graph import INT8, Graph, array_of, only_user
from .integer_tensors import Placement


FREE_RANGE = "a range that does not hold zero (integer_zero_point=False)"


class Activation:
    """One quantizer of activations: its range, and the operators in front of it."""

    def __init__(self, graph: Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.name = node.attributes["name"].as_string()
        self.levels = node.attributes["levels"].as_int()
        self.axis = node.attributes["axis"].as_int()
        self.is_binary = bool(node.attributes["binary"].as_int())
        self.x = node.inputs[0]
        self.scale, self.zero_point = (array_of(value).astype(np.float32) for value in node.inputs[1:])
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
        while (producer := x.producer()) is not None and only_user(x) is not None:
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
        if producer is not None and only_user(x) is not None and self.axis < 0:
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
    lower, upper = (None if end is None else float(array_of(end)) for end in given)
    return -np.inf if lower is None else lower, np.inf if upper is None else upper
