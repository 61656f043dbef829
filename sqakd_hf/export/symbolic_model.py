"""A student as the exporter sees it: each quantizer one symbol of the graph, each weight its codes."""

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from ..conversion.student import quantized_layers
from ..layers.quantized_layer import QuantizedLayer
from ..quantization.quantizers import FakeQuantizer
from .tracing import Outputs


DOMAIN = "sqakd"
QUANTIZE, DEQUANTIZE = "FakeQuantize", "Dequantize"


class Symbolic(Outputs):
    """A copy of `student` that can be exported, from images `(B, C, H, W)` to its class logits (and boxes).

    Its quantizers are nodes `sqakd::FakeQuantize(x, scale, zero_point)`, its weights
    `sqakd::Dequantize(codes, scale, zero_point)`; both know the `name` of their module in the student, the number of
    `levels`, the `axis` of the ranges (-1: one range) and whether they are `binary`. Ranges and codes are buffers,
    hence initialisers of the graph. The copy computes nothing: it is there to be traced.

    Args:
        student (`nn.Module`): Calibrated.
        output_field (`str`, *optional*): See [`~sqakd_hf.outputs.forward.predict`].
    """

    def __init__(self, student: nn.Module, output_field: str | None = None) -> None:
        super().__init__(copy.deepcopy(student).to("cpu", torch.float32).eval(), output_field)
        self._calls: Counter[str] = Counter()
        for name, quantizer in list(self.model.named_modules()):
            if isinstance(quantizer, FakeQuantizer) and quantizer.role == "activation":
                quantizer.forward = _quantizing(quantizer, name, self._calls)
        for name, layer in quantized_layers(self.model).items():
            layer.quantized_weight = _dequantizing(layer, name)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._calls.clear()
        return super().forward(pixel_values)


def _quantizing(quantizer: FakeQuantizer, name: str, calls: "Counter[str]") -> Callable[[torch.Tensor], torch.Tensor]:
    _hold_range(quantizer, quantizer)
    attributes = _attributes(quantizer, name)

    def forward(x: torch.Tensor) -> torch.Tensor:
        inputs = (quantizer.transform(x), quantizer.export_scale, quantizer.export_zero_point)
        own = {**attributes, "call": calls[name]}  # of a layer that is used several times
        calls[name] += 1
        return torch.onnx.ops.symbolic(f"{DOMAIN}::{QUANTIZE}", inputs, own, dtype=x.dtype, shape=x.shape)

    return forward


def _dequantizing(layer: QuantizedLayer, name: str) -> Callable[[], torch.Tensor]:
    quantizer = layer.weight_quantizer
    _hold_range(layer, quantizer)
    weight = (layer.stored_weight if layer.weight_is_on_grid else layer.float_weight()).detach()
    codes = quantizer.encode(weight) if layer.weight_is_on_grid else quantizer.quantize(weight)
    layer.register_buffer("export_codes", codes)
    attributes = {**_attributes(quantizer, name), "channel_axis": layer.channel_axis}

    def quantized_weight() -> torch.Tensor:
        inputs = (layer.export_codes, layer.export_scale, layer.export_zero_point)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{DEQUANTIZE}", inputs, attributes, dtype=torch.float32, shape=codes.shape
        )

    return quantized_weight


def _hold_range(module: nn.Module, quantizer: FakeQuantizer) -> None:
    for name, tensor in zip(("export_scale", "export_zero_point"), quantizer.qparams(), strict=True):
        module.register_buffer(name, tensor.detach().clone())


def _attributes(quantizer: FakeQuantizer, name: str) -> dict[str, str | int]:
    return {
        "name": name,
        "levels": quantizer.levels,
        "axis": -1 if quantizer.channel_axis is None else quantizer.channel_axis,
        "binary": int(quantizer.binary),
    }
