"""BatchNorm's running statistics, corrected by what quantization changed."""

import torch
from torch import nn

from . import processes


# Quantization changes a variance by less, unless a channel has died.
_LIMIT = 4.0


class ChannelStatistics:
    """Mean and variance of each channel over all that was added, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None

    def add(self, x: torch.Tensor, channel_axis: int = 1) -> None:
        """Add a batch `x`, whose channels lie along `channel_axis`."""
        # No copy where channels lie last in memory. torch.var_mean is several times slower on a CPU.
        rows = x.detach().float().movedim(channel_axis, -1).reshape(-1, x.shape[channel_axis])
        count = len(rows)
        mean = rows.sum(0) / count
        variance = (rows - mean).square_().sum(0) / count
        variance, mean = variance.cpu().double(), mean.cpu().double()
        if self.mean is None:
            self.count, self.mean, self._squares = count, mean, variance * count
            return
        total = self.count + count
        change = mean - self.mean
        self._squares = self._squares + variance * count + change.square() * (self.count * count / total)
        self.mean = self.mean + change * (count / total)
        self.count = total

    def of_all_processes(self) -> "ChannelStatistics":
        """Return the statistics over what all processes added; on one process these."""
        if processes.count() == 1:
            return self
        own = torch.cat([torch.full_like(self.mean[:1], self.count), self.mean * self.count, self.squares()])
        count, sums, squares = processes.sum_up(own).split([1, len(self.mean), len(self.mean)])
        total = ChannelStatistics()
        total.count, total.mean = int(count), sums / count
        total._squares = squares - total.mean.square() * count
        return total

    def squares(self) -> torch.Tensor:
        """Return the sum of squares of each channel."""
        return self._squares + self.mean.square() * self.count

    @property
    def variance(self) -> torch.Tensor:
        return self._squares / self.count


def tracks_statistics(module: nn.Module) -> bool:
    """Tell whether `module` is a BatchNorm layer with running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


@torch.no_grad()
def match_statistics(
    norm: nn.Module, teacher_norm: nn.Module, expected: ChannelStatistics, found: ChannelStatistics
) -> None:
    """Set the running statistics of `norm` so that it normalises its inputs as the teacher's does its own, in place.

    Re-estimated on a thousand photographs, they would become those of another domain than the network was trained on;
    kept, they do not fit what quantized layers put out. So the teacher's are changed by what differs between the two
    on the same images: with `ratio = variance / teacher's variance`, within [1/4, 4],

        running_var  = teacher's running_var * ratio
        running_mean = mean - (teacher's mean - teacher's running_mean) * sqrt(ratio)

    The same inputs leave them as they are, to the last bit.

    Args:
        norm, teacher_norm (`nn.Module`): The same BatchNorm layer in student and teacher.
        expected, found (`ChannelStatistics`): Of what goes into the teacher's, and into the student's.
    """
    device = norm.running_var.device
    tiny = torch.finfo(torch.float32).tiny
    ratio = (found.variance / expected.variance.clamp(min=tiny)).clamp(1 / _LIMIT, _LIMIT)
    # A channel that is constant in the teacher says nothing about scales.
    ratio = torch.where(expected.variance > tiny, ratio, 1.0)
    scale = ratio.sqrt()
    mean, variance = (x.detach().cpu().double() for x in (teacher_norm.running_mean, teacher_norm.running_var))
    norm.running_var.copy_((variance * ratio).to(device))
    norm.running_mean.copy_((found.mean - expected.mean * scale + mean * scale).to(device))
