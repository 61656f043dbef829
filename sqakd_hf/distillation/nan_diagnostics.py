"""Where a training that met NaN or infinity went wrong: the first layer, and what of it."""

from collections.abc import Callable

import torch
from torch import nn

from ..conversion.student import quantized_layers, quantizers


class NonFiniteError(ArithmeticError):
    """The loss, a gradient or a parameter is no number any more; the message names the first one concerned."""


def first_non_finite_layer(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run `forward` and say which layer of `model` is the first to have a bad input, range or other parameter."""
    found: list[str] = []
    handles = [
        layer.register_forward_pre_hook(_Inspect(name, found), with_kwargs=True)
        for name, layer in quantized_layers(model).items()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "no layer and no input of one, but what the model makes of them, or the teacher"


def first_non_finite_gradient(model: nn.Module) -> str | None:
    """Name the parameter where the backward went wrong, `None` if all gradients are finite.

    The backward goes from the last layer to the first: of the bad ones, the last in the model's order is the first.
    """
    bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter.grad)]
    return f"the gradient of {bad[-1]!r}" if bad else None


def first_non_finite_parameter(model: nn.Module) -> str | None:
    """Name the first parameter or buffer, in the model's order, that is not finite; `None` if all are."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return next((repr(name) for name, tensor in tensors if not _is_finite(tensor)), None)


class _Inspect:
    """Note what of a layer is not finite when it runs: its input, a range, another parameter, in this order."""

    def __init__(self, name: str, found: list[str]):
        self.name, self.found = name, found

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not all(map(_is_finite, inputs)):
            self.found.append(f"the input of layer {self.name!r}")
        for quantizer in quantizers(layer):
            if not all(map(_is_finite, quantizer.range_tensors().values())):
                self.found.append(f"the range of the {quantizer.role} quantizer of layer {self.name!r}")
        if not all(map(_is_finite, layer.parameters())):
            self.found.append(f"a parameter of layer {self.name!r}")


def _is_finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
