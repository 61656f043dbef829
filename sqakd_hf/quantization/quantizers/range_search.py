"""What first ranges are made of."""

from collections.abc import Sequence

import torch

from ..functional import MIN_RANGE, affine_grid, dequantize, quantize


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
# Finely above 1: kernels of few weights have a step among them that fits all; coarsely down to where much is clipped.
_FACTORS = (*(1 + 0.004 * i for i in range(26)), *(0.02 * i for i in range(49, 14, -1)))
# With few values and heavy tails most of the range is best left out.
_FACTORS_OF_FEW = (*_FACTORS, *(0.02 * i for i in range(14, 0, -1)))
_BINS = 1 << 12


def best_ends(
    lower: torch.Tensor,
    upper: torch.Tensor,
    rows: torch.Tensor,
    levels: int,
    zero_on_grid: Sequence[bool] = (False,),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ends, each row's range times one factor, whose `levels` values are nearest to the row.

    Nearest by mean squared error, among factors from 1.1 to 0.3 (with few values, to 0.02); rows of many elements are
    taken by their histogram.

    Args:
        lower, upper (`torch.Tensor`): `(channels,)`, ends that hold all of the data.
        rows (`torch.Tensor`): `(channels, n)`.
        levels (`int`): Number of values.
        zero_on_grid (`Sequence[bool]`, *optional*, defaults to `(False,)`): Which grids to try for each factor: the
            range as it is (`False`), shifted to hold zero exactly (`True`), or both.
    """
    lower, upper = widen(lower, upper)
    points, counts = _histogram(rows, lower, upper) if rows.shape[1] > 4 * _BINS else (rows, None)
    best_error = torch.full_like(lower, float("inf"))
    best_lower, best_upper = lower, upper
    for factor in _FACTORS_OF_FEW if levels <= 2**FEW_BITS else _FACTORS:
        for integer_zero_point in zero_on_grid:
            grid = affine_grid(lower * factor, upper * factor, levels, integer_zero_point)
            values = dequantize(quantize(points, grid, levels, channel_axis=0), grid, channel_axis=0)
            errors = (values - points).square_()
            error = errors.mean(1) if counts is None else errors.mul_(counts).sum(1) / rows.shape[1]
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_lower = torch.where(better, grid.lower, best_lower)
            best_upper = torch.where(better, grid.upper, best_upper)
    return best_lower, best_upper


# Of the elements of a row, so many may lie outside its first range.
_OUTSIDE = 1e-3


def percentile_ends(lower: torch.Tensor, upper: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ends, each row's range times one factor, that leave a thousandth of the row's elements outside.

    Args:
        lower, upper (`torch.Tensor`): `(channels,)`, ends that hold all of the data, `lower` at most 0.
        rows (`torch.Tensor`): `(channels, n)`.

    Examples:
        >>> percentile_ends(torch.tensor([0.0]), torch.tensor([2000.0]), torch.arange(2001.0)[None])
        (tensor([0.]), tensor([1998.]))
    """
    lower, upper = widen(lower, upper)
    ends = torch.where(rows < 0, lower[:, None], upper[:, None])
    needed = torch.where(ends != 0, rows / ends, 0)
    factor = needed.kthvalue(max(1, rows.shape[1] - int(_OUTSIDE * rows.shape[1])), dim=1).values
    # Almost all zeros: the rest decides.
    factor = torch.where(factor > 0, factor, 1.0)
    return lower * factor, upper * factor


def _histogram(rows: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centres of equal bins from `lower` to `upper` and how many elements of each row they hold."""
    low, width = lower[:, None], ((upper - lower) / _BINS)[:, None]
    place = ((rows - low) / width).long().clamp_(0, _BINS - 1)
    place += torch.arange(len(rows), device=rows.device)[:, None] * _BINS
    counts = torch.bincount(place.flatten(), minlength=len(rows) * _BINS).view(-1, _BINS)
    centres = low + (torch.arange(_BINS, device=rows.device) + 0.5) * width
    return centres, counts.to(rows.dtype)
