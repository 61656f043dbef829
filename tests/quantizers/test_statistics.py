import pytest
import torch

from sqakd_hf import create_quantizer
from sqakd_hf.quantizers.statistics import best_ends


def error(quantizer, x):
    return (quantizer(x) - x).square().mean().item()


DATA = {
    "normal": lambda g: torch.randn(4, 2000, generator=g),
    "heavy tails": lambda g: torch.randn(4, 2000, generator=g) ** 3,
    "many": lambda g: torch.randn(4, 50000, generator=g) ** 3,
    "uniform": lambda g: torch.rand(4, 2000, generator=g) - 0.5,
    "few": lambda g: torch.randn(4, 9, generator=g),
    "small": lambda g: 1e-4 * torch.randn(4, 2000, generator=g),
}
each_data = pytest.mark.parametrize("make", DATA.values(), ids=DATA)


@each_data
@pytest.mark.parametrize("levels", [32, 256])
def test_no_other_factor_is_better(make, levels):
    rows = make(torch.Generator().manual_seed(0))
    reach = rows.abs().amax(1)
    low, high = best_ends(-reach, reach, rows, levels)
    assert torch.equal(low, -high) and (high <= 1.1001 * reach).all()
    for row, upper, most in zip(rows.double(), high.double(), reach.double(), strict=True):
        errors = {}
        for factor in (upper / most, *(0.02 * i for i in range(15, 56))):
            end = most * factor
            step = 2 * end / (levels - 1)
            values = ((row.clamp(-end, end) + end) / step).round() * step - end
            errors[float(factor)] = (values - row).square().mean().item()
        assert next(iter(errors.values())) <= min(errors.values()) * (1 + 1e-3)


@each_data
@pytest.mark.parametrize("quantizer", ["lsq", "lsq+", "ewgs"])
@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_first_ranges_of_many_bits_lose_little(make, quantizer, bits, role):
    rows = make(torch.Generator().manual_seed(1))
    axis = {"channel_axis": 0, "num_channels": 4} if role == "weight" else {}
    wide = create_quantizer(quantizer, bits=bits, role=role, integer_zero_point=False, **axis)
    wide.init_range(rows)
    # At least what covering all of the data with equal steps gives; EWGS's mirrored weights lie half a step beside 0.
    reach = rows.abs().amax(1, keepdim=True) if axis else rows.abs().max()
    offset = 0.5 if quantizer == "ewgs" and role == "weight" else 0.0
    step = 2 * reach / (2**bits - (1 if offset else 2))
    covering = (((rows / step - offset).round() + offset) * step - rows).square().mean().item()
    assert error(wide, rows) <= 1.1 * covering


def test_up_to_four_bits_the_methods_own_range_is_used():
    rows = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    lsq = create_quantizer("lsq", bits=4, role="weight")
    lsq.init_range(rows)
    assert lsq.scale.item() == pytest.approx(2 * rows.abs().mean().item() / 7**0.5)
