"""What a student is asked: its layers and quantizers, whether it is calibrated, whether it is still as planned."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..errors import InputError
from ..layers.interception import InterceptedModule
from ..layers.quantized_layer import QuantizedLayer
from ..quantization.quantizers import FakeQuantizer
from .plan import LayerPlan


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of `model`."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def quantizers(model: nn.Module) -> list[FakeQuantizer]:
    """Return the quantizers of `model`, of weights and of activations."""
    return [module for module in model.modules() if isinstance(module, FakeQuantizer)]


def layer_quantizers(layer: QuantizedLayer) -> list[FakeQuantizer]:
    """Return the quantizers of one layer: of its weight and, where activations are quantized, of its input."""
    return [quantizer for quantizer in (layer.weight_quantizer, layer.input_quantizer) if quantizer is not None]


def _planned(model: nn.Module) -> nn.Module | None:
    """Return the module whose plan it is, `None` for layers that were put in by hand."""
    # The plan lives where quantize_model was called, which a wrapper (DDP, a compiled model) holds as a child.
    return next((module for module in model.modules() if "quantization_plan" in vars(module)), None)


def require_planned_layers(model: nn.Module) -> None:
    """Raise `InputError` unless what the plan of `model` quantizes is still there, with the bits of the plan.

    Args:
        model (`nn.Module`): A student. Layers that were put in by hand have no plan and are not looked at, nor are
            layers that the plan leaves in float.
    """
    owner = _planned(model)
    if owner is None:
        return
    plan, modules = owner.quantization_plan, dict(owner.named_modules(remove_duplicate=False))
    changed = {
        line.name: what
        for lines, quantizers_of in (
            (plan.quantized, _quantizers_of_layer),
            (plan.attention, _quantizers_of_attention),
            (plan.residuals, _quantizers_of_output),
        )
        for line in lines
        if line.skipped is None and (what := _changed(modules, line, quantizers_of)) is not None
    }
    if not changed:
        # Folded into the layer in front, a BatchNorm changes the weight that a range was set for.
        gone = (name for name in owner.norms_of_plan if isinstance(modules.get(name, nn.Identity()), nn.Identity))
        changed = dict.fromkeys(gone, "a BatchNorm, gone")
    if changed:
        listed = [f"{name!r} ({changed[name]})" for name in sorted(changed)]
        raise InputError(
            f"{len(listed)} of the student's quantized layers and operations are not as quantize_model left them: "
            f"{', '.join(listed[:8])}{', ...' * (len(listed) > 8)}. What replaces or changes layers, such as timm's "
            "reparameterize_model, reset_classifier, fuse_conv_bn_eval or SyncBatchNorm's conversion, is done to the "
            "float model: do it there, then quantize that."
        )


Found = list[tuple[FakeQuantizer | None, int | None]]  # quantizers, each with its bits in the plan


def _changed(
    modules: Mapping[str, nn.Module], line: LayerPlan, quantizers_of: Callable[..., Found | None]
) -> str | None:
    """Say what became of a line of the plan, `None` where it is as it was."""
    if line.name not in modules:
        return "gone"
    module = modules[line.name]
    found = quantizers_of(module, line)
    if found is None or any((quantizer is None) != (bits is None) for quantizer, bits in found):
        return f"now {type(module).__name__}, not quantized as planned"
    parent, _, child = line.name.rpartition(".")
    if line.bypassed and child not in getattr(modules[parent], "bypassed_layers", ()):
        return f"not quantized by {parent!r}, now {type(modules[parent]).__name__}"
    other = [(quantizer.bits, bits) for quantizer, bits in found if quantizer is not None and quantizer.bits != bits]
    return f"{other[0][0]} bits instead of {other[0][1]}" if other else None


def _quantizers_of_layer(module: nn.Module, line: LayerPlan) -> Found | None:
    if not isinstance(module, QuantizedLayer):
        return None
    return [(module.weight_quantizer, line.weight_bits), (module.input_quantizer, line.activation_bits)]


def _quantizers_of_attention(module: nn.Module, line: LayerPlan) -> Found | None:
    if not isinstance(module, InterceptedModule) or "attention_quantizers" not in module._modules:
        return None
    return [(quantizer, line.activation_bits) for quantizer in module.attention_quantizers.children()]


def _quantizers_of_output(module: nn.Module, line: LayerPlan) -> Found | None:
    if not isinstance(module, InterceptedModule) or "output_quantizer" not in module._modules:
        return None
    return [(module.output_quantizer, line.activation_bits)]


def record_signedness(model: nn.Module) -> None:
    """Bring the plan of `model` up to date with what its input quantizers found or were loaded with."""
    owner = _planned(model)
    if owner is None:
        return
    found = {
        name: layer.input_quantizer.signed
        for name, layer in quantized_layers(owner).items()
        if layer.input_quantizer is not None
    }
    owner.quantization_plan = owner.quantization_plan.with_signedness(found)


def is_calibrated(model: nn.Module) -> bool:
    """Tell whether every quantizer of `model` has its range."""
    return all(quantizer.calibrated for quantizer in quantizers(model))


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers of `model`."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a model's parameters by name, without those of quantizers."""
    own = {
        id(tensor) for module in model.modules() if isinstance(module, FakeQuantizer) for tensor in module.parameters()
    }
    return {name: tensor.shape for name, tensor in model.named_parameters() if id(tensor) not in own}
