"""From a float model to a calibrated student, in place: `quantize_model`, then `calibrate_model`."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..layers.interception import AttentionQuantizers, InterceptedModule, intercept, release
from ..layers.quantized_layer import QuantizedLayer, quantized_class
from ..quantization.quantizers import FEW_BITS, FakeQuantizer, create_quantizer
from .config import QuantizationConfig
from .plan import ASKED_FOR, LayerPlan, QuantizationPlan
from .planner import plan_quantization
from .rollback import holders, undone_on_error
from .student import batch_norms, device_of, quantized_layers


logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
_AFTER: list[Callable[[nn.Module, QuantizationConfig], None]] = []


def after_quantizing(act: Callable[[nn.Module, QuantizationConfig], None]) -> Callable[..., None]:
    """Register what else [`quantize_model`] does to a new student, which it passes with the config.

    The conversion knows nothing of files: what makes a student savable registers itself here.
    """
    _AFTER.append(act)
    return act


def quantize_model(
    model: nn.Module, config: QuantizationConfig | None = None, images: torch.Tensor | None = None
) -> QuantizationPlan:
    """Replace the convolutions, linear layers and embeddings of `model` by fake-quantized ones, in place.

    Parameters are shared, state-dict keys such as `layer1.0.conv1.weight` stay, and a float state dict still loads.
    Half-precision parameters and buffers become float32, with a warning. The student has no ranges until
    [`calibrate_model`] sets them. On any error the model is left as it was.

    Args:
        model (`nn.Module`): Any eager model, from timm, transformers or your own.
        config (`QuantizationConfig`, *optional*): Defaults to `QuantizationConfig()`.
        images (`torch.Tensor`, *optional*): Example images `(B, C, H, W)`, see [`plan_quantization`].

    Returns:
        `QuantizationPlan`: What was done to each layer; `print` it. Also kept as `model.quantization_plan`.

    Raises:
        `InputError`: A model without a layer to quantize or quantized already, a pattern that matches nothing, an
            option that a quantizer does not take.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 10))
        >>> print(quantize_model(model, QuantizationConfig(weight_bits=2, activation_bits=4)).summary())
        3 layers: 2 at W8A8, 1 at W2A4
    """
    config = QuantizationConfig() if config is None else config
    if not isinstance(config, QuantizationConfig):
        raise InputError(f"config must be a QuantizationConfig, got {type(config).__name__}.")
    with undone_on_error(model):
        plan = convert_model(model, config, images)
        for act in _AFTER:
            act(model, config)
    return plan


def convert_model(model: nn.Module, config: QuantizationConfig, images: torch.Tensor | None) -> QuantizationPlan:
    """Do what [`quantize_model`] does to the layers of `model`, and nothing else."""
    with undone_on_error(model):
        narrow = _make_float32(model)
        plan = plan_quantization(model, config, images)
        apply_plan(model, plan)
    lines = (*plan.layers, *plan.others, *plan.attention, *plan.residuals)
    if narrow:
        warn_of_float32(narrow)
    left = [f"{line.name} ({line.skipped})" for line in lines if line.skipped not in (None, *ASKED_FOR)]
    if left:
        logger.warning("Left in float: %s.", ", ".join(left))
    logger.info("Quantized %s.", plan.summary())
    return plan


def require_float32_latents(model: nn.Module) -> None:
    """Make half-precision parameters and buffers of `model` float32, in place, with a warning: a training begins.

    Weights that were loaded from codes become the values of these, to the last bit of float32.
    """
    if narrow := _make_float32(model):
        warn_of_float32(narrow)


def warn_of_float32(narrow: Iterable[torch.dtype]) -> None:
    """Say that what had these dtypes is float32 now."""
    logger.warning(
        "Parameters or buffers of the model were %s; a student trains float32 latents, so they are float32 now.",
        " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow)),
    )


def _make_float32(model: nn.Module) -> set[torch.dtype]:
    """Make half-precision tensors of `model` float32, in place; return the dtypes that they had."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in HALF]
    found = {tensor.dtype for tensor in tensors}
    exact = {
        layer.stored_weight: layer.values_of(layer.weight_codes(), layer.stored_weight.shape)
        for layer in quantized_layers(model).values()
        if layer.weight_is_on_grid and layer.stored_weight.dtype in HALF
    }
    for tensor in tensors:
        grad, tensor.grad = tensor.grad, None
        tensor.data = exact[tensor] if tensor in exact else tensor.data.float()
        tensor.grad = None if grad is None else grad.float()
    return found


def apply_plan(model: nn.Module, plan: QuantizationPlan) -> None:
    """Replace the layers of `model` as `plan` says, in place, and keep it as `model.quantization_plan`."""
    modules = dict(model.named_modules())
    twins = {modules[layer.name]: _quantize_layer(modules[layer.name], layer) for layer in plan.quantized}
    attention = {
        line.name: AttentionQuantizers(*(_activation_quantizer(line) for _ in range(4))).to(device_of(model))
        for line in plan.attention
        if line.skipped is None
    }
    outputs = {
        line.name: _activation_quantizer(line).to(device_of(model)) for line in plan.residuals if line.skipped is None
    }
    _replace([*model.modules(), *twins.values()], twins)
    fused = {line.name: line.fused for line in plan.attention}
    for name, module_quantizers in attention.items():
        intercept(model.get_submodule(name), attention_quantizers=module_quantizers, fused=fused[name])
    for name, quantizer in outputs.items():
        intercept(model.get_submodule(name), output_quantizer=quantizer)
    for layer in plan.quantized:
        if layer.bypassed:
            parent, _, child = layer.name.rpartition(".")
            intercept(model.get_submodule(parent), bypassed=[child])
    norms = set(batch_norms(model))
    model.quantization_plan = plan
    model.norms_of_plan = tuple(name for name, module in model.named_modules() if module in norms)
    model.register_load_state_dict_pre_hook(_report_missing_ranges)
    fix_image_ranges(model)


def fix_image_ranges(model: nn.Module) -> None:
    """Take the ranges that the plan does not want learned out of the training; loading makes parameters anew."""
    for layer in model.quantization_plan.quantized:
        if not layer.learns_input_range:
            model.get_submodule(layer.name).input_quantizer.requires_grad_(False)


def _report_missing_ranges(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    prefix: str,
    _metadata: dict[str, Any],
    _strict: bool,
    missing_keys: list[str],
    *_: list[str],
) -> None:
    """Before `load_state_dict`: report the quantizers that a student's state lacks altogether.

    A quantizer, which sees its own keys alone, takes that for a float network's state, which has no range at all.
    """
    keys = [
        [f"{prefix}{name}.{key}" for key in module.state_dict()]
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizer)
    ]
    lacking = [own for own in keys if not any(key in state_dict for key in own)]
    if len(lacking) < len(keys):
        missing_keys += [key for own in lacking for key in own]


def _replace(parents: Iterable[nn.Module], twins: Mapping[nn.Module, nn.Module]) -> None:
    """Put the twins in the place of their modules, wherever the parents hold them."""
    for parent in parents:
        for held in holders(parent):  # not named_children(), which names a shared child once
            for key, child in held.items() if isinstance(held, dict) else enumerate(held):
                if isinstance(child, nn.Module) and child in twins:
                    held[key] = twins[child]


def _activation_quantizer(plan: LayerPlan) -> FakeQuantizer:
    bits = plan.activation_bits
    name = plan.activation_quantizer or plan.quantizer
    quantizer = create_quantizer(name, bits=bits, role="activation", signed=None, **_options(plan))
    if plan.reads_images:
        # The methods' own ways are made for what layers put out; pixels end where they end.
        quantizer.searched_bits = (*range(1, FEW_BITS + 1), *quantizer.searched_bits)
    return quantizer


def _quantize_layer(layer: nn.Module, plan: LayerPlan) -> QuantizedLayer:
    cls = quantized_class(layer)
    weight = getattr(layer, cls.weight_name)
    device = weight.device
    weight_quantizer = create_weight_quantizer(plan, cls, weight.shape).to(device)
    input_quantizer = None
    if plan.activation_bits is not None:
        input_quantizer = _activation_quantizer(plan).to(device)
    return cls.from_float(layer, weight_quantizer, input_quantizer)


def create_weight_quantizer(plan: LayerPlan, cls: type[QuantizedLayer], shape: torch.Size) -> FakeQuantizer:
    """Create the quantizer that `plan` wants for a weight of this shape, without a range."""
    per_channel = {"channel_axis": cls.channel_axis, "num_channels": shape[cls.channel_axis]}
    return create_quantizer(
        plan.quantizer,
        bits=plan.weight_bits,
        role="weight",
        **(per_channel if plan.per_channel else {}),
        **_options(plan),
    )


def _options(plan: LayerPlan) -> dict[str, Any]:
    return {"integer_zero_point": plan.integer_zero_point, **plan.quantizer_kwargs}


def dequantize_model(model: nn.Module) -> None:
    """Put the plain float layers back, in place: their weights are the quantized values, activations stay in float."""
    with undone_on_error(model):
        for module in list(model.modules()):
            if isinstance(module, InterceptedModule):
                release(module)
        twins = {layer: layer.dequantized() for layer in quantized_layers(model).values()}
        _replace([*model.modules(), *twins.values()], twins)
        for name in ("quantization_plan", "norms_of_plan"):
            vars(model).pop(name, None)
        for key, wrapped in list(model._load_state_dict_pre_hooks.items()):
            if wrapped.hook is _report_missing_ranges:
                del model._load_state_dict_pre_hooks[key]
