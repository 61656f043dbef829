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
