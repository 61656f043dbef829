import pytest
import torch

from sqakd_hf.quantization.quantizers import DoReFaWeight, create_quantizer
from tests.helpers.vectors import VECTORS as all_vectors


CASES = [case for case in all_vectors if case["id"].startswith("pact_act_")]


def assert_equals_vector(actual, expected):
    # 1e-5: float32 against float64; 1e-6: sums of eight float32 terms of order one that nearly cancel.
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def pact(upper, bits=2, signed=False, **options):
    quantizer = create_quantizer("pact", bits=bits, role="activation", signed=signed, **options)
    quantizer.set_range(upper=torch.tensor(upper))
    return quantizer


class TestReferenceVectors:
    def test_the_three_widths_are_there(self):
        assert [case["inputs"]["bits"] for case in CASES] == [1, 2, 4]

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
    def test_activations(self, case):
        inputs, expect = case["inputs"], case["expect"]
        quantizer = pact(inputs["alpha"], inputs["bits"])
        x = torch.tensor(inputs["x"], requires_grad=True)

        y = quantizer(x)
        y.backward(torch.tensor(inputs["grad_out"]))

        assert_equals_vector(y, expect["out"])
        assert_equals_vector(x.grad, expect["grad_x"])
        assert_equals_vector(quantizer.upper.grad, expect["grad_alpha"])


class TestPACT:
    def test_the_upper_bound_is_clipped_and_the_lower_is_not(self):
        for integer_zero_point in (True, False):
            quantizer = pact(1.1, integer_zero_point=integer_zero_point)
            upper = torch.tensor(1.1)
            x = torch.stack(
                [torch.tensor(-0.1), torch.tensor(0.0), torch.nextafter(upper, torch.tensor(0.0)), upper, upper + 1]
            ).requires_grad_()
            quantizer(x).backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
            assert x.grad.tolist() == [0.0, 2.0, 4.0, 0.0, 0.0]
            assert quantizer.upper.grad.item() == 8.0 + 16.0

    def test_a_signed_range_is_mirrored_and_learns_from_both_sides(self):
        quantizer = pact(1.5, signed=True, integer_zero_point=False)
        x = torch.tensor([-2.0, -1.5, -0.4, 0.4, 1.5, 2.0], requires_grad=True)
        y = quantizer(x)
        y.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]))
        assert y.tolist() == [-1.5, -1.5, -0.5, 0.5, 1.5, 1.5]
        assert x.grad.tolist() == [0.0, 2.0, 4.0, 8.0, 0.0, 0.0]
        # Above: 16 + 32. Below, where the end is -upper: -1.
        assert quantizer.upper.grad.item() == 47.0

    def test_the_rounding_error_moves_nothing(self):
        quantizer = pact(1.5, delta=0.0)
        quantizer(torch.tensor([0.1, 0.3, 0.7, 1.2])).sum().backward()
        assert quantizer.upper.grad.item() == 0.0

    def test_starts_at_the_largest_magnitude(self):
        quantizer = create_quantizer("pact", bits=2, role="activation", channel_axis=0)
        quantizer.init_range(torch.tensor([[0.1, -3.0], [2.0, 1.0], [0.0, 0.0]]))
        assert quantizer.upper.tolist() == [3.0, 2.0, 1.0]  # all zero: a unit, so that it can learn

    def test_one_bit_signed_codes_start_at_the_mean_magnitude(self):
        quantizer = create_quantizer("pact", bits=1, role="activation")
        quantizer.init_range(torch.tensor([1.0, -2.0, 0.0, 5.0]))
        assert quantizer.upper.item() == 2.0
        assert quantizer(torch.tensor([-9.0, 0.0, 0.1])).tolist() == [-2.0, 2.0, 2.0]

    def test_weights_are_dorefas(self):
        assert type(create_quantizer("pact", bits=2, role="weight")) is DoReFaWeight
