"""Adam with a rate of its own for each element, and the rates of a unit's parameters in units of what they mean."""

from collections.abc import Sequence

import torch
from torch import nn

from ..layers.quantized_layer import QuantizedLayer
from ..quantization.functional import along
from ..quantization.quantizers import FakeQuantizer


# Fractions of a weight's step, of a range's width and of a norm's or bias's mean size, for one update.
WEIGHT_RATE = 0.02
RANGE_RATE = 3e-3
VECTOR_RATE = 1e-3


class RatedAdam:
    """Adam ([Adam](https://huggingface.co/papers/1412.6980)) whose rate is a tensor for each parameter.

    Args:
        parameters (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): Each with its rate, broadcastable.
    """

    BETAS = (0.9, 0.99)
    EPSILON = 1e-12

    def __init__(self, parameters: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        self.parameters = [parameter for parameter, _ in parameters]
        self._rates = [rate for _, rate in parameters]
        self._first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor | None], factor: float) -> None:
        """Update all parameters in place, at their rates times `factor`; without a gradient one stays."""
        self._steps += 1
        corrections = [1 - beta**self._steps for beta in self.BETAS]
        for parameter, rate, first, second, gradient in zip(
            self.parameters, self._rates, self._first, self._second, gradients, strict=True
        ):
            if gradient is None:
                continue
            first.lerp_(gradient, 1 - self.BETAS[0])
            second.mul_(self.BETAS[1]).addcmul_(gradient, gradient, value=1 - self.BETAS[1])
            direction = first / corrections[0] / (second / corrections[1]).sqrt_().add_(self.EPSILON)
            parameter.sub_(direction.mul_(rate).mul_(factor))


@torch.no_grad()
def rated_parameters(modules: Sequence[nn.Module]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what a unit learns, each parameter with its rate.

    Weights move by a share of their step, the ends of activations' ranges by a share of their width, norms and biases
    by a share of their mean size. Weights' ranges stay, and so do weights in float.
    """
    found: dict[torch.Tensor, torch.Tensor] = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, QuantizedLayer):
            found[module.stored_weight] = WEIGHT_RATE * weight_step(module)
        elif isinstance(module, FakeQuantizer):
            if module.role == "activation":
                found.update(_rated_range(module))
            continue
        size = next((p.abs().mean() for p in module.parameters(recurse=False) if p.dim() == 1), None)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1 and parameter not in found:
                found[parameter] = VECTOR_RATE * size
    return list(found.items())


def weight_step(layer: QuantizedLayer) -> torch.Tensor:
    """Return the distance between two codes of a layer's stored weight, broadcastable to it."""
    quantizer, stored = layer.weight_quantizer, layer.stored_weight
    scale, _ = quantizer.qparams()
    # What is quantized may be the weight in another scale: standardised, or passed through a tanh.
    quantized = quantizer.rows(quantizer.transform(layer.float_weight())).abs().mean(1)
    size = quantizer.rows(stored).abs().mean(1)
    ratio = torch.where(quantized > 0, size / quantized, 1.0)
    return along(scale * ratio, stored, quantizer.channel_axis)


def _rated_range(quantizer: FakeQuantizer) -> dict[torch.Tensor, torch.Tensor]:
    """Return rates by which the farther end of the range moves `RANGE_RATE` of its width.

    The lower end of an input that is never negative stays at zero: to leave it would cost a code.
    """
    tensors = [tensor for tensor in quantizer.parameters(recurse=False) if tensor.requires_grad]
    if not tensors:
        return {}
    with torch.enable_grad():
        ends = quantizer.clip_range()
        width = (ends[1] - ends[0]).detach()
        slopes = [_slopes(end, tensors) for end in ends]
    rates = {}
    for tensor, of_lower, of_upper in zip(tensors, *slopes, strict=True):
        if quantizer.signed or not bool(of_lower.any()):
            rates[tensor] = RANGE_RATE * width / torch.maximum(of_lower, of_upper).clamp(min=1e-6)
    return rates


def _slopes(end: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return how far an end of a range moves with each of its tensors."""
    if not end.requires_grad:  # PACT's lower end is zero
        return [torch.zeros_like(tensor) for tensor in tensors]
    found = torch.autograd.grad(end.sum(), tensors, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if slope is None else slope.abs() for slope, x in zip(found, tensors, strict=True)]
