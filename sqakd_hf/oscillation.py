"""Weights that flip between two codes from step to step, and a term that holds them near the middle of one."""

import math
from collections.abc import Iterable

import torch

from .layers import QuantizedLayer


def dampening_loss(layers: Iterable[QuantizedLayer]) -> torch.Tensor:
    """Return the summed squared distance of the weights from their quantized values, up to the last value.

    Its gradient pulls a weight to the value it is rounded to, away from the threshold where it would flip:
    [Overcoming Oscillations in Quantization-Aware Training](https://arxiv.org/abs/2203.11086). It does not reach the
    ranges.
    """
    total = 0.0
    for layer in layers:
        quantizer = layer.weight_quantizer
        weight = quantizer.transform(layer.float_weight())
        with torch.no_grad():
            codes = quantizer.quantize(layer.float_weight())
            values = quantizer.dequantize(codes)
            # Beyond the last value there is no threshold to stay away from.
            first, last = (quantizer.dequantize(torch.full_like(codes, code)) for code in (0, quantizer.levels - 1))
            between = (weight > first) & (weight < last)
        total = total + ((weight - values) * between).square().sum()
    return total


def ramp(step: int, steps: int) -> float:
    """Return the share of the term's weight at a step: half a cosine from 0 to 1, as weights settle late.

    Examples:
        >>> ramp(0, 10), ramp(5, 10), ramp(10, 10)
        (0.0, 0.5, 1.0)
    """
    return round((1 - math.cos(math.pi * min(step / max(steps, 1), 1))) / 2, 12)
