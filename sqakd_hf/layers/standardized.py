"""Convolutions that standardise their weight before they use it, quantized after it is standardised."""

import torch
from torch import nn

from .quantized_layer import QuantizedLayer


class StandardizedConv(QuantizedLayer):
    """Mixin for convolutions `(B, C, H, W)` whose weight is brought to mean 0 and variance 1, per output channel.

    Codes are those of the standardised weight. A layer that was loaded from codes has no other weight: it is plain
    from then on, in training too, and `standardized` says so in its state.
    """

    standardized: torch.Tensor
    _is_plain = False

    @classmethod
    def from_float(cls, layer, weight_quantizer, input_quantizer):
        twin = super().from_float(layer, weight_quantizer, input_quantizer)
        twin.register_buffer("standardized", torch.zeros(1, dtype=torch.uint8, device=layer.weight.device))
        return twin

    def float_weight(self) -> torch.Tensor:
        if self._is_plain:
            return self.weight
        gain = getattr(self, "gain", None)
        return nn.functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=None if gain is None else (gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
            eps=self.eps,
        ).reshape_as(self.weight)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """Pad the quantized input where the class does so by the size of its input."""
        return x

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(
            self.padded(self.quantized_input(input)),
            self.quantized_weight(),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def set_weight_codes(self, codes, shape, dtype):
        super().set_weight_codes(codes, shape, dtype)
        self.standardized.fill_(1)
        self.refresh()

    def packed_state(self) -> dict[str, torch.Tensor]:
        return {"standardized": torch.ones_like(self.standardized)}

    def refresh(self) -> None:
        self._is_plain = bool(self.standardized.item())
        if self._is_plain and getattr(self, "gain", None) is not None:
            self.gain.requires_grad_(False)  # it is in the codes

    def dequantized(self) -> nn.Module:
        plain = super().dequantized()
        for name in ("standardized", "gain"):
            plain._buffers.pop(name, None)
            plain._parameters.pop(name, None)
        plain.__dict__.pop("_is_plain", None)
        return plain
