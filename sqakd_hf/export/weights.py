"""A weight in an exported graph: its integers in the initialisers, and the operators that make values of them."""

import numpy as np
import onnx_ir as ir

from .graph import INT8, MOVES, Graph, array_of, only_user
from .integer_tensors import Placement
from .symbolic_model import DOMAIN, QUANTIZE


class Weight:
    """One weight: its codes and its range as arrays, and the operators around it."""

    def __init__(self, graph: Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.name = node.attributes["name"].as_string()
        self.levels = node.attributes["levels"].as_int()
        self.axis = node.attributes["axis"].as_int()
        self.codes, self.scale, self.zero_point = (array_of(value) for value in node.inputs)
        self.codes, self.scale = self.codes.astype(np.int16), self.scale.astype(np.float64)
        self.channel_axis = node.attributes["channel_axis"].as_int()
        if self.axis < 0:
            self.axis = None
        self._join_transpose()

    def _join_transpose(self) -> None:
        """Take the transpose between a linear layer's weight and its product into the codes."""
        user = only_user(self.node.outputs[0])
        if user is None or user.op_type != "Transpose":
            return
        permutation = list(user.attributes["perm"].as_ints())
        self.codes = np.ascontiguousarray(self.codes.transpose(permutation))
        self.axis = None if self.axis is None else permutation.index(self.axis)
        self.channel_axis = permutation.index(self.channel_axis)
        self.graph.replace(user, self.node.outputs[0])

    def lower(self, container: str, casts: bool = True) -> Placement:
        """Write the integers and what computes values of them; fold a BatchNorm into range and bias.

        Args:
            container (`str`): See [`~sqakd_hf.export.lowering.lower`].
            casts (`bool`, *optional*, defaults to `True`): Whether Cast may take 8-bit integers. Where it may not,
                DequantizeLinear does, which ONNX Runtime would run for each batch, in case an integer kernel wants it.
        """
        halves = np.round(2 * self.zero_point.astype(np.float64))
        # Mirrored ranges have a zero point in their middle, up to the rounding of float32.
        rounding = 4 * self.levels * np.finfo(np.float32).eps
        if np.abs(2 * self.zero_point - halves).max() > rounding or len(set(halves)) > 1:
            return self._lower_in_float(container, "a zero point of its own for each channel", casts)
        for factor in (1, 2):  # doubled codes need one bit more
            offset = -factor * halves[0] / 2
            ends = offset, factor * (self.levels - 1) + offset
            if offset % 1 == 0 and INT8.min <= ends[0] and ends[1] <= INT8.max:
                return self._lower_for_kernels(container, factor, int(offset))
        return self._lower_in_float(container, "a zero point between two codes", casts)

    def _lower_in_float(self, container: str, reason: str, casts: bool) -> Placement:
        """Write integers, and float operations that centre and scale them as the quantizer does."""
        offset = -(self.levels // 2) if container == "int8" else 0  # int8 is what every engine takes
        step, norm = self.scale, self._batch_norm()
        if norm is not None:
            step = step * norm.slopes()
            norm.fold()
            self.axis = 0
        stored = self._stored(self.codes + offset, container, signed=offset < 0)
        zero_point = self.zero_point.astype(np.float64) + offset
        value = self._computed(stored, zero_point, step, f"{self.name}.weight_value", casts)
        return self._placement(stored, value, offset=offset, reason=reason)

    def _lower_for_kernels(self, container: str, factor: int, offset: int) -> Placement:
        """Write what engines fuse with a product: int8 whose zero point is 0, times a step."""
        integers, multiples = factor * self.codes + offset, np.ones(1, np.int16)
        step, norm = self.scale / factor, self._batch_norm()
        if norm is not None:
            slopes = norm.slopes()
            signs = np.sign(slopes).astype(np.int16)
            if (integers * self._along(signs)).max(initial=0) <= INT8.max:
                multiples, step = signs, np.where(slopes == 0, step, step * np.abs(slopes))
                norm.fold()
                self.axis = 0
            # Else -128 has no negative, and BatchNorm stays what it is.
        multiples, step = self._widened(integers, multiples, step)
        if container == "int8" or _narrowest(self.levels) == 8:
            stored = self._stored(integers * self._along(multiples), container)
            return self._placement(stored, self._dequantized(stored, step), factor=factor, offset=offset)
        stored = self._stored(self.codes, container, signed=False)
        value = self._computed(stored, np.array([-offset / factor]), multiples * factor, "integers")
        value = self._inserted("Cast", [value], "integers", ir.DataType.INT8, to=ir.DataType.INT8.value)
        return self._placement(stored, self._dequantized(value, step))

    def _placement(self, stored: ir.Value, value: ir.Value, **facts: int | str) -> Placement:
        """Let `value` take the place of the symbol; return what became of it."""
        self.graph.replace(self.node, value)
        storage = str(stored.dtype.name).lower()
        axis = self.channel_axis
        return Placement(self.name, "weight", self.levels, storage, stored.name, channel_axis=axis, **facts)

    def _widened(self, integers: np.ndarray, multiples: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Let each channel of a convolution have a larger multiple of the integers, and divide its step by as much.

        Engines round a channel's bias to a whole number of products of its two steps. With few bits these are wide,
        and so is that rounding, which moves codes. Wider integers make it finer, and change nothing else; of those
        that 8 bits hold, the multiple is chosen for which the bias is nearest to a whole number.
        """
        conv, operand = only_user(self.node.outputs[0]), self._operand()
        has_bias = conv is not None and len(conv.inputs) > 2 and conv.inputs[2] is not None
        if not has_bias or conv.op_type != "Conv" or operand is None or not conv.inputs[2].is_initializer():
            return multiples, step
        # Processors without instructions for products of 8 bits add two of them in 16: with 256 codes on the other
        # side, half must do.
        levels = operand.attributes["levels"].as_int()
        largest = np.abs(integers.reshape(len(integers), -1)).max(1) * np.abs(multiples)
        room = np.maximum((127 if levels < 256 else 64) // np.maximum(largest, 1), 1)
        step = np.broadcast_to(step, len(integers))
        units = float(array_of(operand.inputs[1]).item()) / (1 + operand.attributes["binary"].as_int()) * step
        bias = array_of(conv.inputs[2]).astype(np.float64)
        tried = np.arange(1, room.max() + 1)
        in_units = bias[:, None] * tried / units[:, None]
        error = np.abs(in_units - np.round(in_units)) / tried
        error[tried > room[:, None]] = np.inf
        best = tried[error.argmin(1)]
        self.axis = 0
        return multiples * best.astype(np.int16), step / best

    def _operand(self) -> ir.Node | None:
        """Return the quantizer, of one range, of what this weight is multiplied by."""
        user = only_user(self.node.outputs[0])
        value = None if user is None else user.inputs[0]
        while value is not None and (producer := value.producer()) is not None:
            if producer.domain == DOMAIN and producer.op_type == QUANTIZE:
                return producer if producer.inputs[1].shape.numpy() == (1,) else None
            value = producer.inputs[0] if producer.op_type in MOVES else None
        return None

    def _batch_norm(self) -> "_BatchNorm | None":
        """Return the normalisation of what this weight computes, if nothing else sees that."""
        conv = only_user(self.node.outputs[0])
        if conv is None or conv.op_type != "Conv" or self.axis not in (None, 0):
            return None
        norm = only_user(conv.outputs[0])
        if norm is None or norm.op_type != "BatchNormalization":
            return None
        constants = [*norm.inputs[1:], *(value for value in conv.inputs[2:] if value is not None)]
        return _BatchNorm(self.graph, conv, norm) if all(value.is_initializer() for value in constants) else None

    def _stored(self, integers: np.ndarray, container: str, signed: bool = True) -> ir.Value:
        """Add the integers to the graph, in the narrowest type that the container has for their levels."""
        bits = _narrowest(self.levels) if container == "packed" else 8
        dtype = ir.DataType[f"{'' if signed else 'U'}INT{bits}"]
        return self.graph.constant(f"{self.name}.weight", integers.astype(dtype.numpy()), dtype)

    def _dequantized(self, integers: ir.Value, scale: np.ndarray) -> ir.Value:
        """Insert what engines fuse with a product into an integer kernel."""
        options = {} if self.axis is None else {"axis": self.axis}
        scale = scale if scale.size > 1 or not options else np.repeat(scale, self.codes.shape[self.axis])
        scale = scale.astype(np.float32) if options else scale.astype(np.float32).reshape(())
        scales = self.graph.constant(f"{self.name}.weight_scale", scale)
        return self._inserted("DequantizeLinear", [integers, scales], f"{self.name}.weight_value", **options)

    def _computed(
        self, codes: ir.Value, zero_point: np.ndarray, scale: np.ndarray, name: str, casts: bool = True
    ) -> ir.Value:
        """Insert float operations from codes to `(codes - zero_point) * scale`.

        They have constants alone, and engines run them once, when a file is opened. The zero point is added: OpenVINO
        takes Sub and Mul for a dequantization, and rounds it to a whole number.
        """
        if (zero_point == zero_point[0]).all():
            zero_point = zero_point[:1]
        centre, scale = (
            self.graph.constant(f"{name}_{what}", self._along(array.astype(np.float32)))
            for what, array in (("centre", -zero_point), ("scale", scale))
        )
        # Short names for what nobody looks at: they are a percent of a small file.
        if casts:
            value = self._inserted("Cast", [codes], "code", to=ir.DataType.FLOAT.value)
        else:
            one = self.graph.constant("one", np.float32(1))
            value = self._inserted("DequantizeLinear", [codes, one], "code")
        value = self._inserted("Add", [value, centre], "centred")
        return self._inserted("Mul", [value, scale], name)

    def _inserted(
        self, operator: str, inputs: list[ir.Value], name: str, dtype: ir.DataType = ir.DataType.FLOAT, **options: int
    ) -> ir.Value:
        return self.graph.insert(self.node, operator, inputs, name, dtype, ir.Shape(self.codes.shape), **options)

    def _along(self, array: np.ndarray) -> np.ndarray:
        """Return an array of one number, or of one for each channel, in a shape that multiplies the weight."""
        channels = self.axis or 0
        shape = [] if array.size == 1 else [-1 if axis == channels else 1 for axis in range(self.codes.ndim)]
        return array.reshape(shape)


class _BatchNorm:
    """A convolution and the normalisation after it."""

    def __init__(self, graph: Graph, conv: ir.Node, norm: ir.Node) -> None:
        self.graph, self.conv, self.norm = graph, conv, norm
        self.weight, self.bias, self.mean, self.variance = (
            array_of(value).astype(np.float64) for value in norm.inputs[1:5]
        )

    def slopes(self) -> np.ndarray:
        """Return by what each channel is multiplied, `(C,)`."""
        return self.weight / np.sqrt(self.variance + self.norm.attributes["epsilon"].as_float())

    def fold(self) -> None:
        """Give the convolution the bias of both, and remove the normalisation."""
        own = 0.0 if len(self.conv.inputs) < 3 or self.conv.inputs[2] is None else array_of(self.conv.inputs[2])
        bias = self.bias + (own - self.mean) * self.slopes()
        value = self.graph.constant(f"{self.norm.inputs[2].name}.folded", bias.astype(np.float32))
        self.conv.resize_inputs(3)
        self.conv.replace_input_with(2, value)
        self.graph.replace(self.norm, self.conv.outputs[0])


def _narrowest(levels: int) -> int:
    """Return the bits of the narrowest type of ONNX that holds so many codes."""
    return next(bits for bits in (2, 4, 8) if levels <= 2**bits)
