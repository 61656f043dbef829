"""DoReFa: nothing about the range is learned.

[DoReFa-Net](https://huggingface.co/papers/1606.06160). The published form normalises weights to [-1, 1] and
activations to [0, 1]; by default both keep the magnitude they had at calibration, so that a trained network still
computes what it did. `unit_range=True` is the published form.
"""

import torch

from ...errors import InputError
from ..functional import MIN_RANGE, along
from .base import FakeQuantizer, register_quantizer
from .range_search import widen
from .weight_statistic import FollowsWeight


def first_magnitude(quantizer: FakeQuantizer, x: torch.Tensor) -> torch.Tensor:
    """Return the end `(channels,)` of a range from zero, or mirrored, to begin with: the largest magnitude by default.

    For two-valued signed codes it is the mean magnitude.
    """
    rows = quantizer.rows(x)
    magnitude = rows.abs().mean(1) if quantizer.binary else rows.abs().amax(1)
    if quantizer.searches_range:
        lower = -magnitude if quantizer.signed else torch.zeros_like(magnitude)
        lower, upper = quantizer.searched_ends(lower, magnitude, rows)
        magnitude = (upper - lower) / (2 if quantizer.signed else 1)  # a zero point on the grid shifts the ends
    return magnitude


class _FixedRange(FakeQuantizer):
    """A range of fixed `magnitude`, mirrored for signed inputs."""

    searched_bits = (1,)  # {0, largest magnitude} would round almost everything to 0

    def __init__(self, *args, unit_range: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        if unit_range and self.first_range in ("error", "percentile"):
            raise InputError(f"unit_range=True leaves nothing for first_range={self.first_range!r} to choose.")
        self.unit_range = unit_range
        self.register_buffer("magnitude", torch.full((self.num_channels,), float("nan")))

    def init_range(self, x: torch.Tensor) -> None:
        magnitude = first_magnitude(self, x)
        if self.unit_range and not (self.binary and self.role == "weight"):
            magnitude = torch.ones_like(magnitude)
        self.set_range(magnitude=widen(torch.zeros_like(magnitude), magnitude)[1])

    def clip_range(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return (-self.magnitude if self.signed else torch.zeros_like(self.magnitude)), self.magnitude


@register_quantizer("dorefa", role="activation")
class DoReFa(_FixedRange):
    """Clip to the range of fixed `magnitude` and round."""


@register_quantizer("dorefa", role="weight")
@register_quantizer("pact", role="weight")
class DoReFaWeight(FollowsWeight, _FixedRange):
    """Squash by tanh, stretch to `[-magnitude, magnitude]`, round; at 1 bit `sign(w) * mean(|w|)`.

    The stretch is detached: gradients see `tanh`, not its maximum. 1-bit values pass every gradient, and their
    magnitude follows the weight while training.
    """

    @property
    def searches_range(self) -> bool:
        return False  # the stretch fills whatever range there is

    @property
    def follows(self) -> bool:
        return self.binary

    def magnitude_of(self, x: torch.Tensor) -> torch.Tensor:
        magnitude = first_magnitude(self, x)
        return widen(torch.zeros_like(magnitude), magnitude)[1]

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        if self.binary:
            return x
        squashed = torch.tanh(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)
        largest = self.rows(squashed).abs().amax(1).to(squashed.dtype)
        # A channel without weights is not stretched: its gradient would have no end.
        largest = along(torch.where(largest > MIN_RANGE, largest, 1), x, self.channel_axis)
        # Divide first: the largest weight lands on the end of the range exactly.
        return squashed / largest * along(self.magnitude, x, self.channel_axis)

    def latent(self, values: torch.Tensor) -> torch.Tensor:
        if self.binary:
            return values
        magnitude = along(self.magnitude, values, self.channel_axis)
        # The largest weight of a trained layer, in the values' dtype so that it is rounded to nothing else; where
        # tanh saturates, a smaller one gives the same values.
        largest = magnitude.clamp(max=2).to(values.dtype).float()
        normalised = (values.float() / magnitude).clamp(-1, 1)
        latent = torch.atanh(normalised * torch.tanh(largest)).to(values.dtype)
        # The stretch takes every channel to the end of its range, but for one that is all zeros.
        reaches = self.rows(normalised).abs().amax(1) > 1 - 0.5 / (self.levels - 1)
        return latent * along(reaches, values, self.channel_axis)
