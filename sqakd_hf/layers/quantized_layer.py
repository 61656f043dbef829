"""Convolutions and linear layers whose input and weight pass through fake quantizers."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import InputError
from ..quantization.quantizers import FakeQuantizer


# What layers call the parameter that is quantized.
WEIGHT_NAMES = ("weight", "in_proj_weight")


def weight_of(module: nn.Module) -> torch.Tensor | None:
    """Return the weight matrix or kernel that `module` itself holds, in float or quantized; `None` without one.

    A vector that is kept in more dimensions, `(1, 1, 1, C)` of a normalisation say, is none.
    """
    for name in WEIGHT_NAMES:
        weight = getattr(module, name, None)
        if not isinstance(weight, torch.Tensor) or is_lazy(weight):
            continue
        if weight.dim() >= 2 and weight.is_floating_point():
            is_vector = weight.shape[0] == 1 and weight.numel() == weight.shape[-1]
            is_layer = not is_vector or isinstance(module, QuantizedLayer) or quantized_class(module) is not None
            return weight if is_layer else None
    return None


class QuantizedLayer(nn.Module):
    """Mixin, placed before the float class, that adds `weight_quantizer` and `input_quantizer`.

    A quantized layer is the float layer with two more children: the same parameters under the same state-dict keys,
    the same hooks and attributes. `channel_axis` is the weight's axis of output channels (of one group, where
    transposed convolutions have groups).

    A layer that was loaded from codes has `weight_is_on_grid` set: its `weight` holds the quantized values and is
    used as it is. `train()` turns them into a latent weight again, which quantizes to the same values.

    Subclasses may override [`float_weight`] (what is quantized, where it is not the parameter itself),
    `weight_name` (the parameter's name) and [`why_not`].
    """

    weight_name = "weight"
    channel_axis = 0
    takes_activations = True  # False: the input holds indices, nothing to quantize
    weight_is_on_grid = False
    shared_weight: torch.Tensor | None = None  # set while batches share one quantization, see shared_weights.py
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | None

    @classmethod
    def from_float(
        cls, layer: nn.Module, weight_quantizer: FakeQuantizer, input_quantizer: FakeQuantizer | None
    ) -> "QuantizedLayer":
        """Return a quantized twin of `layer` that shares its parameters; nothing is copied or re-initialised.

        Args:
            layer (`nn.Module`): The float layer; it stays usable. Hooks are shared: who removes one from the layer
                removes it from the twin.
            weight_quantizer (`FakeQuantizer`): Applied to `layer.weight` in each forward.
            input_quantizer (`FakeQuantizer`, *optional*): Applied to the layer's input; `None` leaves it in float.
        """
        twin = cls.__new__(cls)
        # Building the layer through __init__ instead would have to know the arguments of every subclass.
        twin.__dict__ = _state_of(layer)
        twin.weight_quantizer = weight_quantizer
        twin.input_quantizer = input_quantizer
        weight_quantizer.train(layer.training)
        if input_quantizer is not None:
            input_quantizer.train(layer.training)
        return twin

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        """Return the reason why this form can't stand in for `layer`, or `None` if it can."""
        return None

    @torch.no_grad()
    def dequantized(self) -> nn.Module:
        """Return the plain float layer whose weight holds the quantized values; the other parameters are shared."""
        plain = object.__new__(self.plain_class())
        plain.__dict__ = _state_of(self)
        for name in ("weight_quantizer", "input_quantizer"):
            plain._modules.pop(name, None)
            plain.__dict__.pop(name, None)  # where activations stay in float
        plain.__dict__.pop("weight_is_on_grid", None)
        trains = self.stored_weight.requires_grad
        plain._parameters[self.weight_name] = nn.Parameter(self.quantized_weight().detach(), requires_grad=trains)
        return plain

    def plain_class(self) -> type[nn.Module]:
        """Return the float class that computes with a given weight what this layer does with its own."""
        return _FLOAT_CLASS[type(self)]

    @staticmethod
    def count_macs(weight: torch.Tensor, inputs: list[torch.Tensor], output: torch.Tensor) -> int:
        """Return the multiply-accumulates of one forward: the weight is used once per position of the output."""
        return output.numel() // weight.shape[0] * weight.numel()

    @property
    def stored_weight(self) -> nn.Parameter:
        """The parameter that holds the weight, whatever its name."""
        return getattr(self, self.weight_name)

    def float_weight(self) -> torch.Tensor:
        """Return what is quantized: the weight, or what the float layer makes of it before it is used."""
        return self.stored_weight

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantize the layer's input, or pass it through where activations stay in float."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_weight(self) -> torch.Tensor:
        """Fake-quantize the layer's weight."""
        if self.shared_weight is not None:
            return self.shared_weight
        return self.stored_weight if self.weight_is_on_grid else self.weight_quantizer(self.float_weight())

    # --- codes ---

    def weight_codes(self) -> torch.Tensor:
        """Return the weight's codes, `uint8` `(channels, n)`: one row for each output channel."""
        encode = self.weight_quantizer.encode if self.weight_is_on_grid else self.weight_quantizer.quantize
        weight = self.stored_weight if self.weight_is_on_grid else self.float_weight()
        return encode(weight.detach()).movedim(self.channel_axis, 0).flatten(1)

    def values_of(self, codes: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return the float32 values, of this shape, of `codes` as [`weight_codes`] returns them."""
        rows_first = [shape[self.channel_axis], *(n for i, n in enumerate(shape) if i != self.channel_axis)]
        return self.weight_quantizer.dequantize(codes.view(rows_first).movedim(0, self.channel_axis))

    def set_weight_codes(self, codes: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        """Make the weight, of this shape and dtype, the values of `codes` as [`weight_codes`] returns them."""
        values = self.values_of(codes, shape).to(dtype)
        # The weight keeps its place in front of the bias: optimizers number parameters in this order.
        others = {name: value for name, value in self._parameters.items() if name != self.weight_name}
        self._buffers.pop(self.weight_name, None)
        self._parameters = {self.weight_name: nn.Parameter(values.contiguous()), **others}
        self.weight_is_on_grid = True

    def packed_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the layer's state, by name, that are others where the weight is stored as codes."""
        return {}

    def refresh(self) -> None:
        """Bring what derives from buffers up to date after they were loaded."""

    @torch.no_grad()
    def restore_latent(self) -> None:
        """Make a weight that holds quantized values one that trains: it quantizes to the values it had."""
        if self.weight_is_on_grid:
            self.stored_weight.copy_(self.weight_quantizer.latent(self.stored_weight))
            self.weight_is_on_grid = False

    def train(self, mode: bool = True) -> "QuantizedLayer":
        if mode:
            self.restore_latent()
        return super().train(mode)

    # --- state: always the latent weight ---

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_is_on_grid:
            values = destination[prefix + self.weight_name].detach()
            latent = self.weight_quantizer.latent(values)
            if latent is not values:
                destination[prefix + self.weight_name] = latent

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + self.weight_name in state_dict:
            self.weight_is_on_grid = False
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh()


def _state_of(layer: nn.Module) -> dict[str, Any]:
    """Return the attributes for a layer that takes the place of `layer`: all shared but its tables of tensors.

    Tables of hooks are shared as well, since the handle that removes a hook knows the table that it was put into.
    """
    own = ("_parameters", "_buffers", "_modules")
    return {key: value.copy() if key in own else value for key, value in vars(layer).items()}


_REGISTRY: dict[type[nn.Module], type[QuantizedLayer]] = {}
_FLOAT_CLASS: dict[type[QuantizedLayer], type[nn.Module]] = {}
# Which module of ours registers the layers of which module: imported when the first of them is met, so that a package
# nobody uses is never loaded.
_REGISTERED_BY = {
    "torch.nn.modules.activation": "attention",
    "timm": "timm_layers",
    "transformers.models.bit.modeling_bit": "transformers_layers",
}


def register_quantized_layer(float_class: type[nn.Module]) -> Callable[[type[QuantizedLayer]], type[QuantizedLayer]]:
    """Register the quantized form of `float_class`, and of subclasses that only build it in another way.

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
    """Return the quantized form of `layer`, if there is one.

    That is the one registered for its class, or for the class it inherits from where it adds nothing that could
    compute something else or that others could call.
    """
    cls = type(layer)
    for module, registers in _REGISTERED_BY.items():
        if f"{cls.__module__}.".startswith(f"{module}."):
            importlib.import_module(f"{__package__}.{registers}")
    for base in cls.__mro__:
        if base in _REGISTRY:
            return _REGISTRY[base]
        if not all(_only_builds(name) for name in vars(base)):
            return None
    return None


def _only_builds(member: str) -> bool:
    """Tell whether a class that defines this is still the layer it inherits from."""
    if member.startswith("__"):
        return member not in ("__call__", "__getattr__", "__getattribute__", "__setattr__")
    return member in ("extra_repr", "reset_parameters")


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


@register_quantized_layer(nn.ConvTranspose2d)
class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with fake-quantized input `(B, C, H, W)` and weight `(C, O / groups, kH, kW)`."""

    channel_axis = 1

    @staticmethod
    def count_macs(weight: torch.Tensor, inputs: list[torch.Tensor], output: torch.Tensor) -> int:
        return inputs[0].numel() // weight.shape[0] * weight.numel()

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return nn.functional.conv_transpose2d(
            self.quantized_input(input),
            self.quantized_weight(),
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


@register_quantized_layer(nn.Embedding)
class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """`nn.Embedding` with a fake-quantized table `(num_embeddings, embedding_dim)`: one range for each row."""

    takes_activations = False

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        return None if layer.max_norm is None else "max_norm changes its table in each forward"

    @staticmethod
    def count_macs(weight: torch.Tensor, inputs: list[torch.Tensor], output: torch.Tensor) -> int:
        return 0  # rows are looked up

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(
            input,
            self.quantized_weight(),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=False,  # the quantizer needs a dense gradient
        )
