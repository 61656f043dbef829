"""What first ranges are made of."""

import torch

from ..functional import MIN_RANGE


def standard_deviation(rows: torch.Tensor) -> torch.Tensor:
    """Return the unbiased standard deviation of each row of `(channels, n)`; zero for single elements."""
    return rows.std(1) if rows.shape[1] > 1 else torch.zeros_like(rows[:, 0])


def widen(lower: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the range, or where it is empty (a constant input) one that reaches from zero to that constant.

    Examples:
        >>> widen(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([2.0, 3.0, 0.0]))
        (tensor([0., 0., 0.]), tensor([2., 3., 1.]))
    """
    empty = ~(upper - lower > MIN_RANGE)
    constant = torch.where(upper.abs() > MIN_RANGE, upper, 1.0)
    return torch.where(empty, constant.clamp(max=0), lower), torch.where(empty, constant.clamp(min=0), upper)


# Up to here a method's own first range is used. It is made for few codes: with many, it wastes most of them (LSQ's
# step gives 8-bit weights a range of 18 deviations) or clips what they could hold (three deviations).
FEW_BITS = 4
_FRACTIONS = tuple(0.02 * i for i in range(50, 14, -1))
_SAMPLES = 1 << 14


def best_ends(lower: torch.Tensor, upper: torch.Tensor, rows: torch.Tensor, levels: int) -> tuple[torch.Tensor, ...]:
    """Return the ends, each row's range shrunk by one factor, whose `levels` values are nearest to the row.

    Nearest by mean squared error, among factors from 1 down to 0.3; rows of more than 2**14 elements are sampled at
    even distances.

    Args:
        lower, upper (`torch.Tensor`): `(channels,)`, ends that hold all of the data.
        rows (`torch.Tensor`): `(channels, n)`.
        levels (`int`): Number of values.
    """
    lower, upper = widen(lower, upper)
    rows = rows[:, :: -(-rows.shape[1] // _SAMPLES)]
    best_error = torch.full_like(lower, float("inf"))
    best = torch.ones_like(lower)
    for fraction in _FRACTIONS:
        low, high = (lower * fraction)[:, None], (upper * fraction)[:, None]
        step = (high - low) / (levels - 1)
        values = ((rows.clamp(low, high) - low) / step).round() * step + low
        error = (values - rows).square().mean(1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, fraction, best)
    return lower * best, upper * best
