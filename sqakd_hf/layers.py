"""Convolutions and linear layers whose input and weight pass through fake quantizers."""

from collections.abc import Callable

import torch
from torch import nn

from .errors import InputError
from .quantizers import FakeQuantizer


class QuantizedLayer(nn.Module):
    """Mixin, placed before the float class, that adds `weight_quantizer` and `input_quantizer`.

    A quantized layer is the float layer with two more children: the same parameters under the same state-dict keys,
    the same hooks and attributes. `channel_axis` is the weight's axis of output channels.

    A layer that was loaded from codes has `weight_is_on_grid` set: its `weight` holds the quantized values and is
    used as it is. `train()` turns them into a latent weight again, which quantizes to the same values.
    """

    channel_axis = 0
    weight_is_on_grid = False
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | None

    @classmethod
    def from_float(
        cls, layer: nn.Module, weight_quantizer: FakeQuantizer, input_quantizer: FakeQuantizer | None
    ) -> "QuantizedLayer":
        """Return a quantized twin of `layer` that shares its parameters; nothing is copied or re-initialised.

        Args:
            layer (`nn.Module`): The float layer; it stays usable.
            weight_quantizer (`FakeQuantizer`): Applied to `layer.weight` in each forward.
            input_quantizer (`FakeQuantizer`, *optional*): Applied to the layer's input; `None` leaves it in float.
        """
        twin = cls.__new__(cls)
        # Share everything but the tables of parameters, buffers, children and hooks themselves. Building the layer
        # through __init__ instead would have to know the arguments of every subclass.
        twin.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(layer).items()}
        twin.weight_quantizer = weight_quantizer
        twin.input_quantizer = input_quantizer
        weight_quantizer.train(layer.training)
        if input_quantizer is not None:
            input_quantizer.train(layer.training)
        return twin

    def to_float(self) -> nn.Module:
        """Return the plain float layer, sharing the (unquantized) parameters."""
        plain = object.__new__(_FLOAT_CLASS[type(self)])
        plain.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(self).items()}
        for name in ("weight_quantizer", "input_quantizer"):
            plain._modules.pop(name, None)
            plain.__dict__.pop(name, None)  # where activations stay in float
        plain.__dict__.pop("weight_is_on_grid", None)
        return plain

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantize the layer's input, or pass it through where activations stay in float."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_weight(self) -> torch.Tensor:
        """Fake-quantize the layer's weight."""
        return self.weight if self.weight_is_on_grid else self.weight_quantizer(self.weight)

    # --- codes ---

    def weight_codes(self) -> torch.Tensor:
        """Return the weight's codes, `uint8` `(channels, n)`: one row for each output channel."""
        encode = self.weight_quantizer.encode if self.weight_is_on_grid else self.weight_quantizer.quantize
        return encode(self.weight.detach()).movedim(self.channel_axis, 0).flatten(1)

    def set_weight_codes(self, codes: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        """Make the weight, of this shape and dtype, the values of `codes` as [`weight_codes`] returns them."""
        rows_first = [shape[self.channel_axis], *(n for i, n in enumerate(shape) if i != self.channel_axis)]
        codes = codes.view(rows_first).movedim(0, self.channel_axis)
        values = self.weight_quantizer.dequantize(codes).to(dtype)
        # The weight keeps its place in front of the bias: optimizers number parameters in this order.
        others = {name: value for name, value in self._parameters.items() if name != "weight"}
        self._buffers.pop("weight", None)
        self._parameters = {"weight": nn.Parameter(values.contiguous()), **others}
        self.weight_is_on_grid = True

    @torch.no_grad()
    def restore_latent(self) -> None:
        """Make a weight that holds quantized values one that trains: it quantizes to the values it had."""
        if self.weight_is_on_grid:
            self.weight.copy_(self.weight_quantizer.latent(self.weight))
            self.weight_is_on_grid = False

    def train(self, mode: bool = True) -> "QuantizedLayer":
        if mode:
            self.restore_latent()
        return super().train(mode)

    # --- state: always the latent weight ---

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_is_on_grid:
            values = destination[prefix + "weight"].detach()
            latent = self.weight_quantizer.latent(values)
            if latent is not values:
                destination[prefix + "weight"] = latent

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "weight" in state_dict:
            self.weight_is_on_grid = False
        super()._load_from_state_dict(state_dict, prefix, *args)


_REGISTRY: dict[type[nn.Module], type[QuantizedLayer]] = {}
_FLOAT_CLASS: dict[type[QuantizedLayer], type[nn.Module]] = {}


def register_quantized_layer(float_class: type[nn.Module]) -> Callable[[type[QuantizedLayer]], type[QuantizedLayer]]:
    """Register the quantized form of `float_class` (this exact class: a subclass may compute something else).

    ```python
    @register_quantized_layer(nn.Linear)
    class QuantizedLinear(QuantizedLayer, nn.Linear):
        def forward(self, x):
            return nn.functional.linear(self.quantized_input(x), self.quantized_weight(), self.bias)
    ```
    """

    def decorate(cls: type[QuantizedLayer]) -> type[QuantizedLayer]:
        order = cls.__mro__
        if not (QuantizedLayer in order and float_class in order) or order.index(QuantizedLayer) > order.index(
            float_class
        ):
            raise InputError(
                f"{cls.__name__} must inherit from QuantizedLayer and {float_class.__name__}, in that order."
            )
        _REGISTRY[float_class] = cls
        _FLOAT_CLASS[cls] = float_class
        return cls

    return decorate


def quantized_class(layer: nn.Module) -> type[QuantizedLayer] | None:
    """Return the quantized form registered for the exact class of `layer`, if there is one."""
    return _REGISTRY.get(type(layer))


@register_quantized_layer(nn.Linear)
class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` with fake-quantized input `(..., in_features)` and weight `(out_features, in_features)`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class _QuantizedConv(QuantizedLayer):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # _conv_forward keeps padding_mode, which F.conv would lose.
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


@register_quantized_layer(nn.Conv1d)
class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """`nn.Conv1d` with fake-quantized input `(B, C, L)` and weight `(O, C / groups, k)`."""


@register_quantized_layer(nn.Conv2d)
class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """`nn.Conv2d` with fake-quantized input `(B, C, H, W)` and weight `(O, C / groups, kH, kW)`."""


@register_quantized_layer(nn.Conv3d)
class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """`nn.Conv3d` with fake-quantized input `(B, C, D, H, W)` and weight `(O, C / groups, kD, kH, kW)`."""
