import math

import numpy as np
import pytest
import torch

from sqakd_hf.quantization.functional import MIN_RANGE
from sqakd_hf.quantization.quantizers import create_quantizer
from sqakd_hf.quantization.quantizers.lsq import code_bounds, scale_gradient
from sqakd_hf.quantization.quantizers.range_search import standard_deviation, widen
from tests.helpers.vectors import VECTORS


def vectors(prefix, count):
    cases = [case for case in VECTORS if case["id"].startswith(prefix)]
    assert len(cases) == count
    return pytest.mark.parametrize("case", cases, ids=[case["id"] for case in cases])


def assert_equals_vector(actual, expected):
    # 1e-5: float32 against float64; 1e-6: sums of eight float32 terms of order one that nearly cancel.
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestReferenceVectors:
    @vectors(("lsq_signed_", "lsq_unsigned_", "lsq_binary_weight_"), 8)
    def test_lsq(self, case):
        inputs, expect = case["inputs"], case["expect"]
        signed = "unsigned" not in case["id"]
        quantizer = create_quantizer(
            "lsq", bits=inputs["bits"], role="weight" if signed else "activation", signed=signed
        )
        quantizer.set_range(scale=torch.tensor(inputs["s"]))
        x = torch.tensor([inputs["x"]], requires_grad=True)  # as an activation: one sample of eight elements

        y = quantizer(x)
        y.backward(torch.tensor([inputs["grad_out"]]))

        assert_equals_vector(y, [expect["out"]])
        assert_equals_vector(x.grad, [expect["grad_x"]])
        assert_equals_vector(quantizer.scale.grad, expect["grad_s"])

    @vectors("lsq_binary_weight_", 1)
    def test_the_first_step_of_one_bit_weights(self, case):
        quantizer = create_quantizer("lsq", bits=1, role="weight")
        quantizer.init_range(torch.tensor(case["inputs"]["x"]))
        assert_equals_vector(quantizer.scale, case["expect"]["init_s"])

    @vectors("lsq_init", 1)
    def test_the_first_step(self, case):
        quantizer = create_quantizer("lsq", bits=4, role="weight")
        assert code_bounds(4, signed=True)[1] == case["inputs"]["qp"]
        quantizer.init_range(torch.tensor(case["inputs"]["x"]))
        assert_equals_vector(quantizer.scale, case["expect"]["s"])

    @vectors("lsqplus_act_", 4)
    def test_lsqplus(self, case):
        inputs, expect = case["inputs"], case["expect"]
        quantizer = create_quantizer("lsq+", bits=inputs["bits"], role="activation", integer_zero_point=False)
        quantizer.set_range(scale=torch.tensor(inputs["s"]), offset=torch.tensor(inputs["beta"]))
        x = torch.tensor([inputs["x"]], requires_grad=True)

        y = quantizer(x)
        y.backward(torch.tensor([inputs["grad_out"]]))

        assert_equals_vector(y, [expect["out"]])
        assert_equals_vector(x.grad, [expect["grad_x"]])
        assert_equals_vector(quantizer.scale.grad, expect["grad_s"])
        assert_equals_vector(quantizer.offset.grad, expect["grad_beta"])


class TestCodeBounds:
    def test_are_twos_complement_for_signed_and_start_at_zero_for_unsigned_codes(self):
        assert [code_bounds(bits, signed=True) for bits in range(2, 9)] == [
            (-2, 1),
            (-4, 3),
            (-8, 7),
            (-16, 15),
            (-32, 31),
            (-64, 63),
            (-128, 127),
        ]
        assert [code_bounds(bits, signed=False)[0] for bits in range(1, 9)] == [0] * 8
        assert [code_bounds(bits, signed=False)[1] for bits in range(1, 9)] == [1, 3, 7, 15, 31, 63, 127, 255]

    def test_one_signed_bit_is_minus_and_plus_one(self):
        assert code_bounds(1, signed=True) == (-1, 1)


class TestLSQ:
    def test_values_are_the_multiples_of_the_step(self):
        quantizer = create_quantizer("lsq", bits=3, role="weight")
        quantizer.set_range(scale=torch.tensor(0.3))
        x = torch.linspace(-2, 2, 401)
        # The one float32 multiple of each code: no rounding is left to a range's ends.
        expected = (torch.arange(-4, 4) * torch.tensor(0.3)).tolist()
        assert quantizer(x).unique().tolist() == expected
        assert quantizer.qparams()[1].item() == 4.0

    @pytest.mark.parametrize(("signed", "q_n", "q_p"), [(True, -4, 3), (False, 0, 7)])
    def test_both_clip_bounds_pass_the_gradient(self, signed, q_n, q_p):
        quantizer = create_quantizer("lsq", bits=3, role="weight", signed=signed)
        quantizer.set_range(scale=torch.tensor(0.5))
        lower, upper = torch.tensor(0.5 * q_n), torch.tensor(0.5 * q_p)
        below, above = torch.nextafter(lower, torch.tensor(-9.0)), torch.nextafter(upper, torch.tensor(9.0))
        x = torch.stack([below, lower, upper, above]).requires_grad_()
        quantizer(x).backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        assert x.grad.tolist() == [0.0, 2.0, 4.0, 0.0]
        # The bounds themselves lie on a code, without error; the gradient is divided by sqrt(n Q_p).
        assert quantizer.scale.grad.item() == pytest.approx((q_n + 8 * q_p) / math.sqrt(4 * q_p), rel=1e-6)  # float32

    @pytest.mark.parametrize(
        ("role", "axis", "count"), [("weight", None, 60), ("weight", 0, 12), ("activation", None, 12)]
    )
    def test_the_gradient_is_damped_by_the_elements_of_one_sample_that_share_the_step(self, role, axis, count):
        quantizer = create_quantizer("lsq", bits=4, role=role, channel_axis=axis)
        quantizer.set_range(scale=torch.full((1 if axis is None else 5,), 0.1))
        x = torch.full((5, 12), 9.0)  # all clipped: d/ds = sum g Q_p
        quantizer(x).sum().backward()
        share = 60 if axis is None else 12
        expected = torch.full_like(quantizer.scale, share * 7 / math.sqrt(count * 7))
        torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-5, atol=0)  # float32 sums

    @pytest.mark.parametrize("scale", [0.0, -0.5, MIN_RANGE / 1000])
    def test_a_step_that_training_made_too_small_is_floored_and_still_learns(self, scale):
        for bits, signed in ((1, True), (1, False), (4, True), (8, False)):
            quantizer = create_quantizer("lsq", bits=bits, role="weight", signed=signed)
            quantizer.set_range(scale=torch.tensor(scale))
            x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
            y = quantizer(x)
            y.sum().backward()
            q_n, q_p = code_bounds(bits, signed)
            values = torch.tensor([q_n, q_p if bits == 1 and signed else 0, q_p])
            expected = values * MIN_RANGE / (q_p - q_n)  # the narrowest range, as for every other method
            torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=0)  # float32
            assert quantizer.scale.grad.isfinite().all()
            assert quantizer.qparams()[0].item() > 0

    @pytest.mark.parametrize("bits", [1, 2, 8])
    def test_all_zero_data_gives_a_unit_range(self, bits):
        for signed in (True, False):
            quantizer = create_quantizer("lsq", bits=bits, role="weight", signed=signed)
            quantizer.init_range(torch.zeros(5))
            assert quantizer.clip_range()[1].item() == pytest.approx(1.0, rel=1e-6)  # float32


class TestLSQPlus:
    def test_starts_from_the_smallest_to_the_largest_element(self):
        x = normal(3, 50) + 0.5
        quantizer = create_quantizer("lsq+", bits=3, role="activation", channel_axis=0)
        quantizer.init_range(x)
        assert torch.equal(quantizer.offset, x.amin(1))
        expected = (x.double().amax(1) - x.double().amin(1)) / 7
        torch.testing.assert_close(quantizer.scale.detach().double(), expected, rtol=1e-6, atol=0)  # float32

    def test_one_bit_signed_codes_start_at_the_mean_magnitude(self):
        x = normal(60) + 0.5
        quantizer = create_quantizer("lsq+", bits=1, role="activation")
        quantizer.init_range(x)
        assert quantizer(x).unique().tolist() == pytest.approx([-x.abs().mean().item(), x.abs().mean().item()])

    def test_both_clip_bounds_pass_the_gradient(self):
        quantizer = create_quantizer("lsq+", bits=2, role="activation", integer_zero_point=False)
        quantizer.set_range(scale=torch.tensor(0.5), offset=torch.tensor(-0.25))
        x = torch.tensor([[-0.26, -0.25, 1.25, 1.26]], requires_grad=True)
        quantizer(x).backward(torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
        assert x.grad.tolist() == [[0.0, 2.0, 4.0, 0.0]]
        # d/dbeta = 1 + 8, d/ds = 8 Q_p, both divided by sqrt(4 Q_p).
        assert quantizer.offset.grad.item() == pytest.approx(9 / math.sqrt(12), rel=1e-6)  # float32
        assert quantizer.scale.grad.item() == pytest.approx(24 / math.sqrt(12), rel=1e-6)

    def test_weights_start_where_three_deviations_reach_furthest(self):
        w = normal(4, 50) + torch.tensor([[-0.4], [0.0], [0.3], [2.0]])
        quantizer = create_quantizer("lsq+", bits=3, role="weight", channel_axis=0)
        quantizer.init_range(w)
        data = w.double().numpy()
        mean, std = data.mean(1), data.std(1, ddof=1)
        expected = np.maximum(abs(mean - 3 * std), abs(mean + 3 * std)) / 4
        np.testing.assert_allclose(quantizer.scale.detach(), expected, rtol=1e-5)  # float32

    def test_one_bit_weights_start_at_the_mean_magnitude(self):
        w = normal(60)
        quantizer = create_quantizer("lsq+", bits=1, role="weight")
        quantizer.init_range(w)
        assert quantizer.scale.item() == pytest.approx(w.double().abs().mean().item(), rel=1e-6)  # float32

    def test_all_zero_weights_get_a_unit_step(self):
        quantizer = create_quantizer("lsq+", bits=4, role="weight")
        quantizer.init_range(torch.zeros(5))
        assert quantizer.scale.item() == 1.0

    def test_weights_learn_one_step_and_activations_an_offset_too(self):
        assert [n for n, _ in create_quantizer("lsq+", bits=2, role="weight").named_parameters()] == ["scale"]
        names = [n for n, _ in create_quantizer("lsq+", bits=2, role="activation").named_parameters()]
        assert names == ["scale", "offset"]


class TestHelpers:
    def test_scale_gradient_keeps_every_bit(self):
        x = normal(1000) * torch.logspace(-30, 30, 1000)
        for factor in (0.0, 1e-3, 0.3, 7.0):
            assert torch.equal(scale_gradient(x, factor), x), factor

    def test_a_range_is_widened_only_where_it_is_empty(self):
        lower = torch.tensor([-1.0, 0.0, 3.0, -3.0, 0.0, 2.0, 1e-7])
        upper = torch.tensor([2.0, 0.5, 3.0, -3.0, 0.0, 1.0, 2e-7])
        low, high = widen(lower, upper)
        assert low.tolist() == [-1.0, 0.0, 0.0, -3.0, 0.0, 0.0, 0.0]
        assert high.tolist() == [2.0, 0.5, 3.0, 0.0, 1.0, 1.0, 1.0]

    def test_the_deviation_is_unbiased_and_zero_for_one_element(self):
        assert standard_deviation(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).tolist() == pytest.approx([math.sqrt(2), 0])
        assert standard_deviation(torch.tensor([[5.0], [-1.0]])).tolist() == [0.0, 0.0]
