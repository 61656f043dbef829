"""Where a training that met NaN or infinity went wrong: the first layer, and what of it."""

from collections.abc import Callable

import torch
from torch import nn

from .convert import quantized_layers, quantizers


class NonFiniteError(ArithmeticError):
    """The loss or its gradient is no number any more; the message names the first layer concerned."""


def first_non_finite(model: nn.Module, forward: Callable[[], torch.Tensor]) -> str:
    """Say what is not finite in `model`: the first layer with a bad range, weight or input, or else a bad gradient.

    Args:
        model (`nn.Module`): The student. Its gradients are gone afterwards.
        forward (`Callable`): Runs the model on the batch concerned and returns the loss.
    """
    found: list[str] = []
    handles = [
        layer.register_forward_pre_hook(_Inspect(name, found), with_kwargs=True)
        for name, layer in quantized_layers(model).items()
    ]
    try:
        with torch.enable_grad():
            loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    if not _is_finite(loss):
        return "all layers and their inputs are finite; the loss itself is not (the model's head, or the teacher)"
    model.zero_grad()
    loss.backward()
    # The backward goes from the last layer to the first: the last bad one is where it began.
    bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter.grad)]
    model.zero_grad()
    return f"the gradient of {bad[-1]!r}" if bad else "nothing on this batch: it was another batch of the same step"


class _Inspect:
    """Note the first of a layer's ranges, its weight and its input that is not finite, when the layer runs."""

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
