"""LSQ and LSQ+: the step between two values is learned.

[Learned Step Size Quantization](https://huggingface.co/papers/1902.08153) and
[LSQ+](https://arxiv.org/abs/2004.09576).
"""

import torch

from ..functional import MIN_RANGE, Grid
from .base import FakeQuantizer, register_quantizer
from .range_search import standard_deviation, widen


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Return `x` itself, bit for bit, whose gradient is multiplied by `factor`.

    Examples:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> scale_gradient(x, 0.5).backward()
        >>> x.grad
        tensor([0.5000])
    """
    return x.detach().lerp(x, factor)


def code_bounds(bits: int, signed: bool) -> tuple[float, float]:
    """Return LSQ's `(Q_n, Q_p)`, the first and the last code in units of the step.

    1 bit signed is its own case: the values -s and +s lie two steps apart.

    Examples:
        >>> code_bounds(2, signed=True), code_bounds(2, signed=False), code_bounds(1, signed=True)
        ((-2, 1), (0, 3), (-1, 1))
    """
    if not signed:
        return 0, 2**bits - 1
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@register_quantizer("lsq")
class LSQ(FakeQuantizer):
    """Learned `scale`: values are the multiples `Q_n * scale ... Q_p * scale`.

    The gradient of `scale` is damped by `1 / sqrt(n * Q_p)`, with `n` the elements (of one sample) that share it.
    Weights and signed activations use two's complement bounds, unsigned activations start at zero; zero always lies
    on the grid but for 1-bit signed codes, which are `{-scale, +scale}`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = self.new_range_parameter()

    @property
    def zero_on_grid(self) -> tuple[bool, ...]:
        return (False,)  # it lies there by itself

    def init_range(self, x: torch.Tensor) -> None:
        rows = self.rows(x)
        q_n, q_p = code_bounds(self.bits, self.signed)
        if self.searches_range:
            reach = rows.abs().amax(1)
            _, upper = self.searched_ends(reach * (q_n / q_p), reach, rows)
            scale = upper / q_p
        else:
            magnitude = rows.abs().mean(1)
            scale = magnitude if self.binary else 2 * magnitude / q_p**0.5
        # All zero: any range is exact; one unit lets the range learn if zeros end.
        self.set_range(scale=torch.where(scale * q_p > MIN_RANGE, scale, 1 / q_p))

    def clip_range(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        q_n, q_p = code_bounds(self.bits, self.signed)
        factor = 1.0 if x is None else (self.elements_per_sample(x) * q_p) ** -0.5
        scale = scale_gradient(self.scale, factor)
        return scale * q_n, scale * q_p

    @torch.no_grad()
    def grid(self) -> Grid:
        q_n, q_p = code_bounds(self.bits, self.signed)
        step = self.scale.detach().clamp(min=MIN_RANGE / (q_p - q_n))
        # Written with the step itself, so that whole codes keep an exactly whole zero point.
        scale = step * ((q_p - q_n) / (self.levels - 1))
        return Grid(step * q_n, step * q_p, scale, torch.full_like(step, 0.5 if self.binary else -q_n))


@register_quantizer("lsq+", role="activation")
class LSQPlus(FakeQuantizer):
    """Learned `scale` and `offset`: values run from `offset` to `offset + (levels - 1) * scale`, for any activation.

    Weights are symmetric and use [`LSQPlusWeight`].
    """

    searched_bits = (1, *FakeQuantizer.searched_bits)  # as for PACT

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = self.new_range_parameter()
        self.offset = self.new_range_parameter()

    def init_range(self, x: torch.Tensor) -> None:
        rows = self.rows(x)
        low, high = rows.amin(1), rows.amax(1)
        if self.binary:
            high = rows.abs().mean(1)
            low = -high
        if self.searches_range:
            low, high = self.searched_ends(low, high, rows)
        low, high = widen(low, high)
        self.set_range(scale=(high - low) / (self.levels - 1), offset=low)

    def clip_range(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        qmax = self.levels - 1
        factor = 1.0 if x is None else (self.elements_per_sample(x) * qmax) ** -0.5
        lower = scale_gradient(self.offset, factor)
        return lower, lower + scale_gradient(self.scale, factor) * qmax


@register_quantizer("lsq+", role="weight")
class LSQPlusWeight(LSQ):
    """LSQ with LSQ+'s initial step, `max(|mean - 3 std|, |mean + 3 std|) / 2 ** (bits - 1)`."""

    def init_range(self, x: torch.Tensor) -> None:
        if self.searches_range:
            return super().init_range(x)
        rows = self.rows(x)
        mean, std = rows.mean(1), standard_deviation(rows)
        reach = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs())
        scale = rows.abs().mean(1) if self.binary else reach / 2 ** (self.bits - 1)
        self.set_range(scale=torch.where(scale > MIN_RANGE, scale, 1.0))
