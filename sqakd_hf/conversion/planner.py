"""The decisions of a plan: which layer gets which bits, by which quantizer, or why it stays in float."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import InputError
from ..layers.quantized_layer import QuantizedLayer, quantized_class, weight_of
from .config import LAYER_FIELDS, QuantizationConfig, check_patterns, matches
from .plan import ATTENTION_OFF, FIRST_OR_LAST, NOT_CONVERTED, LayerPlan, QuantizationPlan
from .trace import trace_model
from .watcher import Trace


# What the line of a module that has activations alone takes of a layer's options.
_OF_ACTIVATIONS = ("quantizer", "activation_quantizer", "integer_zero_point", "quantizer_kwargs")
# Packages whose layers are quantized already.
_OTHER_TOOLS = ("torch.ao.", "torchao.", "bitsandbytes.", "optimum.quanto.", "hqq.", "gptqmodel.", "awq.", "brevitas.")


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
    residuals = {} if trace is None or config.resolved_residual_bits() is None else trace.residuals
    if config.residual_bits == "auto":
        residuals = {name: reason for name, reason in residuals.items() if name in trace.by_convolutions}
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
    if config.residual_bits not in (None, "auto") and not any(line.skipped is None for line in outputs):
        raise InputError(
            "residual_bits is set, but no convolutions' feature maps that are added or pooled were found in "
            f"{type(model).__name__}"
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
    if is_depthwise(module):
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


def is_depthwise(module: nn.Module) -> bool:
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
        **{key: options[key] for key in _OF_ACTIVATIONS},
    )


def _plan_residual(name: str, layer_type: str, config: QuantizationConfig, reason: str | None) -> LayerPlan:
    base = {"name": name, "layer_type": layer_type, "num_weights": 0}
    reason = NOT_CONVERTED if _excluded(name, config) else reason
    if reason is not None:
        return LayerPlan(**base, skipped=reason)
    options = config.layer_options()
    return LayerPlan(
        **base,
        activation_bits=config.resolved_residual_bits(),
        **{key: options[key] for key in _OF_ACTIVATIONS},
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
