"""Channels of different sizes in front of a depthwise convolution, brought to one size at no cost."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..layers import QuantizedLayer
from ..quantizers import FakeQuantizer
from .inputs import UnitInputs
from .state import UnitState
from .units import Unit


# A channel is enlarged at most so many times: one that is almost dead says little about what it will hold.
_LIMIT = 8.0
# What a float unit may change by, over its largest output.
_EXACT = 1e-5
_HOMOGENEOUS = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout)


@torch.no_grad()
def equalize_unit(unit: Unit, student: nn.Module, inputs: UnitInputs, device: torch.device) -> list[str]:
    """Enlarge channels that a depthwise convolution takes to the size of the largest, in place.

    The BatchNorm in front gives each channel `scale` times as much, the channel's own filter is divided by it. All
    channels of an activation share one range, in which small ones would have few values; filters have ranges of
    their own, to which the scale is nothing. Scales are 1 or more and stop where the largest value that was seen
    reaches the bound of a ReLU6, so the float network stays as it is; that is verified, and what is not exact undone.
    The idea is that of cross-layer equalization ([Data-Free Quantization](https://arxiv.org/abs/1906.04721)).

    Args:
        unit (`Unit`): The unit.
        student (`nn.Module`): In eval mode.
        inputs (`UnitInputs`): What the unit takes.
        device (`torch.device`): Where the student is.

    Returns:
        `list[str]`: The depthwise convolutions whose input was equalized.
    """
    layers = {name: student.get_submodule(name) for name in unit.layers}
    depthwise = {name: layer for name, layer in layers.items() if _is_depthwise(layer)}
    if not depthwise:
        return []
    done = []
    with _in_float(unit, student):
        before, pairs = _watch(unit, student, depthwise, inputs.copies(device))
        for name, (norm, sizes) in pairs.items():
            if not isinstance(norm.weight, nn.Parameter) or not isinstance(norm.bias, nn.Parameter):
                continue
            scale = (sizes.max() / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).clamp(1, _LIMIT)
            state = UnitState([norm, depthwise[name]])
            norm.weight.mul_(scale)
            norm.bias.mul_(scale)
            depthwise[name].stored_weight.div_(scale.view(-1, 1, 1, 1))
            after = unit.run(student, inputs.copies(device))
            if float((after - before).abs().max()) <= _EXACT * float(before.abs().max()):
                done.append(name)
            else:
                state.restore()
    return done


def _is_depthwise(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and isinstance(layer, QuantizedLayer)
        and 1 < layer.groups == layer.in_channels == layer.out_channels
        and layer.weight_quantizer.channel_axis == 0
        and layer.float_weight() is layer.stored_weight
    )


def _watch(
    unit: Unit, student: nn.Module, layers: dict[str, nn.Module], columns: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, tuple[nn.Module, torch.Tensor]]]:
    """Run the unit; return its output, and for each layer that directly follows a BatchNorm that and channels' maxima.

    Between the two there may be activations for which a scale of the input is one of the output.
    """
    behind: dict[int, nn.Module] = {}
    kept: list[torch.Tensor] = []  # alive, so that no other tensor has their ids
    pairs: dict[str, tuple[nn.Module, torch.Tensor]] = {}

    def note_norm(module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
        act = getattr(module, "act", None)  # timm's norms have one inside
        if act is None or isinstance(act, _HOMOGENEOUS):
            behind[id(output)] = module
            kept.append(output)

    def note_activation(_module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if id(args[0]) in behind:
            behind[id(output)] = behind[id(args[0])]
            kept.append(output)

    with contextlib.ExitStack() as stack:
        for module in (inner for outer in unit.of(student) for inner in outer.modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                stack.callback(module.register_forward_hook(note_norm).remove)
            elif isinstance(module, _HOMOGENEOUS):
                stack.callback(module.register_forward_hook(note_activation).remove)
        for name, layer in layers.items():

            def note_layer(_module: nn.Module, args: tuple, name: str = name) -> None:
                if id(args[0]) in behind:
                    pairs[name] = behind[id(args[0])], args[0].abs().amax((0, 2, 3))

            stack.callback(layer.register_forward_pre_hook(note_layer).remove)
        output = unit.run(student, columns)
    return output, pairs


@contextlib.contextmanager
def _in_float(unit: Unit, student: nn.Module) -> Iterator[None]:
    """Let all quantizers of a unit pass their input on."""
    quantizers = [m for outer in unit.of(student) for m in outer.modules() if isinstance(m, FakeQuantizer)]
    try:
        for quantizer in quantizers:
            quantizer.forward = _identity  # a hook would come too late where there is no range yet
        yield
    finally:
        for quantizer in quantizers:
            vars(quantizer).pop("forward", None)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x
