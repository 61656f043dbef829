"""The quantized form of the one layer class of transformers' BiT. Imported by `layers.py` when a model holds it."""

import torch
from torch import nn
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from .quantized_layer import register_quantized_layer
from .standardized import StandardizedConv


@register_quantized_layer(WeightStandardizedConv2d)
class QuantizedWeightStandardizedConv2d(StandardizedConv, WeightStandardizedConv2d):
    """BiT's weight-standardised convolution. [`dequantize`] makes it a convolution behind its padding."""

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.pad is None else self.pad(x)

    def dequantized(self) -> nn.Module:
        conv = super().dequantized()
        pad = conv._modules.pop("pad", None)
        return conv if pad is None else nn.Sequential(pad, conv)

    def plain_class(self) -> type[nn.Module]:
        return nn.Conv2d
