"""Which layers of a student engines compute with integers: read off the graph that would be exported."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from .._text import text_table
from ..conversion.plan import Coverage
from .graph import MOVES
from .integer_tensors import Placement


ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT"}
# Share of the multiply-accumulates: with 0.41 of a ResNet-18's as integers ONNX Runtime was slower than in float32,
# with 0.61 of a MobileNetV2's level, with 0.83 of a small ViT's 1.6 times as fast.
ENOUGH = 0.75
PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
NARROW = "it opens no file with {}-bit integers (container='int8')"
BITS = {"uint2": 2, "uint4": 4}
HINT = " (residual_bits='auto' makes it integers)"
# TensorRT quantizes symmetrically.
UNSIGNED = "it wants int8 activations with a zero point of 0, and these are uint8 (signed_activations=True)"


@dataclass(frozen=True)
class LayerSupport:
    """How engines compute one layer.

    Args:
        layer (`str`): Its name in the student.
        operator (`str`): ONNX's operator that applies its weight.
        onnxruntime, openvino, tensorrt (`str`, *optional*): Why the engine computes it in float; `None`: it has a
            kernel for these integers. For ONNX Runtime and OpenVINO on a CPU this was held against what they did; for
            TensorRT it is read from its documentation.
        macs (`int`, *optional*): Its multiply-accumulates for one image; `None` where they are not known.
    """

    layer: str
    operator: str
    onnxruntime: str | None = None
    openvino: str | None = None
    tensorrt: str | None = None
    macs: int | None = None


@dataclass(frozen=True)
class DeployReport:
    """What a student will be outside of PyTorch; `print` it.

    Args:
        kernels (`tuple[LayerSupport, ...]`): A line for each layer that is quantized.
        coverage (`Coverage`): What is quantized, with the bytes of the weights and the bit operations.
        file_bytes (`int`): Size of the ONNX file.
        container (`str`): How it holds the weights.
    """

    kernels: tuple[LayerSupport, ...]
    coverage: Coverage
    file_bytes: int
    container: str

    def with_integers(self, engine: str) -> list[LayerSupport]:
        """Return the layers for which an engine, one of `ENGINES`, has an integer kernel."""
        return [kernel for kernel in self.kernels if getattr(kernel, engine) is None]

    def integer_share(self, engine: str) -> float | None:
        """Return the share of the network's multiply-accumulates that an engine has integer kernels for, if known."""
        if not self.coverage.macs:
            return None
        own = sum(kernel.macs or 0 for kernel in self.with_integers(engine))
        return own / (self.coverage.macs + (self.coverage.attention_macs or 0))

    def verdict(self, engine: str) -> str:
        """Return what to expect of the file in an engine; `sqakd benchmark` measures it on a processor."""
        smaller = f"{4 * self.coverage.weights / self.file_bytes:.1f} × smaller than float32"
        share, count = self.integer_share(engine), len(self.with_integers(engine))
        speed = f"integers in {count} of {len(self.kernels)} layers"
        if share is not None:
            speed += f", {share:.0%} of the MACs: {'faster' if share >= ENOUGH else 'no faster, or hardly'}"
        return f"{smaller}; {speed}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return {**asdict(self), "verdicts": {engine: self.verdict(engine) for engine in ENGINES}}

    def __str__(self) -> str:
        rows = [("layer", "operator", *ENGINES.values())]
        notes: dict[str, int] = {}
        for kernel in self.kernels:
            cells = []
            for engine in ENGINES:
                reason = getattr(kernel, engine)
                cells.append("integer" if reason is None else f"float ({notes.setdefault(reason, len(notes) + 1)})")
            rows.append((kernel.layer, kernel.operator, *cells))
        lines = text_table(rows)
        lines += [f"({number}) {reason}" for reason, number in notes.items()]
        lines += [f"{name}: {self.verdict(engine)}" for engine, name in ENGINES.items()]
        lines.append(f"{self.container}: a file of {self.file_bytes:,} bytes; {self.coverage}")
        return "\n".join(lines)


def kernels(
    graph: ir.Graph, placements: Sequence[Placement], macs: Mapping[str, int | None]
) -> tuple[LayerSupport, ...]:
    """Return a line for each weight of a lowered graph, with its layer's multiply-accumulates."""
    narrowest = min((BITS.get(placement.storage, 8) for placement in placements), default=8)
    # ONNX Runtime makes bytes of narrower integers when it opens a file, OpenVINO of those of 4 bits.
    closed = {
        "openvino": NARROW.format(narrowest) if narrowest < 4 else None,
        "tensorrt": NARROW.format(narrowest) if narrowest < 8 else None,
    }
    # Where additions have quantizers and one is still in float, more of them are no help.
    hint = "" if any(placement.name.endswith("output_quantizer") for placement in placements) else HINT
    found = []
    for placement in placements:
        if placement.kind != "weight":
            continue
        each = [_kernel(placement, node, hint) for node in _appliers(_values(graph, placement))]
        # Where a layer is called several times, what is not so everywhere is not so.
        reasons = {
            engine: next(filter(None, (closed.get(engine), *(getattr(kernel, engine) for kernel in each))), None)
            for engine in ENGINES
        }
        name = placement.name
        found.append(LayerSupport(name, each[0].operator, **reasons, macs=macs.get(name)))
    return tuple(found)


def _values(graph: ir.Graph, weight: Placement) -> ir.Value:
    """Return the values that the graph computes of a weight's integers."""
    value = graph.initializers[weight.tensor]
    while not value.name.startswith(f"{weight.name}.weight_value"):
        (use,) = value.uses()
        (value,) = use.node.outputs
    return value


def _appliers(weight: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that apply a weight: past what takes parts of it."""
    for use in weight.uses():
        if use.node.op_type in {"Slice", "Split", *MOVES}:
            for output in use.node.outputs:
                yield from _appliers(output)
        else:
            yield use.node


def _kernel(placement: Placement, node: ir.Node, hint: str) -> LayerSupport:
    reason = placement.reason and f"its weight has {placement.reason}"
    if reason is None and node.op_type not in PRODUCTS:
        reason = f"{node.op_type} multiplies nothing"
    reason = reason or _why_no_codes(node.inputs[0])
    if reason is not None:
        return LayerSupport(placement.name, node.op_type, reason, reason, reason)
    signed = _quantizer_of(node.inputs[0]).inputs[0].dtype == ir.DataType.INT8
    onnxruntime = _why_not_onnxruntime(node, hint)
    return LayerSupport(placement.name, node.op_type, onnxruntime, None, None if signed else UNSIGNED)


def _quantizer_of(value: ir.Value) -> ir.Node | None:
    """Return the node that computes a value, behind those that only put its elements elsewhere."""
    while (node := value.producer()) is not None and node.op_type in MOVES:
        value = node.inputs[0]
    return node


def _why_no_codes(value: ir.Value) -> str | None:
    """Return why what a weight is multiplied by does not arrive as integers with one scale, `None` if it does."""
    node = _quantizer_of(value)
    if node is None or node.op_type != "DequantizeLinear":
        return "its input is in float"
    if node.inputs[1].shape is not None and len(node.inputs[1].shape) > 0:
        return "its input has a range for each channel"
    return None


def _why_not_onnxruntime(node: ir.Node, hint: str) -> str | None:
    if node.op_type == "ConvTranspose":
        return "ONNX Runtime has no integer ConvTranspose"
    if node.op_type != "Conv":
        return None  # products of integers may put out floats
    users = Counter(use.node.op_type for use in node.outputs[0].uses())
    if node.outputs[0].is_graph_output():
        users["the output"] += 1
    if users == {"QuantizeLinear": 1}:
        return None
    if set(users) == {"QuantizeLinear"}:
        return "ONNX Runtime's convolutions put out integers of one scale, and several quantizers read this one's"
    others = sorted(users.keys() - {"QuantizeLinear"})
    reason = (
        f"ONNX Runtime's convolutions put out integers alone, and this one's goes to {' and '.join(others)} in float"
    )
    return reason + hint * (others == ["Add"])
