"""Quantized forms of timm's own layer classes. Imported by `layers.py` when a model holds one of them."""

import torch
from timm.layers import Conv2dSame, Linear, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.padding import pad_same
from torch import nn

from .quantized_layer import QuantizedLayer, QuantizedLinear, register_quantized_layer
from .standardized import StandardizedConv


@register_quantized_layer(Linear)
class QuantizedTimmLinear(QuantizedLinear, Linear):
    """timm's `Linear`, which computes what `nn.Linear` does."""


@register_quantized_layer(Conv2dSame)
class QuantizedConv2dSame(QuantizedLayer, Conv2dSame):
    """timm's `Conv2dSame`: a convolution padded with zeros as TensorFlow's `SAME` does, by the size of its input.

    The input is quantized before it is padded: zero is a value of its grid, or is exact in float.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padded = pad_same(self.quantized_input(input), self.weight.shape[-2:], self.stride, self.dilation)
        return nn.functional.conv2d(
            padded, self.quantized_weight(), self.bias, self.stride, (0, 0), self.dilation, self.groups
        )


class _TimmStandardizedConv(StandardizedConv):
    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return pad_same(x, self.kernel_size, self.stride, self.dilation) if self._pads_same else x

    def plain_class(self) -> type[nn.Module]:
        return Conv2dSame if self._pads_same else nn.Conv2d

    @property
    def _pads_same(self) -> bool:
        return getattr(self, "same_pad", False)


@register_quantized_layer(StdConv2d)
class QuantizedStdConv2d(_TimmStandardizedConv, StdConv2d):
    """timm's `StdConv2d`, quantized after standardisation."""


@register_quantized_layer(StdConv2dSame)
class QuantizedStdConv2dSame(_TimmStandardizedConv, StdConv2dSame):
    """timm's `StdConv2dSame`, quantized after standardisation."""


@register_quantized_layer(ScaledStdConv2d)
class QuantizedScaledStdConv2d(_TimmStandardizedConv, ScaledStdConv2d):
    """timm's `ScaledStdConv2d`, quantized after standardisation and gain."""


@register_quantized_layer(ScaledStdConv2dSame)
class QuantizedScaledStdConv2dSame(_TimmStandardizedConv, ScaledStdConv2dSame):
    """timm's `ScaledStdConv2dSame`, quantized after standardisation and gain."""
