"""The plan, made before any change: which layer gets which bits, by which quantizer, or why it stays in float."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .configuration import LAYER_FIELDS, QuantizationConfig, check_patterns, matches
from .errors import InputError
from .layers import QuantizedLayer, quantized_class, weight_of
from .quantizers import FEW_BITS
from .trace import Trace, trace_model


# The reasons that the caller gave (ASKED_FOR); all others are worth a warning.
NOT_CONVERTED = "listed in modules_to_not_convert"
FIRST_OR_LAST = "first or last layer"
ATTENTION_OFF = "attention_bits is None"
ASKED_FOR = (NOT_CONVERTED, FIRST_OR_LAST, ATTENTION_OFF)
# What the line of a module that has activations alone takes of a layer's options.
_OF_ACTIVATIONS = ("quantizer", "activation_quantizer", "integer_zero_point", "quantizer_kwargs")
# Packages whose layers are quantized already.
_OTHER_TOOLS = ("torch.ao.", "torchao.", "bitsandbytes.", "optimum.quanto.", "hqq.", "gptqmodel.", "awq.", "brevitas.")


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
    a module whose output is added by a residual connection: in `activation_bits` those of that output.
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
    `residuals` has one for each module whose output a residual connection adds, where that is quantized.
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
        parts += [f"{count} residual feature maps at A{bits}" for bits, count in residuals.most_common()]
        return f"{len(self.layers) + len(self.others)} layers: {', '.join(parts)}"

    def __str__(self) -> str:
        rows = [("layer", "type", "weights", "MACs", "bits", "quantizer", "weight ranges", "input")]
        for layer in (*self.layers, *self.others, *self.attention, *self.residuals):
            if layer.skipped is not None:
                end = ("float", f"({layer.skipped})", "", "")
            elif layer.weight_bits is None:
                what = "output, added" if layer in self.residuals else "q, k, v and softmax"
                end = (f"A{layer.activation_bits}", layer.quantizer, "", what)
            else:
                ranges = "per channel" if layer.per_channel else "per tensor"
                end = (bits_of(layer), layer.quantizer, ranges, _INPUT[layer.activation_bits and layer.signed_input])
            macs = "" if layer.macs is None else _count(layer.macs)
            weights = f"{layer.num_weights:,}" if layer.num_weights else ""
            rows.append((layer.name, layer.layer_type, weights, macs, *end))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, self.summary(), str(self.coverage())])


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


def plan_quantization(
    model: nn.Module, config: QuantizationConfig, images: torch.Tensor | None = None
) -> QuantizationPlan:
    """Decide for each layer of `model` what `config` makes of it; the model is not changed.

    Layers are the modules that own a floating-point `weight` of two or more dimensions. One forward of a noise image
    tells which of them run, which are first and last (where timm's metadata does not name them), and which modules
    apply a layer's weight without calling the layer.

    Args:
        model (`nn.Module`): A float model.
        config (`QuantizationConfig`): What to quantize.
        images (`torch.Tensor`, *optional*): Example images `(B, C, H, W)` for that forward, where the model does not
            state the size it takes.

    Raises:
        `InputError`: A model that can't be quantized or is quantized already, or a pattern that matches nothing.
    """
    candidates = {name: module for name, module in model.named_modules() if weight_of(module) is not None}
    _require_quantizable(model, candidates)
    trace = trace_model(model, candidates, images)
    attention = {} if trace is None else trace.attention
    names = list(candidates)
    others = [] if trace is None else list(trace.others)
    residuals = {} if trace is None or config.residual_bits is None else trace.residuals
    known = [*names, *attention, *others, *residuals]
    check_patterns(config.modules_to_not_convert, known, "modules_to_not_convert")
    check_patterns(list(config.overrides), [*names, *attention], "overrides")
    by_attention = [pattern for pattern, options in config.overrides.items() if "attention_bits" in options]
    check_patterns(by_attention, list(attention), "overrides with attention_bits")
    excluded = {name for name in (*names, *attention) if _excluded(name, config)}
    for pattern in config.overrides:
        if all(name in excluded for name in (*names, *attention) if matches(name, pattern)):
            raise InputError(
                f"overrides[{pattern!r}] only matches layers that modules_to_not_convert leaves in float. "
                "Remove it from one of the two."
            )
    _require_own_weights({name: module for name, module in candidates.items() if name not in excluded})
    edges = _first_and_last(model, [name for name in names if quantized_class(candidates[name])], trace)
    reasons = {name: NOT_CONVERTED for name in excluded}
    for name, module in candidates.items():
        if name not in reasons and (reason := _why_float(name, module, model, trace)) is not None:
            reasons[name] = reason
        outer = name.rpartition(".")[0]
        if name not in reasons and outer in candidates and outer in reasons:
            reasons[name] = f"{outer} computes with its weight and stays in float"
    layers = tuple(
        _plan_layer(name, module, config, reasons.get(name), name in edges, trace)
        for name, module in candidates.items()
    )
    lines = tuple(
        _plan_attention(name, model.get_submodule(name), config, name in excluded, trace) for name in attention
    )
    others = tuple(
        LayerPlan(
            name=name,
            layer_type=(kind := type(model.get_submodule(name)).__name__),
            num_weights=weights,
            macs=macs,
            skipped=NOT_CONVERTED if _excluded(name, config) else f"{kind} multiplies by matrices of its own",
        )
        for name, (weights, macs) in ({} if trace is None else trace.others).items()
    )
    outputs = tuple(
        _plan_residual(name, type(model.get_submodule(name)).__name__, config, reason)
        for name, reason in residuals.items()
    )
    if config.residual_bits is not None and not any(line.skipped is None for line in outputs):
        raise InputError(
            f"residual_bits is set, but no addition of convolutions' feature maps was found in {type(model).__name__}"
            + (", which does not run on noise: pass example images." if trace is None else ".")
        )
    wants_attention = config.attention_bits is not None or any(
        options.get("attention_bits") is not None for options in config.overrides.values()
    )
    if wants_attention and not lines:
        raise InputError(
            f"attention_bits is set, but no attention was found in {type(model).__name__}"
            + (", which does not run on noise: pass example images." if trace is None else ".")
            + " Transformers models need attn_implementation='sdpa' or 'eager'."
        )
    plan = QuantizationPlan(layers, lines, others, outputs)
    if not plan.quantized and not any(line.skipped is None for line in lines):
        reasons = Counter(line.skipped for line in plan.skipped)
        raise InputError(
            f"Nothing of {type(model).__name__} would be quantized: {len(plan.skipped)} layers stay in float, most "
            f"because: {reasons.most_common(1)[0][0]}."
        )
    return plan


def _excluded(name: str, config: QuantizationConfig) -> bool:
    return any(matches(name, pattern) for pattern in config.modules_to_not_convert)


def _require_quantizable(model: nn.Module, candidates: dict[str, nn.Module]) -> None:
    """Raise `InputError` for models that no plan can be made for."""
    kind = type(model).__name__
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise InputError("The model is quantized already. Load or build the float model again to quantize it anew.")
    for name, module in model.named_modules():
        what = f"Its part {name!r}" if name else "The model"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{what} is scripted or traced, its layers can't be replaced. Pass the eager model.")
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(f"{what} is compiled already. Quantize the eager model, then compile the student.")
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise InputError(f"{what} has parameters of no size yet. Run the model on a batch first.")
    other = next((m for m in model.modules() if f"{type(m).__module__}.".startswith(_OTHER_TOOLS)), None)
    # Models that transformers quantized, and weights that are tensors of another tool's own class.
    strange = next((m for m in candidates.values() if type(weight_of(m)) not in (nn.Parameter, torch.Tensor)), None)
    method = getattr(model, "quantization_method", None)
    if method not in (None, "sqakd") or other is not None or strange is not None:
        found = type(other).__module__ if other else method if strange is None else type(weight_of(strange)).__name__
        raise InputError(f"{kind} was quantized by another tool ({found}). Load its full-precision weights.")
    if "" in candidates:
        raise InputError(
            f"The model is itself one layer, {kind}, which can't be replaced in place. Wrap it: nn.Sequential(layer)."
        )
    if not any(quantized_class(module) for module in candidates.values()):
        types = ", ".join(sorted({type(module).__name__ for module in candidates.values()})) or "none"
        raise InputError(
            f"{kind} has no layer that can be quantized; layers with a weight matrix: {types}. "
            "register_quantized_layer adds a layer type."
        )


def _require_own_weights(candidates: dict[str, nn.Module]) -> None:
    """Raise `InputError` for a weight that is not the layer's own parameter, or that two layers share."""
    owners: dict[int, str] = {}
    for name, module in candidates.items():
        if quantized_class(module) is None and not hasattr(module, "parametrizations"):
            continue
        weight = weight_of(module)
        own = any(parameter is weight for parameter in module._parameters.values())
        if not own or hasattr(module, "parametrizations"):
            raise InputError(
                f"A parameter of {name!r} is computed by a parametrization or by pruning. Make it permanent "
                "(parametrize.remove_parametrizations or prune.remove), or list the layer in modules_to_not_convert."
            )
        if (first := owners.setdefault(id(weight), name)) != name:
            raise InputError(
                f"{first!r} and {name!r} share one weight. Untie them (give each its own copy), or list both in "
                "modules_to_not_convert."
            )


def _why_float(name: str, module: nn.Module, model: nn.Module, trace: Trace | None) -> str | None:
    """Return why a layer can't be quantized, `None` if it can."""
    cls = quantized_class(module)
    if cls is None:
        return f"no quantized form of {type(module).__name__} is registered"
    if (reason := cls.why_not(module)) is not None:
        return reason
    parents = [model.get_submodule(".".join(name.split(".")[:depth])) for depth in range(name.count(".") + 1)]
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents):
        # In evaluation it hands the weights of its layers to one fused kernel.
        return "nn.TransformerEncoderLayer computes it in a fused kernel"
    if trace is None:
        return None
    if name in trace.misused:
        return trace.misused[name]
    user = trace.bypassed.get(name)
    if user is not None and (user == "" or user != name.rpartition(".")[0]):
        return f"{user or type(model).__name__} applies its weight itself"
    if name not in trace.macs:
        return "the model does not use it in evaluation"
    return None


def _plan_layer(
    name: str,
    module: nn.Module,
    config: QuantizationConfig,
    reason: str | None,
    is_edge: bool,
    trace: Trace | None,
) -> LayerPlan:
    base = {"name": name, "layer_type": type(module).__name__, "num_weights": weight_of(module).numel()}
    if trace is not None:
        base["macs"] = trace.macs.get(name, 0)
    overrides = _overrides_of(name, config)
    if reason is None and is_edge and config.first_last_bits is None and not overrides:
        reason = FIRST_OR_LAST
    if reason is not None:
        return LayerPlan(**base, skipped=reason)
    options = config.layer_options()
    if _is_depthwise(module):
        options |= config.depthwise_options()
    if is_edge and config.first_last_bits is not None:
        options["weight_bits"] = config.first_last_bits
        if options["activation_bits"] is not None:
            options["activation_bits"] = config.first_last_bits
    for override in overrides:
        options.update(override)
    if not quantized_class(module).takes_activations:
        options["activation_bits"] = None
    return LayerPlan(
        **base,
        bypassed=trace is not None and name in trace.bypassed,
        reads_images=trace is not None and name in trace.first,
        **{key: options[key] for key in LAYER_FIELDS},
    )


def _is_depthwise(module: nn.Module) -> bool:
    """Tell whether a convolution has one filter for each channel."""
    groups = getattr(module, "groups", 1)
    return isinstance(groups, int) and 1 < groups == getattr(module, "in_channels", None)


def _plan_attention(
    name: str, module: nn.Module, config: QuantizationConfig, is_excluded: bool, trace: Trace
) -> LayerPlan:
    base = {"name": name, "layer_type": type(module).__name__, "num_weights": 0}
    base["macs"] = trace.attention_macs.get(name, 0)
    options = {**config.layer_options(), "attention_bits": config.attention_bits}
    for override in _overrides_of(name, config, attention=True):
        options.update(override)
    reason = NOT_CONVERTED if is_excluded else None
    if reason is None and options["attention_bits"] is None:
        reason = ATTENTION_OFF
    if reason is None and name == "":
        reason = "the model itself computes it"
    reason = reason or trace.attention[name]
    if reason is not None:
        return LayerPlan(**base, skipped=reason)
    return LayerPlan(
        **base,
        activation_bits=options["attention_bits"],
        fused=getattr(module, "fused_attn", None),
        **{
            key: options[key]
            for key in ("quantizer", "activation_quantizer", "integer_zero_point", "quantizer_kwargs")
        },
    )


def _plan_residual(name: str, layer_type: str, config: QuantizationConfig, reason: str | None) -> LayerPlan:
    base = {"name": name, "layer_type": layer_type, "num_weights": 0}
    reason = NOT_CONVERTED if _excluded(name, config) else reason
    if reason is not None:
        return LayerPlan(**base, skipped=reason)
    options = config.layer_options()
    return LayerPlan(
        **base,
        activation_bits=config.residual_bits,
        **{
            key: options[key]
            for key in ("quantizer", "activation_quantizer", "integer_zero_point", "quantizer_kwargs")
        },
    )


def _overrides_of(name: str, config: QuantizationConfig, attention: bool = False) -> list[dict[str, Any]]:
    """Return the overrides that reach a layer, or a module that computes attention; without what is not for it."""
    reaching = [options for pattern, options in config.overrides.items() if matches(name, pattern)]
    if attention:
        return reaching
    options_of_layers = [{k: v for k, v in options.items() if k != "attention_bits"} for options in reaching]
    return [options for options in options_of_layers if options]


def _first_and_last(model: nn.Module, names: list[str], trace: Trace | None) -> set[str]:
    """Return the names of the input and output layers: timm's metadata, else the trace, else the order names them."""
    stated: dict[str, set[str]] = {"first_conv": set(), "classifier": set()}
    for prefix, module in model.named_modules():
        metadata = getattr(module, "pretrained_cfg", None)
        if not isinstance(metadata, dict):
            continue
        for key, found in stated.items():
            value = metadata.get(key) or ()
            for name in (value,) if isinstance(value, str) else value:
                found.add(f"{prefix}.{name}" if prefix else name)
    known = set(names)
    # The metadata may be missing, or name a layer that was replaced.
    seen = (set(), set()) if trace is None else (trace.first, trace.last)
    half = len(names) // 2
    by_order = ({names[0]}, {names[-1]})
    edges = set()
    for found, traced, ordered, side in zip(
        stated.values(), seen, by_order, (set(names[: max(half, 1)]), set(names[half:])), strict=True
    ):
        found &= known if trace is not None else side
        edges |= found or traced & known or ordered
    return edges
