"""StatsQ: a weight's range is twice its mean magnitude, at every step; made for vision transformers.

[Oscillation-free Quantization for Low-bit Vision Transformers](https://huggingface.co/papers/2302.02210). Its
activations are LSQ's, as in the paper, and registered here.
"""

import torch

from ..quantization.quantizers.base import register_quantizer
from ..quantization.quantizers.lsq import LSQ
from ..quantization.quantizers.range_search import widen
from ..quantization.quantizers.weight_statistic import FollowsWeight


register_quantizer("statsq", role="activation")(LSQ)


@register_quantizer("statsq", role="weight")
class StatsQWeight(FollowsWeight):
    """Values are the middles of `2 ** bits` equal cells between `-2 * mean(|w|)` and `2 * mean(|w|)`; zero is none.

    Nothing is learned but the weight, whose every element has a gradient.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("magnitude", torch.full((self.num_channels,), float("nan")))

    @property
    def searches_range(self) -> bool:
        return False  # the statistic is the method

    @property
    def _ends(self) -> float:
        """The magnitude of the last value in units of the mean magnitude of the weight."""
        return 2 * (1 - 1 / self.levels)

    def magnitude_of(self, x: torch.Tensor) -> torch.Tensor:
        magnitude = self._ends * self.rows(x).abs().mean(1)
        return widen(torch.zeros_like(magnitude), magnitude)[1]

    def init_range(self, x: torch.Tensor) -> None:
        self.set_range(magnitude=self.magnitude_of(x))

    def clip_range(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return (-self.magnitude if self.signed else torch.zeros_like(self.magnitude)), self.magnitude

    def latent(self, values: torch.Tensor) -> torch.Tensor:
        """Return weights in the cells of `values`, moved so that their mean magnitude is that of the range.

        The outermost values, whose cells have no end, move where there are any; else all, by less than half a cell.
        """
        rows = self.rows(values)
        step, size = self.qparams()[0][:, None], rows.abs()
        missing = (self.magnitude / self._ends - size.mean(1))[:, None] * rows.shape[1]
        outermost = size > self.magnitude[:, None] - step / 2
        moves = torch.where((missing > 0) & outermost.any(1, keepdim=True), outermost, size > step / 4)
        by = missing / moves.sum(1, keepdim=True).clamp(min=1)
        # Not to the very end of a cell: there, rounding to a narrow dtype could leave it.
        by = torch.where(outermost & (by > 0), by, by.clamp(-0.45 * step, 0.45 * step))
        moved = torch.where(moves, rows + rows.sign() * by, rows).to(values.dtype)
        return moved.view_as(values) if self.channel_axis is None else self._unrows(moved, values)

    def _unrows(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """View `rows` `(channels, n)` in the shape that `like` had before [`rows`]."""
        return rows.view_as(like.movedim(self.channel_axis, 0)).movedim(0, self.channel_axis)
