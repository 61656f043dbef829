"""Biases of layers without BatchNorm behind them, corrected by what quantization changed on average."""

import torch
from torch import nn

from .batch_norm import ChannelStatistics


@torch.no_grad()
def correct_bias(layer: nn.Module, expected: ChannelStatistics, found: ChannelStatistics) -> None:
    """Add to the bias of `layer` what its outputs lack in the mean of each channel, in place.

    The idea is that of bias correction ([Data-Free Quantization](https://arxiv.org/abs/1906.04721), section 4.2), with
    means that were measured.

    Args:
        layer (`nn.Module`): The student's layer, with a bias.
        expected, found (`ChannelStatistics`): Of what the teacher's layer puts out, and of what the student's does.
    """
    change = (expected.mean - found.mean).to(layer.bias.device, layer.bias.dtype)
    layer.bias.add_(change)
