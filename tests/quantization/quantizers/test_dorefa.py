import math

import numpy as np
import pytest
import torch

from sqakd_hf.quantization.quantizers import create_quantizer
from tests.helpers.vectors import VECTORS


# The other weights let a gradient through the maximum, which the module detaches: see test_functional.py.
WEIGHTS = [c for c in VECTORS if c["id"].startswith("dorefa_weight_") and c["inputs"]["detach_max"]]
ACTIVATIONS = [c for c in VECTORS if c["id"].startswith("dorefa_act_")]


def assert_equals_vector(actual, expected):
    # 1e-5: float32 against float64; 1e-6: values near zero.
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(x, **options):
    quantizer = create_quantizer("dorefa", **options)
    quantizer.init_range(x)
    return quantizer


class TestReferenceVectors:
    def test_every_width_is_there(self):
        assert [case["inputs"]["bits"] for case in WEIGHTS] == [1, 2, 4]
        assert [case["inputs"]["bits"] for case in ACTIVATIONS] == [1, 2, 4]

    @pytest.mark.parametrize("name", ["dorefa", "pact"])
    @pytest.mark.parametrize("case", WEIGHTS, ids=lambda case: case["id"])
    def test_weights_in_the_published_form(self, case, name):
        w = torch.tensor(case["inputs"]["w"], requires_grad=True)
        quantizer = create_quantizer(name, bits=case["inputs"]["bits"], role="weight", unit_range=True)
        quantizer.init_range(w)

        y = quantizer(w)
        y.backward(torch.tensor(case["inputs"]["grad_out"]))

        assert_equals_vector(y, case["expect"]["out"])
        assert_equals_vector(w.grad, case["expect"]["grad_w"])

    @pytest.mark.parametrize("case", ACTIVATIONS, ids=lambda case: case["id"])
    def test_activations_in_the_published_form(self, case):
        x = torch.tensor(case["inputs"]["x"], requires_grad=True)
        quantizer = calibrated(
            7 * x, bits=case["inputs"]["bits"], role="activation", signed=False, unit_range=True
        )  # whose range does not depend on the data

        y = quantizer(x)
        y.backward(torch.tensor(case["inputs"]["grad_out"]))

        # A rounding tie (0.5 at 4 bits is code 7.5) goes to either side: its step, 1 / 15, is no float32.
        steps = quantizer.levels - 1
        tie = (x.detach() * steps % 1 - 0.5).abs() < 1e-6
        assert_equals_vector(y[~tie], torch.tensor(case["expect"]["out"])[~tie])
        assert ((y - x)[tie].abs() <= 0.5 / steps * (1 + 1e-5)).all()
        assert_equals_vector(x.grad, case["expect"]["grad_x"])


class TestDoReFa:
    def test_nothing_is_learned(self):
        for role in ("weight", "activation"):
            quantizer = create_quantizer("dorefa", bits=2, role=role)
            assert list(quantizer.parameters()) == []
            assert list(quantizer.range_tensors()) == ["magnitude"]

    def test_activations_keep_the_largest_magnitude_of_calibration(self):
        quantizer = calibrated(torch.tensor([0.5, -3.0, 2.0]), bits=8, role="activation", integer_zero_point=False)
        assert quantizer.magnitude.tolist() == [3.0]
        assert quantizer(torch.tensor([-9.0, 9.0])).tolist() == [-3.0, 3.0]

    def test_the_unit_range_is_mirrored_for_signed_activations(self):
        quantizer = calibrated(normal(50), bits=2, role="activation", unit_range=True, integer_zero_point=False)
        # 1e-6: thirds in float32.
        assert quantizer(torch.linspace(-2, 2, 50)).unique().tolist() == pytest.approx(
            [-1, -1 / 3, 1 / 3, 1], abs=1e-6
        )

    def test_both_clip_bounds_of_activations_pass_the_gradient(self):
        quantizer = calibrated(torch.tensor([0.0, 1.1]), bits=2, role="activation", signed=False)
        upper = torch.tensor(1.1)
        x = torch.stack([torch.tensor(-1e-9), torch.tensor(0.0), upper, upper + 1e-6]).requires_grad_()
        quantizer(x).sum().backward()
        assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]

    def test_one_bit_signed_activations_are_fixed_at_the_mean_magnitude(self):
        quantizer = calibrated(torch.tensor([1.0, -2.0, 0.0, 5.0]), bits=1, role="activation")
        quantizer.train()
        assert quantizer(torch.tensor([-9.0, 0.0, 8.0])).tolist() == [-2.0, 2.0, 2.0]
        assert quantizer.magnitude.item() == 2.0


class TestDoReFaWeight:
    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_values_equal_the_formula_at_the_magnitude_of_calibration(self, bits):
        w = normal(40)
        quantizer = calibrated(w, bits=bits, role="weight")
        data, n = w.double().numpy(), 2**bits - 1
        z = np.tanh(data) / (2 * abs(np.tanh(data)).max()) + 0.5
        expected = (2 * np.rint(z * n) / n - 1) * abs(data).max()
        np.testing.assert_allclose(quantizer(w), expected, rtol=1e-5, atol=1e-6)  # float32

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_largest_weight_lands_on_the_end_of_the_range_exactly(self, sign):
        w = normal(5, 40).clamp(-2, 2)
        w[:, 0] = sign * torch.tensor([3.1, 2.7, 4.9, 3.3, 6.1])
        for bits in range(2, 9):
            quantizer = calibrated(w, bits=bits, role="weight", channel_axis=0)
            leaf = w.clone().requires_grad_()
            assert torch.equal(quantizer.transform(w)[:, 0], w[:, 0])
            y = quantizer(leaf)
            y.sum().backward()
            assert quantizer.quantize(w)[:, 0].tolist() == [2**bits - 1 if sign > 0 else 0] * 5, bits
            torch.testing.assert_close(y[:, 0].detach(), w[:, 0], rtol=1e-6, atol=0)  # float32
            assert (leaf.grad > 0).all(), bits  # a rounding beyond the end would have cut it

    def test_a_channel_without_weights_has_a_finite_gradient(self):
        w = normal(4, 30)
        w[2] = 0  # a gain that starts at zero, a pruned channel
        quantizer = calibrated(w, bits=4, role="weight", channel_axis=0)
        leaf = w.clone().requires_grad_()
        quantizer(leaf).sum().backward()
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[2] == quantizer.magnitude[2]).all()

    @pytest.mark.parametrize("axis", [None, 0])
    def test_no_rounding_carries_a_weight_beyond_the_range(self, axis):
        w = normal(1000, 9)
        quantizer = calibrated(w, bits=4, role="weight", channel_axis=axis)
        assert torch.equal(quantizer.rows(quantizer.transform(w)).abs().amax(1), quantizer.magnitude)

    def test_the_range_stays_while_the_weights_grow(self):
        w = normal(40)
        quantizer = calibrated(w, bits=4, role="weight")
        before = quantizer.magnitude.clone()
        y = quantizer.train()(3 * w)
        assert torch.equal(quantizer.magnitude, before)
        assert y.abs().max().item() == pytest.approx(before.item(), rel=1e-6)  # float32

    @pytest.mark.parametrize("axis", [None, 0, 1, -1])
    def test_gradients_see_tanh_but_not_its_maximum(self, axis):
        w, g = normal(4, 6).requires_grad_(), normal(4, 6, seed=1)
        quantizer = calibrated(w.detach(), bits=3, role="weight", channel_axis=axis)
        quantizer(w).backward(g)

        data = w.detach().double().numpy()
        others = None if axis is None else 1 - axis % 2
        largest = abs(np.tanh(data)).max(others, keepdims=True)
        magnitude = abs(data).max(others, keepdims=True)
        expected = g.numpy() * magnitude / largest * (1 - np.tanh(data) ** 2)
        np.testing.assert_allclose(w.grad, expected, rtol=1e-5, atol=1e-6)  # float32

    def test_weights_far_beyond_tanhs_reach_stay_finite(self):
        w = torch.tensor([-1e30, -50.0, 0.0, 1e-30, 50.0], requires_grad=True)
        quantizer = calibrated(w.detach(), bits=4, role="weight")
        y = quantizer(w)
        y.sum().backward()
        assert y.isfinite().all()
        assert w.grad.isfinite().all()

    def test_one_bit_magnitude_follows_the_weight_in_training_only(self):
        w = torch.tensor([[1.0, -3.0], [0.5, 0.0]])
        quantizer = calibrated(w, bits=1, role="weight", channel_axis=0)
        assert quantizer.magnitude.tolist() == [2.0, 0.25]
        assert quantizer.eval()(2 * w).tolist() == [[2.0, -2.0], [0.25, 0.25]]
        assert quantizer.magnitude.tolist() == [2.0, 0.25]
        assert quantizer.train()(2 * w).tolist() == [[4.0, -4.0], [0.5, 0.5]]
        assert quantizer.magnitude.tolist() == [4.0, 0.5]

    def test_one_bit_weights_that_all_became_zero_keep_a_positive_magnitude(self):
        quantizer = calibrated(normal(6), bits=1, role="weight")
        y = quantizer.train()(torch.zeros(6))
        assert y.isfinite().all()
        assert quantizer.qparams()[0].item() > 0

    def test_one_bit_weights_pass_every_gradient(self):
        w, g = 100 * normal(50), normal(50, seed=1)
        for mode in (True, False):
            leaf = w.clone().requires_grad_()
            quantizer = calibrated(w, bits=1, role="weight", unit_range=True).train(mode)
            quantizer(leaf).backward(g)
            assert torch.equal(leaf.grad, g)

    def test_unsigned_one_bit_weights_are_squashed_like_all_others(self):
        w = torch.tensor([0.0, 0.4, 1.0])
        quantizer = calibrated(w, bits=1, role="weight", signed=False)
        assert math.tanh(0.4) / math.tanh(1.0) < 0.5
        assert quantizer(w).tolist() == [0.0, 0.0, 1.0]
