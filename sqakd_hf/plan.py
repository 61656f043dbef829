"""The plan, made before any change: which layer gets which bits, by which quantizer, or why it stays in float."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .configuration import LAYER_FIELDS, QuantizationConfig, check_patterns, matches
from .errors import InputError
from .layers import QuantizedLayer, quantized_class


# The reasons that the caller gave; all others are worth a warning.
NOT_CONVERTED = "listed in modules_to_not_convert"
FIRST_OR_LAST = "first or last layer"


@dataclass(frozen=True)
class LayerPlan:
    """One layer's line in the plan.

    `skipped` holds the reason where the layer stays in float, else it is `None`. `signed_input` is `None` until
    calibration has seen whether the layer's input can be negative; weights are always signed.
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


@dataclass(frozen=True)
class QuantizationPlan:
    """All layers that hold a weight matrix or kernel, in the model's order. `print(plan)` shows it as a table."""

    layers: tuple[LayerPlan, ...]

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    @property
    def quantized(self) -> list[LayerPlan]:
        """The layers that are quantized."""
        return [layer for layer in self.layers if layer.skipped is None]

    @property
    def skipped(self) -> list[LayerPlan]:
        """The layers that stay in float."""
        return [layer for layer in self.layers if layer.skipped is not None]

    def bits(self) -> str:
        """The bits that most of the quantized weights have, as `"W2A2"`."""
        weights = Counter()
        for layer in self.quantized:
            weights[bits_of(layer)] += layer.num_weights
        return weights.most_common(1)[0][0] if weights else "float"

    def weight_bytes(self) -> int:
        """Bytes that the weights of these layers take: whole codes of `bits` bits each, four bytes where float."""
        return sum((layer.num_weights * (layer.weight_bits or 32) + 7) // 8 for layer in self.layers)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the plan as JSON-ready data."""
        return [asdict(layer) for layer in self.layers]

    def with_signedness(self, signed: dict[str, bool]) -> "QuantizationPlan":
        """Return the plan with what calibration found: layer name → whether its input can be negative."""
        return QuantizationPlan(
            tuple(replace(layer, signed_input=signed.get(layer.name, layer.signed_input)) for layer in self.layers)
        )

    def summary(self) -> str:
        """Return one line: how many layers at which bits, and how many stay in float."""
        counts = Counter(bits_of(layer) for layer in self.quantized)
        parts = [f"{count} at {bits}" for bits, count in counts.most_common()]
        if self.skipped:
            parts.append(f"{len(self.skipped)} in float")
        return f"{len(self.layers)} layers: {', '.join(parts)}"

    def __str__(self) -> str:
        rows = [("layer", "type", "weights", "bits", "quantizer", "weight ranges", "input")]
        for layer in self.layers:
            if layer.skipped is None:
                ranges = "per channel" if layer.per_channel else "per tensor"
                end = (bits_of(layer), layer.quantizer, ranges, _INPUT[layer.activation_bits and layer.signed_input])
            else:
                end = ("float", f"({layer.skipped})", "", "")
            rows.append((layer.name, layer.layer_type, f"{layer.num_weights:,}", *end))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, self.summary()])


_INPUT = {True: "signed", False: "unsigned", None: ""}


def bits_of(layer: LayerPlan) -> str:
    """Return a quantized layer's bits as `"W2A4"`."""
    return f"W{layer.weight_bits}A{layer.activation_bits or 'float'}"


def plan_quantization(model: nn.Module, config: QuantizationConfig) -> QuantizationPlan:
    """Decide for each layer of `model` what `config` makes of it; the model is not changed.

    Layers are the modules that own a floating-point `weight` of two or more dimensions and have no such module below
    them. First and last are the layers that timm's metadata names, or else the first and the last registered.

    Raises:
        `InputError`: A model without a layer to quantize or quantized already, or a pattern that matches nothing.
    """
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise InputError("The model is quantized already. Load or build the float model again to quantize it anew.")
    candidates = {name: module for name, module in model.named_modules() if _holds_weight_matrix(module)}
    names = list(candidates)
    if "" in candidates:
        raise InputError(
            f"The model is itself one layer, {type(model).__name__}, which can't be replaced in place. "
            "Wrap it: nn.Sequential(layer)."
        )
    if not any(quantized_class(module) for module in candidates.values()):
        types = ", ".join(sorted({type(module).__name__ for module in candidates.values()})) or "none"
        raise InputError(
            f"{type(model).__name__} has no layer that can be quantized; layers with a weight matrix: {types}. "
            "register_quantized_layer adds a layer type."
        )
    check_patterns(config.modules_to_not_convert, names, "modules_to_not_convert")
    check_patterns(list(config.overrides), names, "overrides")
    edges = _first_and_last(model, [name for name in names if quantized_class(candidates[name])])
    # In evaluation nn.TransformerEncoderLayer hands the weights of its layers to one fused kernel.
    fused = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for name, _ in module.named_modules()
    }
    return QuantizationPlan(
        tuple(_plan_layer(name, module, config, name in edges, name in fused) for name, module in candidates.items())
    )


def _plan_layer(name: str, module: nn.Module, config: QuantizationConfig, is_edge: bool, is_fused: bool) -> LayerPlan:
    base = {"name": name, "layer_type": type(module).__name__, "num_weights": module.weight.numel()}
    overrides = [options for pattern, options in config.overrides.items() if matches(name, pattern)]
    if any(matches(name, pattern) for pattern in config.modules_to_not_convert):
        return LayerPlan(**base, skipped=NOT_CONVERTED)
    if "weight" not in module._parameters:
        return LayerPlan(**base, skipped="its weight is computed by a parametrization")
    if quantized_class(module) is None:
        return LayerPlan(**base, skipped=f"no quantized form of {type(module).__name__} is registered")
    if is_fused:
        return LayerPlan(**base, skipped="nn.TransformerEncoderLayer computes it in a fused kernel")
    if is_edge and config.first_last_bits is None and not overrides:
        return LayerPlan(**base, skipped=FIRST_OR_LAST)
    options = config.layer_options()
    if is_edge and config.first_last_bits is not None:
        options["weight_bits"] = config.first_last_bits
        if options["activation_bits"] is not None:
            options["activation_bits"] = config.first_last_bits
    for override in overrides:
        options.update(override)
    return LayerPlan(**base, **{key: options[key] for key in LAYER_FIELDS})


def _holds_weight_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() >= 2 and weight.is_floating_point()


def _first_and_last(model: nn.Module, names: list[str]) -> set[str]:
    """Return the names of the input and output layers: from timm's metadata where present, else by order."""
    edges = set()
    for prefix, module in model.named_modules():
        metadata = getattr(module, "pretrained_cfg", None)
        if not isinstance(metadata, dict):
            continue
        for key in ("first_conv", "classifier"):
            value = metadata.get(key) or ()
            for name in (value,) if isinstance(value, str) else value:
                edges.add(f"{prefix}.{name}" if prefix else name)
    edges &= set(names)
    # timm's metadata may be missing, or name a layer that was replaced: registration order fills the gap.
    if not any(name in edges for name in names[: len(names) // 2]):
        edges.add(names[0])
    if not any(name in edges for name in names[len(names) // 2 :]):
        edges.add(names[-1])
    return edges
