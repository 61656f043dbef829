"""EWGS: both ends of the range are learned, and gradients are scaled element by element.

[Network Quantization with Element-wise Gradient Scaling](https://huggingface.co/papers/2104.00903). Here in the
de-normalised form, whose values span `lower` to `upper`: it needs no output scale and takes signed activations.
"""

import math

import torch

from ..functional import MIN_RANGE
from .base import FakeQuantizer, register_quantizer
from .range_search import standard_deviation, widen


# The mean-free half-normal of a rectified activation has this fraction of the underlying deviation.
_HALF_NORMAL = math.sqrt(1 - 2 / math.pi)


@register_quantizer("ewgs")
class EWGS(FakeQuantizer):
    """Learned `lower` and `upper`, and `delta > 0`: elements far from their code move further.

    `delta=1e-3` is the published fixed setting; `delta=0` is the straight-through estimator. Initial ranges are three
    standard deviations around zero (weights), from the minimum to three deviations of the half-normal's origin
    (unsigned activations) or three deviations around the mean, within the data (signed activations).
    """

    def __init__(self, *args, delta: float = 1e-3, **kwargs):
        super().__init__(*args, delta=delta, **kwargs)
        self.lower = self.new_range_parameter()
        self.upper = self.new_range_parameter()

    def init_range(self, x: torch.Tensor) -> None:
        rows = self.rows(x)
        deviations = 3 * standard_deviation(rows)
        reach = torch.where(deviations > MIN_RANGE, deviations, rows.abs().amax(1))  # one value, or all the same
        if self.binary:
            upper = rows.abs().mean(1)
            upper = torch.where(upper > 0, upper, 1.0)
            lower = -upper
        elif self.searches_range:
            lower, upper = rows.amin(1), rows.amax(1)
            if self.role == "weight":
                upper = torch.maximum(-lower, upper)
                lower = -upper
            lower, upper = self.searched_ends(lower, upper, rows)
        elif self.role == "weight":
            lower, upper = -reach, reach
        elif self.signed:
            mean = rows.mean(1)
            lower, upper = torch.maximum(mean - reach, rows.amin(1)), torch.minimum(mean + reach, rows.amax(1))
        else:
            lower, upper = rows.amin(1), deviations / _HALF_NORMAL
            # Where nothing lies near zero, it is no half-normal.
            upper = torch.where(lower > upper / 2, rows.amax(1), upper)
        lower, upper = widen(lower, upper)
        self.set_range(lower=lower, upper=upper)

    def clip_range(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lower, self.upper
