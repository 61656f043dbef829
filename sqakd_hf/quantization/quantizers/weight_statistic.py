"""Weights whose range is a statistic of the weight itself, and is learned through it alone."""

import torch

from ..functional import Grid
from .base import FakeQuantizer


class FollowsWeight(FakeQuantizer):
    """`magnitude`, the upper end of the range, follows the weight in each forward of a training.

    No weight is clipped as far as gradients go: all of them pass. In eval mode the last magnitude stays, so that
    stored values stay what they are.
    """

    @property
    def follows(self) -> bool:
        """Whether that is so; for methods where it depends on the width."""
        return True

    def magnitude_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the magnitude `(channels,)`, positive, that weight `x` asks for."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.follows and self.training and self.calibrated:
            with torch.no_grad():
                self.magnitude.copy_(self.magnitude_of(x))
        return super().forward(x)

    def grid(self) -> Grid:
        grid = super().grid()
        if not self.follows:
            return grid
        return grid._replace(
            lower=torch.full_like(grid.lower, -torch.inf), upper=torch.full_like(grid.upper, torch.inf)
        )
