import math

import numpy as np
import pytest
import torch

from sqakd_hf.quantization.quantizers import EWGS, create_quantizer
from tests.helpers.vectors import VECTORS


def vectors(prefix, count):
    cases = [case for case in VECTORS if case["id"].startswith(prefix)]
    assert len(cases) == count
    return pytest.mark.parametrize("case", cases, ids=[case["id"] for case in cases])


def assert_equals_vector(actual, expected):
    # 1e-5: float32 against float64; 1e-6: sums of eight float32 terms of order one that nearly cancel.
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def run(case, role, signed):
    """Return the quantizer, its output and the gradient of its input for a vector's inputs, with a free range."""
    inputs = case["inputs"]
    quantizer = create_quantizer(
        "ewgs", bits=inputs["bits"], role=role, signed=signed, delta=inputs["delta"], integer_zero_point=False
    )
    quantizer.set_range(lower=torch.tensor(inputs["l"]), upper=torch.tensor(inputs["u"]))
    x = torch.tensor(inputs["x"], requires_grad=True)
    y = quantizer(x)
    return quantizer, x, y


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestReferenceVectors:
    @vectors("ewgs_dequant_act_", 4)
    def test_activations(self, case):
        quantizer, x, y = run(case, "activation", signed=True)
        y.backward(torch.tensor(case["inputs"]["grad_out"]))
        assert_equals_vector(y, case["expect"]["out"])
        assert_equals_vector(quantizer.quantize(x) / (quantizer.levels - 1), case["expect"]["q"])
        assert_equals_vector(x.grad, case["expect"]["grad_x"])
        assert_equals_vector(quantizer.lower.grad, case["expect"]["grad_l"])
        assert_equals_vector(quantizer.upper.grad, case["expect"]["grad_u"])

    @vectors("ewgs_weight_", 6)
    def test_normalised_weights(self, case):
        # The published values 2 q - 1 are ours divided by half the range, and so is the gradient of x. The ranges
        # have other gradients: the published form learns them through the normalised value alone.
        quantizer, x, y = run(case, "weight", signed=True)
        y.backward(torch.tensor(case["inputs"]["grad_out"]))
        lower, upper = case["inputs"]["l"], case["inputs"]["u"]
        assert_equals_vector((y - (lower + upper) / 2) * 2 / (upper - lower), case["expect"]["out"])
        assert_equals_vector(quantizer.quantize(x) / (quantizer.levels - 1), case["expect"]["q"])
        assert_equals_vector(x.grad * 2 / (upper - lower), case["expect"]["grad_x"])

    @vectors("ewgs_act_", 6)
    def test_normalised_activations(self, case):
        quantizer, x, y = run(case, "activation", signed=False)
        y.backward(torch.tensor(case["inputs"]["grad_out"]))
        lower, upper = case["inputs"]["l"], case["inputs"]["u"]
        assert_equals_vector((y - lower) / (upper - lower), case["expect"]["out"])
        assert_equals_vector(quantizer.quantize(x) / (quantizer.levels - 1), case["expect"]["q"])
        assert_equals_vector(x.grad / (upper - lower), case["expect"]["grad_x"])

    @vectors("ewgs_qconv_layer_", 1)
    def test_the_layers_first_ranges(self, case):
        expect = case["expect"]
        weight = create_quantizer("ewgs", bits=2, role="weight")
        weight.init_range(torch.tensor(case["inputs"]["weight"]))
        assert_equals_vector(weight.lower, expect["lW"])
        assert_equals_vector(weight.upper, expect["uW"])
        activation = create_quantizer("ewgs", bits=2, role="activation", signed=False)
        activation.init_range(torch.tensor(case["inputs"]["x"]))
        assert_equals_vector(activation.lower, expect["lA"])
        assert_equals_vector(activation.upper, expect["uA"])


class TestGradient:
    def test_delta_is_the_published_fixed_setting_by_default(self):
        assert create_quantizer("ewgs", bits=2, role="weight").delta == 1e-3
        assert EWGS(2, "weight", delta=0).delta == 0.0

    def test_delta_zero_is_the_straight_through_estimator(self):
        quantizer = create_quantizer("ewgs", bits=2, role="weight", delta=0.0)
        quantizer.set_range(lower=torch.tensor(-0.8), upper=torch.tensor(1.2))
        x, g = normal(200).requires_grad_(), normal(200, seed=1)
        quantizer(x).backward(g)
        assert torch.equal(x.grad, torch.where((x >= -0.8) & (x <= 1.2), g, 0.0))

    def test_delta_moves_elements_towards_their_code_less_than_away_from_it(self):
        quantizer = create_quantizer("ewgs", bits=1, role="weight", signed=False, delta=1.0)
        quantizer.set_range(lower=torch.tensor(0.0), upper=torch.tensor(1.0))
        x = torch.tensor([0.25, 0.25], requires_grad=True)  # 0.25 above its code
        quantizer(x).backward(torch.tensor([1.0, -1.0]))
        assert x.grad.tolist() == [1.25, -0.75]

    @pytest.mark.parametrize("role", ["weight", "activation"])
    def test_both_clip_bounds_pass_the_gradient(self, role):
        for bits in (1, 2, 8):
            quantizer = create_quantizer("ewgs", bits=bits, role=role, delta=0.0, integer_zero_point=False)
            lower, upper = torch.tensor(-0.7), torch.tensor(1.1)
            quantizer.set_range(lower=lower, upper=upper)
            below, above = torch.nextafter(lower, torch.tensor(-2.0)), torch.nextafter(upper, torch.tensor(2.0))
            x = torch.stack([below, lower, upper, above]).requires_grad_()
            quantizer(x).backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
            assert x.grad.tolist() == [0.0, 2.0, 4.0, 0.0], quantizer
            assert (quantizer.lower.grad.item(), quantizer.upper.grad.item()) == (1.0, 8.0), quantizer

    def test_the_bounds_of_a_shifted_grid_are_those_of_its_values(self):
        quantizer = create_quantizer("ewgs", bits=2, role="activation", delta=0.0)
        quantizer.set_range(lower=torch.tensor(-0.9), upper=torch.tensor(2.1))  # the grid is -1, 0, 1, 2
        x = torch.tensor([-1.1, -1.0, -0.9, 2.0, 2.05], requires_grad=True)
        y = quantizer(x)
        y.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
        assert y.tolist() == [-1.0, -1.0, -1.0, 2.0, 2.0]
        assert x.grad.tolist() == [0.0, 2.0, 4.0, 8.0, 0.0]
        # Clipped: 1 below and 16 above. Inside: 4 at -0.9, whose code is a tenth of a step below it.
        assert quantizer.lower.grad.item() == pytest.approx(1 + 4 * 0.1 / 3, rel=1e-5)  # float32
        assert quantizer.upper.grad.item() == pytest.approx(16 - 4 * 0.1 / 3, rel=1e-5)


class TestFirstRange:
    def test_weights_start_three_deviations_around_zero(self):
        w = normal(6, 50) + 0.3
        quantizer = create_quantizer("ewgs", bits=2, role="weight", channel_axis=0)
        quantizer.init_range(w)
        reach = 3 * w.double().numpy().std(1, ddof=1)
        np.testing.assert_allclose(quantizer.upper.detach(), reach, rtol=1e-5)  # float32
        np.testing.assert_allclose(quantizer.lower.detach(), -reach, rtol=1e-5)

    def test_signed_activations_start_three_deviations_around_their_mean_within_the_data(self):
        x = normal(2, 5000)
        x[1] = x[1].clamp(-1, 4)
        quantizer = create_quantizer("ewgs", bits=4, role="activation", channel_axis=0)
        quantizer.init_range(x)
        data = x.double().numpy()
        mean, std = data.mean(1), data.std(1, ddof=1)
        assert data[0].min() < mean[0] - 3 * std[0]  # so that the first row is cut, the second is not
        expected = [max(mean[0] - 3 * std[0], data[0].min()), -1.0]
        np.testing.assert_allclose(quantizer.lower.detach(), expected, rtol=1e-4)  # float32, mean near zero
        expected = [min(mean[0] + 3 * std[0], data[0].max()), min(mean[1] + 3 * std[1], data[1].max())]
        np.testing.assert_allclose(quantizer.upper.detach(), expected, rtol=1e-4)

    def test_one_bit_signed_codes_start_at_the_mean_magnitude(self):
        x = normal(4, 6)
        for role in ("weight", "activation"):
            quantizer = create_quantizer("ewgs", bits=1, role=role)
            quantizer.init_range(x)
            assert quantizer.upper.item() == pytest.approx(x.double().abs().mean().item(), rel=1e-6)  # float32
            assert quantizer.lower.item() == -quantizer.upper.item()

    def test_all_zero_weights_start_at_a_symmetric_unit(self):
        quantizer = create_quantizer("ewgs", bits=1, role="weight")
        quantizer.init_range(torch.zeros(4))
        assert (quantizer.lower.item(), quantizer.upper.item()) == (-1.0, 1.0)

    def test_a_weight_that_is_alone_in_its_channel_keeps_its_value(self):
        # A depthwise 1x1 convolution, or a linear layer with one input: one element has no deviation.
        w = torch.tensor([[-3.0], [5.0], [0.2]])
        quantizer = create_quantizer("ewgs", bits=8, role="weight", channel_axis=0)
        quantizer.init_range(w)
        step = quantizer.qparams()[0].view(-1, 1)
        assert ((quantizer(w) - w).abs() <= step / 2 * (1 + 1e-5)).all()  # float32

    @pytest.mark.parametrize("integer_zero_point", [True, False])
    def test_unsigned_activations_far_from_zero_are_not_all_clipped(self, integer_zero_point):
        # A gate that is nearly open: its three deviations, 1.4, end below its minimum.
        x = 10 + torch.rand(1000, generator=torch.Generator().manual_seed(0))
        assert 3 * x.std().item() / math.sqrt(1 - 2 / math.pi) < x.min().item()
        quantizer = create_quantizer(
            "ewgs", bits=4, role="activation", signed=False, integer_zero_point=integer_zero_point
        )
        quantizer.init_range(x)
        leaf = x.clone().requires_grad_()
        quantizer(leaf).sum().backward()
        assert (leaf.grad != 0).float().mean() > 0.9
        assert (quantizer(x) - x).abs().max() <= quantizer.qparams()[0].item()


class TestRangeThatTrainingMoved:
    @pytest.mark.parametrize("role", ["weight", "activation"])
    @pytest.mark.parametrize("lower", [-40.0, -1.0, 0.0, 1.0, 40.0])
    def test_ends_that_crossed_still_give_finite_values_and_gradients(self, lower, role):
        x = normal(64)
        for integer_zero_point in (True, False):
            for bits in (1, 2, 8):
                quantizer = create_quantizer("ewgs", bits=bits, role=role, integer_zero_point=integer_zero_point)
                for gap in (0.0, -1.0):
                    quantizer.set_range(lower=torch.tensor(lower), upper=torch.tensor(lower + gap))
                    quantizer.zero_grad()
                    leaf = x.clone().requires_grad_()
                    y = quantizer(leaf)
                    y.sum().backward()
                    tensors = (y, leaf.grad, quantizer.lower.grad, quantizer.upper.grad, *quantizer.qparams())
                    assert all(tensor.isfinite().all() for tensor in tensors), (quantizer, lower, gap)
