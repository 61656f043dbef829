"""PACT: the clipping level of activations is learned, by the elements it clips.

[PACT: Parameterized Clipping Activation](https://huggingface.co/papers/1805.06085). Its weights are DoReFa's, as in
the paper, and registered there.
"""

import torch

from .base import FakeQuantizer, register_quantizer
from .dorefa import first_magnitude
from .range_search import widen


@register_quantizer("pact", role="activation")
class PACT(FakeQuantizer):
    """Learned `upper`: values run from 0 to `upper`, or from `-upper` to `upper` for signed inputs.

    The paper starts every layer at a constant; here it starts at the largest magnitude seen (1-bit signed: the mean
    magnitude), which needs no tuning. The paper's L2 penalty on `upper` is not part of the quantizer.
    """

    clip_only = True
    searched_bits = (1,)  # {0, largest magnitude} would round almost everything to 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.upper = self.new_range_parameter()

    def init_range(self, x: torch.Tensor) -> None:
        upper = first_magnitude(self, x)
        self.set_range(upper=widen(torch.zeros_like(upper), upper)[1])

    def clip_range(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        # At 1 bit signed the grid is {-upper, upper}: both clip ends mirror the one parameter.
        return (-self.upper if self.signed else torch.zeros_like(self.upper)), self.upper
