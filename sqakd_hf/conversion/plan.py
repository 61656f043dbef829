"""The plan, made before any change: which layer gets which bits, by which quantizer, or why it stays in float."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .._text import text_table
from ..quantization.quantizers import FEW_BITS


# The reasons that the caller gave (ASKED_FOR); all others are worth a warning.
NOT_CONVERTED = "listed in modules_to_not_convert"
FIRST_OR_LAST = "first or last layer"
ATTENTION_OFF = "attention_bits is None"
ASKED_FOR = (NOT_CONVERTED, FIRST_OR_LAST, ATTENTION_OFF)


@dataclass(frozen=True)
class LayerPlan:
    """One layer's line in the plan.

    `skipped` holds the reason where the layer stays in float, else it is `None`. `signed_input` is `None` until
    calibration has seen whether the layer's input can be negative; weights are always signed. `macs` are the layer's
    multiply-accumulates for one image, `None` where the model did not run on an example. `bypassed` layers are those
    whose weight their parent module applies itself. `reads_images` layers meet the image before any other layer does.
    `fused` is how a module of timm's that knows two ways computed attention: by one function, which scales after the
    product, or in steps, with a query that is scaled; `None` elsewhere. `activation_quantizer` is that of activations
    where it is not `quantizer`.

    A module that computes attention has a line too: no weights, and in `activation_bits` those of its operands. So has
    a module whose output is added by a residual connection or pooled: in `activation_bits` those of that output.
    """

    name: str
    layer_type: str
    num_weights: int
    quantizer: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    per_channel: bool = False
    integer_zero_point: bool = True
    quantizer_kwargs: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None
    signed_input: bool | None = None
    macs: int | None = None
    bypassed: bool = False
    reads_images: bool = False
    fused: bool | None = None
    activation_quantizer: str | None = None

    @property
    def learns_input_range(self) -> bool:
        """Whether the input's range is learned: not where images come in and calibration fitted many codes to them.

        Images do not change while the student learns, and a gradient for them would cost a convolution's backward.
        """
        return not (self.reads_images and (self.activation_bits or 0) > FEW_BITS)


@dataclass(frozen=True)
class Coverage:
    """How much of a model is quantized: its layers with weights, counted four ways.

    Args:
        layers, quantized_layers (`int`): How many there are (others included), and how many are quantized.
        weights, quantized_weights (`int`): Elements of their weights.
        macs, quantized_macs (`int`, *optional*): Multiply-accumulates for one image; `None` where the model did not
            run on an example.
        attention_macs, quantized_attention_macs (`int`, *optional*): Those of attention's products.
        weight_bytes (`int`): See [`QuantizationPlan.weight_bytes`].
        bops, float_bops (`int`, *optional*): Bit operations for one image, each multiply-accumulate counted as weight
            bits x activation bits (32 for float), attention included; and those of the float model.
    """

    layers: int
    quantized_layers: int
    weights: int
    quantized_weights: int
    macs: int | None
    quantized_macs: int | None
    attention_macs: int | None
    quantized_attention_macs: int | None
    weight_bytes: int
    bops: int | None
    float_bops: int | None

    def __str__(self) -> str:
        parts = [f"{_share(self.quantized_weights, self.weights)} of the weights ({_bytes(self.weight_bytes)})"]
        if self.macs:
            parts.append(f"{_share(self.quantized_macs, self.macs)} of the layers' {_count(self.macs)} MACs")
            if self.attention_macs:
                share = _share(self.quantized_attention_macs, self.attention_macs)
                parts.append(f"{share} of attention's {_count(self.attention_macs)} MACs")
            parts.append(f"{self.float_bops / self.bops:.1f} x fewer bit operations than in float")
        return "quantized: " + ", ".join(parts)


@dataclass(frozen=True)
class QuantizationPlan:
    """All layers that hold a weight matrix or kernel, in the model's order. `print(plan)` shows it as a table.

    `attention` has a line for each module that multiplies activations by each other, `others` one for each that
    multiplies by matrices of its own without being a layer with a quantized form: recurrent networks, bare parameters.
    `residuals` has one for each module whose output a residual connection adds, or global pooling takes, where that is
    quantized.
    """

    layers: tuple[LayerPlan, ...]
    attention: tuple[LayerPlan, ...] = ()
    others: tuple[LayerPlan, ...] = ()
    residuals: tuple[LayerPlan, ...] = ()

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    @property
    def quantized(self) -> list[LayerPlan]:
        """The layers that are quantized."""
        return [layer for layer in self.layers if layer.skipped is None]

    @property
    def skipped(self) -> list[LayerPlan]:
        """The layers that stay in float, and the others."""
        return [line for line in (*self.layers, *self.others) if line.skipped is not None]

    def bits(self) -> str:
        """The bits that most of the quantized weights have, as `"W2A2"`."""
        weights = Counter()
        for layer in self.quantized:
            weights[bits_of(layer)] += layer.num_weights
        return weights.most_common(1)[0][0] if weights else "float"

    def weight_bytes(self) -> int:
        """Bytes that the weights of these layers take: whole codes of `bits` bits each, four bytes where float."""
        lines = (*self.layers, *self.others)
        return sum((line.num_weights * (line.weight_bits or 32) + 7) // 8 for line in lines)

    def float_bytes(self) -> int:
        """The bytes of the same weights in float32."""
        return sum(4 * line.num_weights for line in (*self.layers, *self.others))

    def coverage(self) -> Coverage:
        """Count what is quantized, in layers, weights, multiply-accumulates, bytes and bit operations."""
        lines = (*self.layers, *self.others)
        traced = any(line.macs is not None for line in lines)
        quantized_attention = [line for line in self.attention if line.skipped is None]

        def macs(lines: Iterable[LayerPlan]) -> int | None:
            return sum(line.macs or 0 for line in lines) if traced else None

        return Coverage(
            layers=len(lines),
            quantized_layers=len(self.quantized),
            weights=sum(line.num_weights for line in lines),
            quantized_weights=sum(layer.num_weights for layer in self.quantized),
            macs=macs(lines),
            quantized_macs=macs(self.quantized),
            attention_macs=macs(self.attention),
            quantized_attention_macs=macs(quantized_attention),
            weight_bytes=self.weight_bytes(),
            bops=sum(map(_bops, (*lines, *self.attention))) if traced else None,
            float_bops=32 * 32 * (macs(lines) + macs(self.attention)) if traced else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data: `layers`, `attention`, `others`, `residuals` and `coverage`."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "attention": [asdict(line) for line in self.attention],
            "others": [asdict(line) for line in self.others],
            "residuals": [asdict(line) for line in self.residuals],
            "coverage": asdict(self.coverage()),
        }

    def with_signedness(self, signed: dict[str, bool]) -> "QuantizationPlan":
        """Return the plan with what calibration found: layer name → whether its input can be negative."""
        layers = [replace(layer, signed_input=signed.get(layer.name, layer.signed_input)) for layer in self.layers]
        return replace(self, layers=tuple(layers))

    def summary(self) -> str:
        """Return one line: how many layers at which bits, and how many stay in float."""
        counts = Counter(bits_of(layer) for layer in self.quantized)
        parts = [f"{count} at {bits}" for bits, count in counts.most_common()]
        if self.skipped:
            parts.append(f"{len(self.skipped)} in float")
        attention = Counter(line.activation_bits for line in self.attention if line.skipped is None)
        parts += [f"attention of {count} at A{bits}" for bits, count in attention.most_common()]
        residuals = Counter(line.activation_bits for line in self.residuals if line.skipped is None)
        parts += [f"{count} added or pooled feature maps at A{bits}" for bits, count in residuals.most_common()]
        return f"{len(self.layers) + len(self.others)} layers: {', '.join(parts)}"

    def __str__(self) -> str:
        rows = [("layer", "type", "weights", "MACs", "bits", "quantizer", "weight ranges", "input")]
        for layer in (*self.layers, *self.others, *self.attention, *self.residuals):
            if layer.skipped is not None:
                end = ("float", f"({layer.skipped})", "", "")
            elif layer.weight_bits is None:
                what = "output" if layer in self.residuals else "q, k, v and softmax"
                end = (f"A{layer.activation_bits}", layer.activation_quantizer or layer.quantizer, "", what)
            else:
                ranges = "per channel" if layer.per_channel else "per tensor"
                names = " / ".join(dict.fromkeys([layer.quantizer, layer.activation_quantizer or layer.quantizer]))
                end = (bits_of(layer), names, ranges, _INPUT[layer.activation_bits and layer.signed_input])
            macs = "" if layer.macs is None else _count(layer.macs)
            weights = f"{layer.num_weights:,}" if layer.num_weights else ""
            rows.append((layer.name, layer.layer_type, weights, macs, *end))
        return "\n".join([*text_table(rows), self.summary(), str(self.coverage())])


_INPUT = {True: "signed", False: "unsigned", None: ""}


def bits_of(layer: LayerPlan) -> str:
    """Return a quantized layer's bits as `"W2A4"`."""
    return f"W{layer.weight_bits}A{layer.activation_bits or 'float'}"


def _bops(line: LayerPlan) -> int:
    """Return the bit operations of one line: multiply-accumulates times the widths of the two operands."""
    if line.skipped is not None:
        return (line.macs or 0) * 32 * 32
    activation = line.activation_bits or 32
    return (line.macs or 0) * activation * (line.weight_bits or activation)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _count(number: int) -> str:
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _bytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB" if number >= 10**5 else f"{number / 1e3:.2f} kB"
