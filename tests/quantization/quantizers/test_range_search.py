import pytest
import torch

from sqakd_hf import InputError, QuantizationConfig, create_quantizer, list_quantizers
from sqakd_hf.quantization.quantizers.range_search import best_ends, percentile_ends


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


class TestFirstRange:
    @each_data
    @pytest.mark.parametrize("quantizer", list_quantizers())
    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_that_of_least_error_loses_no_more_than_the_methods_own(self, make, quantizer, signed, bits):
        x = make(torch.Generator().manual_seed(1))
        x = x if signed else x.relu()
        found = {}
        for first_range in ("method", "error", "percentile"):
            module = create_quantizer(quantizer, bits=bits, role="activation", signed=signed, first_range=first_range)
            module.init_range(x)
            assert module.calibrated
            found[first_range] = error(module, x)
        # The search knows ranges by their histogram, of which elements may lie by a bin beside, and by factors.
        assert found["error"] <= 1.02 * found["method"] + 1e-12
        assert found["error"] <= 1.02 * found["percentile"] + 1e-12

    @pytest.mark.parametrize("quantizer", ["lsq", "lsq+", "ewgs"])
    @pytest.mark.parametrize("bits", [2, 4])
    def test_weights_of_few_bits_can_be_searched_too(self, quantizer, bits):
        x = torch.randn(4, 2000, generator=torch.Generator().manual_seed(1)) ** 3
        found = {}
        for first_range in ("auto", "error"):
            module = create_quantizer(
                quantizer, bits=bits, role="weight", channel_axis=0, num_channels=4, first_range=first_range
            )
            module.init_range(x)
            found[first_range] = error(module, x)
        assert found["error"] < 0.99 * found["auto"]

    @pytest.mark.parametrize("quantizer", list_quantizers())
    def test_one_bit_activations_use_both_codes(self, quantizer):
        x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).relu() ** 2
        module = create_quantizer(quantizer, bits=1, role="activation", signed=False)
        module.init_range(x)
        assert 0.02 < module.quantize(x).float().mean() < 0.5

    def test_a_percentile_leaves_out_a_thousandth(self):
        x = torch.rand(3, 10_000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [2.0], [9.0]])
        x[:, 0] = 100
        lower, upper = percentile_ends(torch.zeros(3), x.amax(1), x)
        assert ((x > upper[:, None]).sum(1) == 10).all() and (lower == 0).all()

    def test_a_percentile_of_almost_all_zeros_is_the_range(self):
        x = torch.zeros(1, 5000)
        x[0, 0] = 3
        assert percentile_ends(torch.zeros(1), torch.full((1,), 3.0), x)[1].item() == 3

    def test_two_valued_codes_have_the_methods_own(self):
        x = torch.randn(100, generator=torch.Generator().manual_seed(0))
        for quantizer in list_quantizers():
            grids = []
            for first_range in ("method", "error"):
                module = create_quantizer(quantizer, bits=1, role="activation", first_range=first_range)
                module.init_range(x)
                grids.append(module.grid())
            assert all(torch.equal(*pair) for pair in zip(*grids, strict=True))

    def test_it_is_an_option_of_the_config(self):
        config = QuantizationConfig(quantizer_kwargs={"first_range": "error"})
        assert QuantizationConfig.from_dict(config.to_dict()) == config
        with pytest.raises(InputError, match="first_range must be one of 'auto', .* got 'best'"):
            QuantizationConfig(quantizer_kwargs={"first_range": "best"})
        with pytest.raises(InputError, match="unit_range=True leaves nothing"):
            QuantizationConfig("dorefa", quantizer_kwargs={"first_range": "error", "unit_range": True})
