import contextlib
import functools
import itertools
import logging
import math
import os
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from sqakd_hf import QuantizationConfig, calibrate_model, quantize_model
from sqakd_hf.quantization import functional
from sqakd_hf.quantization.functional import MIN_RANGE, Grid, affine_grid, dequantize, fake_quantize, quantize
from sqakd_hf.quantization.quantizers.lsq import code_bounds, scale_gradient
from tests.helpers.paths import TESTS
from tests.helpers.vectors import VECTORS as all_vectors


VECTORS = {case["id"]: case for case in all_vectors}
# Of quantizers, of a way to set delta and of a loss that do not exist yet.
LATER = ("statsq_", "ewgs_delta_hessian_", "squat_feature_mse_")
# Not about the functions of this file.
ELSEWHERE = {"sqakd_kl_": "distillation/test_losses.py", "lsq_init": "quantization/quantizers/test_lsq.py"}
used = set()


def vectors(prefix):
    """Parametrize a test by the vectors with this prefix, and note that they are used."""
    cases = [case for name, case in VECTORS.items() if name.startswith(prefix)]
    used.update(case["id"] for case in cases)
    return pytest.mark.parametrize("case", cases, ids=[case["id"] for case in cases])


def read(case):
    """Return the case's numbers as a dict of float64 tensors; scalars become `(1,)`, all but `bits` and `delta`."""
    values = {**case["inputs"], **{f"expected_{name}": value for name, value in case["expect"].items()}}
    tensors = {
        name: torch.tensor(value if isinstance(value, list) else [value], dtype=torch.float64)
        for name, value in values.items()
        if isinstance(value, list | float | int) and name not in ("bits", "delta")
    }
    return tensors, 2 ** case["inputs"]["bits"]


def assert_equals_vector(actual, expected):
    # 1e-9: float64 on both sides, a handful of roundings apart.
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=0, atol=1e-9)


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(x, g, lower, upper, levels, delta):
    """The closed form of the de-normalised gradient (vectors/README.md), for one range, in float64 numpy."""
    x, g = x.detach().double().numpy(), g.detach().double().numpy()
    lower, upper = lower.item(), upper.item()
    n = (x - lower) / (upper - lower)
    c = np.clip(n, 0, 1)
    q = np.rint(c * (levels - 1)) / (levels - 1)
    k = ((x >= lower) & (x <= upper)) * (1 + delta * np.sign(g) * (c - q))
    return (
        torch.from_numpy(lower + (upper - lower) * q),
        torch.from_numpy(g * k),
        float((g * ((1 - q) - k * (1 - c))).sum()),
        float((g * (q - k * c)).sum()),
    )


class TestReferenceVectors:
    """Values and gradients in float64 against numbers that were computed without this package."""

    @vectors("ewgs_weight_")
    def test_normalised_ewgs_weights(self, case):
        v, levels = read(case)
        x, lower, upper = (v[name].requires_grad_() for name in ("x", "l", "u"))
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

        q = fake_quantize((x - lower) / (upper - lower), zero, one, levels, delta=case["inputs"]["delta"])
        y = 2 * q - 1
        y.backward(v["grad_out"])

        assert_equals_vector(q, v["expected_q"])
        assert_equals_vector(y, v["expected_out"])
        assert_equals_vector(x.grad, v["expected_grad_x"])
        assert_equals_vector(lower.grad, v["expected_grad_l"])
        assert_equals_vector(upper.grad, v["expected_grad_u"])

    @vectors("ewgs_act_")
    def test_normalised_ewgs_activations(self, case):
        v, levels = read(case)
        x, lower, upper = (v[name].requires_grad_() for name in ("x", "l", "u"))
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

        y = fake_quantize((x - lower) / (upper - lower), zero, one, levels, delta=case["inputs"]["delta"])
        y.backward(v["grad_out"])

        assert_equals_vector(y, v["expected_out"])
        assert_equals_vector(y, v["expected_q"])
        assert_equals_vector(x.grad, v["expected_grad_x"])
        assert_equals_vector(lower.grad, v["expected_grad_l"])
        assert_equals_vector(upper.grad, v["expected_grad_u"])

    @vectors("ewgs_dequant_act_")
    def test_denormalised_ewgs_activations(self, case):
        v, levels = read(case)
        x, lower, upper = (v[name].requires_grad_() for name in ("x", "l", "u"))

        y = fake_quantize(x, lower, upper, levels, delta=case["inputs"]["delta"])
        y.backward(v["grad_out"])

        assert_equals_vector(y, v["expected_out"])
        with torch.no_grad():
            assert_equals_vector((y - lower) / (upper - lower), v["expected_q"])
        assert_equals_vector(x.grad, v["expected_grad_x"])
        assert_equals_vector(lower.grad, v["expected_grad_l"])
        assert_equals_vector(upper.grad, v["expected_grad_u"])

    @vectors("ewgs_qconv_layer_")
    def test_a_whole_ewgs_convolution_composed_of_the_pure_functions(self, case):
        v, levels = read(case)
        weight, x = v["weight"].requires_grad_(), v["x"].requires_grad_()
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

        def normalised(values, lower, upper):
            n = (values - lower) / (upper - lower)
            return fake_quantize(n, zero, one, levels, delta=case["inputs"]["delta"])

        def conv(values, kernel):  # 1x1: x[in, H, W], weight[out, in]
            return torch.einsum("oi,ihw->ohw", kernel, values)

        with torch.no_grad():
            upper_w = 3 * weight.std().view(1)
            upper_a = 3 * x.std().view(1) / math.sqrt(1 - 2 / math.pi)
            ranges = {"lW": -upper_w, "uW": upper_w, "lA": x.min().view(1), "uA": upper_a}
        ranges = {name: value.clone().requires_grad_() for name, value in ranges.items()}
        weight_q = 2 * normalised(weight, ranges["lW"], ranges["uW"]) - 1
        x_q = normalised(x, ranges["lA"], ranges["uA"])
        scale = (conv(x, weight).abs().mean() / conv(x_q, weight_q).abs().mean()).detach().requires_grad_()
        y = conv(x_q, weight_q) * scale.abs()
        y.backward(v["grad_out"])

        assert_equals_vector(weight_q, v["expected_weight_q"])
        assert_equals_vector(x_q, v["expected_x_q"])
        assert_equals_vector(scale, v["expected_output_scale"])
        assert_equals_vector(y, v["expected_out"])
        assert_equals_vector(weight.grad, v["expected_grad_weight"])
        assert_equals_vector(x.grad, v["expected_grad_x"])
        assert_equals_vector(scale.grad, v["expected_grad_output_scale"])
        for name, value in ranges.items():
            assert_equals_vector(value, v[f"expected_{name}"])
            assert_equals_vector(value.grad, v[f"expected_grad_{name}"])

    @vectors("pact_act_")
    def test_pact(self, case):
        v, levels = read(case)
        x, alpha = v["x"].requires_grad_(), v["alpha"].requires_grad_()

        y = fake_quantize(x, torch.zeros(1, dtype=torch.float64), alpha, levels, clip_only=True)
        y.backward(v["grad_out"])

        assert_equals_vector(y, v["expected_out"])
        assert_equals_vector(x.grad, v["expected_grad_x"])
        assert_equals_vector(alpha.grad, v["expected_grad_alpha"])

    @vectors("dorefa_weight_")
    def test_dorefa_weights(self, case):
        v, levels = read(case)
        w = v["w"].requires_grad_()
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

        if levels == 2:  # sign(w) mean|w|, which every gradient passes
            mean = w.detach().abs().mean().view(1)
            grid = affine_grid(-mean, mean, 2)._replace(lower=-torch.inf * one, upper=torch.inf * one)
            y = fake_quantize(w, -mean, mean, 2, grid=grid, binary=True)
        else:
            largest = torch.tanh(w).abs().max()
            largest = largest.detach() if case["inputs"]["detach_max"] else largest
            y = 2 * fake_quantize(torch.tanh(w) / (2 * largest) + 0.5, zero, one, levels) - 1
        y.backward(v["grad_out"])

        assert_equals_vector(y, v["expected_out"])
        assert_equals_vector(w.grad, v["expected_grad_w"])

    @vectors("dorefa_act_")
    def test_dorefa_activations(self, case):
        v, levels = read(case)
        x = v["x"].requires_grad_()

        y = fake_quantize(x, torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), levels)
        y.backward(v["grad_out"])

        assert_equals_vector(y, v["expected_out"])
        assert_equals_vector(x.grad, v["expected_grad_x"])

    @vectors(("lsq_signed_", "lsq_unsigned_", "lsq_binary_weight_"))
    def test_lsq(self, case):
        v, levels = read(case)
        x, s = v["x"].requires_grad_(), v["s"].requires_grad_()
        q_n, q_p = code_bounds(case["inputs"]["bits"], signed="unsigned" not in case["id"])
        factor = (x.numel() * q_p) ** -0.5

        step = scale_gradient(s, factor)
        y = fake_quantize(x, step * q_n, step * q_p, levels, binary="binary" in case["id"])
        y.backward(v["grad_out"])

        if "qn" in case["inputs"]:  # the binary case is our own extension and has no bounds
            assert (q_n, q_p) == (case["inputs"]["qn"], case["inputs"]["qp"])
            assert factor == pytest.approx(case["expect"]["grad_scale"], rel=1e-12)
        assert_equals_vector(y, v["expected_out"])
        assert_equals_vector(x.grad, v["expected_grad_x"])
        assert_equals_vector(s.grad, v["expected_grad_s"])

    @vectors("lsqplus_act_")
    def test_lsqplus(self, case):
        v, levels = read(case)
        x, s, beta = (v[name].requires_grad_() for name in ("x", "s", "beta"))
        factor = (x.numel() * (levels - 1)) ** -0.5

        lower = scale_gradient(beta, factor)
        y = fake_quantize(x, lower, lower + (levels - 1) * scale_gradient(s, factor), levels)
        y.backward(v["grad_out"])

        assert factor == pytest.approx(case["expect"]["grad_scale"], rel=1e-12)
        assert_equals_vector(y, v["expected_out"])
        assert_equals_vector(x.grad, v["expected_grad_x"])
        assert_equals_vector(s.grad, v["expected_grad_s"])
        assert_equals_vector(beta.grad, v["expected_grad_beta"])

    def test_no_vector_is_skipped_in_silence(self):
        later = {name for name in VECTORS if name.startswith(LATER)}
        elsewhere = {name for name in VECTORS if name.startswith(tuple(ELSEWHERE))}
        assert len(VECTORS) == 50
        assert len(later) == 7
        assert used | elsewhere == set(VECTORS) - later
        for prefix, file in ELSEWHERE.items():
            assert prefix in (TESTS / file).read_text(), f"{file} should test {prefix}"


class TestAffineGrid:
    def test_values_run_from_lower_to_upper_in_equal_steps(self):
        grid = affine_grid(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([2.0, 0.75, 8.0]), levels=4)
        codes = torch.arange(4.0).view(4, 1)
        # Steps 1, 1/4 and 2: every value is exact in float32.
        assert ((codes - grid.zero_point) * grid.scale).T.tolist() == [
            [-1.0, 0.0, 1.0, 2.0],
            [0.0, 0.25, 0.5, 0.75],
            [2.0, 4.0, 6.0, 8.0],
        ]
        assert grid.lower.tolist() == [-1.0, 0.0, 2.0]
        assert grid.upper.tolist() == [2.0, 0.75, 8.0]

    def test_passes_no_gradient(self):
        grid = affine_grid(torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True), levels=4)
        assert not any(value.requires_grad for value in grid)

    @pytest.mark.parametrize("integer_zero_point", [False, True], ids=["free", "integer"])
    @pytest.mark.parametrize("lower", [0.0, 1.0, -1.0, 32.0, -32.0, 1e4, -1e4])
    @pytest.mark.parametrize("width", [0.0, -1.0], ids=["empty", "reversed"])
    def test_an_empty_or_reversed_range_still_has_a_positive_step(self, lower, width, integer_zero_point):
        lower = torch.tensor([lower])
        for levels in (2, 256):
            grid = affine_grid(lower, lower + width, levels, integer_zero_point)
            assert (grid.scale > 0).all(), grid
            assert all(value.isfinite().all() for value in (*grid, 1 / grid.scale)), grid
            assert (grid.upper > grid.lower).all(), grid

    def test_the_narrowest_range_is_min_range(self):
        grid = affine_grid(torch.zeros(1), torch.full((1,), MIN_RANGE / 10), levels=2)
        assert grid.upper.item() == pytest.approx(1e-6, rel=1e-6)  # float32

    @pytest.mark.parametrize("levels", [2, 4, 16, 256])
    @pytest.mark.parametrize(
        ("lower", "upper"), [(-0.9, 2.1), (-1.0, 1.0), (0.0, 3.0), (-3.0, 0.0), (0.3, 2.0), (-2.0, -0.3)]
    )
    def test_an_integer_zero_point_shifts_the_range_by_at_most_half_a_step(self, lower, upper, levels):
        grid = affine_grid(torch.tensor([lower]), torch.tensor([upper]), levels, integer_zero_point=True)
        scale, zero_point = grid.scale.item(), grid.zero_point.item()
        lower, upper = min(lower, 0.0), max(upper, 0.0)  # widened to hold zero
        assert zero_point == round(zero_point)
        assert 0 <= zero_point <= levels - 1
        # 1e-6: float32.
        assert scale == pytest.approx((upper - lower) / (levels - 1), rel=1e-6)
        assert abs(grid.lower.item() - lower) <= scale / 2 * (1 + 1e-5)
        assert grid.upper.item() - grid.lower.item() == pytest.approx(upper - lower, rel=1e-6)
        assert dequantize(torch.tensor([int(zero_point)]), grid).item() == 0.0

    def test_an_integer_zero_point_that_fits_already_moves_nothing(self):
        grid = affine_grid(torch.tensor([-1.0]), torch.tensor([2.0]), levels=4, integer_zero_point=True)
        assert [value.item() for value in grid] == [-1.0, 2.0, 1.0, 1.0]


class TestFakeQuantize:
    def test_clips_and_rounds_half_to_even(self):
        x = torch.tensor([-1.0, 0.4, 0.5, 0.6, 1.5, 2.5, 3.0, 9.0])
        y = fake_quantize(x, torch.zeros(1), torch.full((1,), 3.0), levels=4)
        assert y.tolist() == [0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 3.0, 3.0]

    def test_binary_puts_the_midpoint_and_both_zeros_on_the_upper_value(self):
        x = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 2.0])
        y = fake_quantize(x, -torch.ones(1), torch.ones(1), levels=2, binary=True)
        assert y.tolist() == [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
        codes = quantize(x, affine_grid(-torch.ones(1), torch.ones(1), 2), levels=2, binary=True)
        assert codes.tolist() == [0, 0, 1, 1, 1, 1]
        shifted = fake_quantize(torch.tensor([1.9, 2.0]), torch.ones(1), torch.full((1,), 3.0), 2, binary=True)
        assert shifted.tolist() == [1.0, 3.0]

    def test_quantize_and_dequantize_are_its_two_halves(self):
        x, channels = seeded(6, 5, 4) * 2, torch.arange(1.0, 6.0)
        for bits in range(1, 9):
            for axis, lower, upper in (
                (None, torch.tensor([-0.7]), torch.tensor([1.1])),
                (1, -channels, channels / 3),
            ):
                for binary in (False, True) if bits == 1 else (False,):
                    grid = affine_grid(lower, upper, 2**bits)
                    codes = quantize(x, grid, 2**bits, channel_axis=axis, binary=binary)
                    y = fake_quantize(x, lower, upper, 2**bits, channel_axis=axis, binary=binary)
                    assert codes.dtype == torch.uint8
                    assert codes.min().item() == 0
                    assert codes.max().item() == 2**bits - 1
                    assert torch.equal(dequantize(codes, grid, channel_axis=axis), y), (bits, axis, binary)

    def test_delta_zero_is_the_straight_through_estimator(self):
        x = seeded(200).requires_grad_()
        g = seeded(200, seed=1)
        fake_quantize(x, torch.tensor([-0.8]), torch.tensor([1.2]), levels=8).backward(g)
        assert torch.equal(x.grad, torch.where((x >= -0.8) & (x <= 1.2), g, 0.0))

    @pytest.mark.parametrize("delta", [0.0, 1e-3, 0.3, 2.0])
    @pytest.mark.parametrize("bits", [1, 2, 5, 8])
    def test_gradients_equal_the_closed_form(self, bits, delta):
        x = seeded(300, dtype=torch.float64).requires_grad_()
        g = seeded(300, seed=1, dtype=torch.float64)
        lower = torch.tensor([-0.8], dtype=torch.float64, requires_grad=True)
        upper = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)

        y = fake_quantize(x, lower, upper, 2**bits, delta=delta)
        y.backward(g)

        # 1e-11: sums of 300 float64 terms of order one.
        value, grad_x, grad_lower, grad_upper = reference(x, g, lower, upper, 2**bits, delta)
        torch.testing.assert_close(y.detach(), value, rtol=0, atol=1e-11)
        torch.testing.assert_close(x.grad, grad_x, rtol=0, atol=1e-11)
        assert lower.grad.item() == pytest.approx(grad_lower, rel=0, abs=1e-11)
        assert upper.grad.item() == pytest.approx(grad_upper, rel=0, abs=1e-11)

    def test_delta_scales_a_gradient_by_the_error_in_units_of_the_whole_range(self):
        # Codes 0 ... 3 over [0, 3]; 1.2 lies 0.2 above code 1, which is 0.2 / 3 of the range; 1.9 lies 0.1 below 2.
        x = torch.tensor([1.2, 1.2, 1.9], dtype=torch.float64, requires_grad=True)
        g = torch.tensor([2.0, -2.0, 1.0], dtype=torch.float64)
        zero, three = torch.zeros(1, dtype=torch.float64), torch.full((1,), 3.0, dtype=torch.float64)
        fake_quantize(x, zero, three, levels=4, delta=0.6).backward(g)
        expected = torch.tensor([2 * (1 + 0.6 * 0.2 / 3), -2 * (1 - 0.6 * 0.2 / 3), 1 - 0.6 * 0.1 / 3])
        torch.testing.assert_close(x.grad, expected.double(), rtol=0, atol=1e-7)  # `expected` is float32

    @pytest.mark.parametrize("axis", [0, 1, 2, -1])
    def test_each_channel_is_quantized_on_its_own(self, axis):
        x, g = seeded(3, 4, 5), seeded(3, 4, 5, seed=1)
        channels = x.shape[axis]
        lower = -torch.arange(1.0, channels + 1) / 3
        upper = torch.arange(1.0, channels + 1) / 2

        def run(x, g, lower, upper, axis):
            x, lower, upper = (v.clone().requires_grad_() for v in (x, lower, upper))
            y = fake_quantize(x, lower, upper, levels=8, delta=0.1, channel_axis=axis)
            y.backward(g)
            return y.detach(), x.grad, lower.grad, upper.grad

        y, grad_x, grad_lower, grad_upper = run(x, g, lower, upper, axis)

        assert grad_lower.shape == grad_upper.shape == (channels,)
        for i in range(channels):
            one = run(x.select(axis, i), g.select(axis, i), lower[i : i + 1], upper[i : i + 1], None)
            assert torch.equal(y.select(axis, i), one[0])
            assert torch.equal(grad_x.select(axis, i), one[1])
            # 1e-5: float32 sums in another order.
            torch.testing.assert_close(grad_lower[i : i + 1], one[2], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad_upper[i : i + 1], one[3], rtol=1e-5, atol=1e-5)

    def test_one_range_serves_every_channel(self):
        x, g = seeded(3, 4).requires_grad_(), seeded(3, 4, seed=1)
        upper = torch.ones(1, requires_grad=True)
        fake_quantize(x, torch.zeros(1), upper, levels=4, channel_axis=1).backward(g)
        one_x, one_upper = x.detach().clone().requires_grad_(), torch.ones(1, requires_grad=True)
        fake_quantize(one_x, torch.zeros(1), one_upper, levels=4).backward(g)
        assert torch.equal(x.grad, one_x.grad)
        torch.testing.assert_close(upper.grad, one_upper.grad, rtol=1e-6, atol=1e-6)  # float32 sums

    def test_both_clip_bounds_belong_to_the_range(self):
        below, above = math.nextafter(-0.5, -1), math.nextafter(1.5, 2)
        x = torch.tensor([below, -0.5, 1.5, above], dtype=torch.float64, requires_grad=True)
        lower = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
        upper = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
        fake_quantize(x, lower, upper, levels=4).backward(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64))
        assert x.grad.tolist() == [0.0, 2.0, 4.0, 0.0]
        assert (lower.grad.item(), upper.grad.item()) == (1.0, 8.0)

    def test_clip_only_counts_the_upper_bound_as_clipped_and_the_lower_as_inside(self):
        x = torch.tensor([-0.6, -0.5, 0.3, 1.4, 1.5, 1.6], dtype=torch.float64, requires_grad=True)
        lower = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
        upper = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
        g = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)
        fake_quantize(x, lower, upper, levels=4, clip_only=True).backward(g)
        assert x.grad.tolist() == [0.0, 2.0, 4.0, 8.0, 0.0, 0.0]
        assert (lower.grad.item(), upper.grad.item()) == (1.0, 16.0 + 32.0)

    def test_a_given_grid_sets_the_values_and_the_mask_while_the_ends_take_the_gradients(self):
        x, g = seeded(50, dtype=torch.float64), seeded(50, seed=1, dtype=torch.float64)
        grid = affine_grid(*torch.tensor([[-1.0], [1.0]], dtype=torch.float64), levels=4)

        def run(*ends, **options):
            ends = [torch.tensor([end], dtype=torch.float64, requires_grad=True) for end in ends]
            leaf = x.clone().requires_grad_()
            y = fake_quantize(leaf, *ends, levels=4, **options)
            y.backward(g)
            return (y.detach(), leaf.grad, *(end.grad for end in ends))

        for shared, own in zip(run(-0.4, 0.3, grid=grid), run(-1.0, 1.0), strict=True):
            assert torch.equal(shared, own)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_keeps_the_callers_dtype_and_computes_in_the_wider_one(self, dtype):
        x, g = seeded(4, 100, dtype=dtype), seeded(4, 100, seed=1, dtype=dtype)
        lower, upper = torch.full((4,), -0.7), torch.full((4,), 1.1)
        wide = torch.promote_types(dtype, torch.float32)

        def run(x, g, lower, upper):
            x, lower, upper = (v.clone().requires_grad_() for v in (x, lower, upper))
            y = fake_quantize(x, lower, upper, levels=16, delta=0.1, channel_axis=0)
            y.backward(g)
            return y.detach(), x.grad, lower.grad, upper.grad

        y, grad_x, grad_lower, grad_upper = run(x, g, lower, upper)
        wide_y, wide_grad_x, wide_lower, wide_upper = run(x.to(wide), g.to(wide), lower, upper)

        assert y.dtype == grad_x.dtype == dtype
        assert grad_lower.dtype == grad_upper.dtype == torch.float32
        assert torch.equal(y, wide_y.to(dtype))
        assert torch.equal(grad_x, wide_grad_x.to(dtype))
        assert torch.equal(grad_lower, wide_lower)
        assert torch.equal(grad_upper, wide_upper)

    def test_half_precision_input_gets_the_codes_of_its_float32_copy(self):
        grid = affine_grid(torch.tensor([-0.7]), torch.tensor([1.1]), levels=256)
        for dtype in (torch.float16, torch.bfloat16):
            x = seeded(1000, dtype=dtype)
            assert torch.equal(quantize(x, grid, levels=256), quantize(x.float(), grid, levels=256)), dtype

    @pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 3, 4, 4)])
    def test_an_empty_tensor_gives_an_empty_tensor_and_zero_gradients(self, shape):
        for axis in (None, 1) if len(shape) > 1 else (None,):
            x = torch.zeros(shape, requires_grad=True)
            lower = torch.zeros(1 if axis is None else 3, requires_grad=True)
            upper = torch.ones_like(lower, requires_grad=True)
            y = fake_quantize(x, lower, upper, levels=4, channel_axis=axis)
            y.sum().backward()
            assert y.shape == x.grad.shape == shape
            assert lower.grad.tolist() == upper.grad.tolist() == [0.0] * lower.numel()

    def test_a_scalar_tensor_is_quantized(self):
        x, upper = torch.tensor(0.3, requires_grad=True), torch.ones(1, requires_grad=True)
        y = fake_quantize(x, torch.zeros(1), upper, levels=2)
        y.backward()
        assert (y.shape, y.item(), x.grad.item()) == ((), 0.0, 1.0)
        assert upper.grad.item() == pytest.approx(-0.3, rel=1e-6)  # q - n

    def test_computes_only_the_gradients_that_are_asked_for(self):
        x, g = seeded(20), seeded(20, seed=1)
        for want in [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]:
            leaves = [
                v.clone().requires_grad_(w) for v, w in zip((x, torch.zeros(1), torch.ones(1)), want, strict=True)
            ]
            full = [v.clone().requires_grad_() for v in (x, torch.zeros(1), torch.ones(1))]
            for tensors in (leaves, full):
                fake_quantize(*tensors, levels=4, delta=0.1).backward(g)
            for leaf, reference_leaf, wanted in zip(leaves, full, want, strict=True):
                assert torch.equal(leaf.grad, reference_leaf.grad) if wanted else leaf.grad is None, want

    def test_a_second_derivative_is_refused(self):
        # Silent zeros would be taken for a Hessian.
        x = seeded(5).requires_grad_()
        y = fake_quantize(x, torch.zeros(1), torch.ones(1), levels=4)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()

    def test_keeps_nothing_for_the_backward_but_its_input_and_the_range(self):
        x, saved = seeded(4, 1000), []
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            fake_quantize(leaf, torch.zeros(4), torch.ones(4), levels=4, channel_axis=0)
        assert sorted(tensor.numel() for tensor in saved) == [4, 4, 4, 4, 4000]
        assert [t.data_ptr() for t in saved if t.numel() == 4000] == [leaf.data_ptr()]  # the input, not a copy

    def test_its_output_may_be_modified_in_place(self):
        # `nn.ReLU(inplace=True)` after a quantizer does it.
        x = torch.tensor([-0.5, 0.2, 0.9], requires_grad=True)
        y = fake_quantize(x, -torch.ones(1), torch.ones(1), levels=3)
        y.relu_()
        y.sum().backward()
        assert y.tolist() == [0.0, 0.0, 1.0]
        assert x.grad.tolist() == [0.0, 0.0, 1.0]

    def test_leaves_its_input_alone(self):
        x = seeded(50)
        before = x.clone()
        y = fake_quantize(x, torch.zeros(1), torch.ones(1), levels=256)
        assert torch.equal(x, before)
        assert y.data_ptr() != x.data_ptr()


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "sliced": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "batch of one": lambda x: x[:1],
}


class TestMemoryLayout:
    @pytest.mark.parametrize("axis", [None, 0, 1, -1])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_does_not_change_values_or_gradients(self, layout, axis):
        x = LAYOUTS[layout](seeded(4, 6, 5, 3))
        channels = 1 if axis is None else x.shape[axis]
        lower, upper = torch.linspace(-1, -0.3, channels), torch.linspace(0.4, 2, channels)
        grads = {
            "contiguous": seeded(*x.shape, seed=1),
            "reversed strides": seeded(*reversed(x.shape), seed=1).permute(3, 2, 1, 0),
            "expanded": torch.full((), 0.7).expand(x.shape),
        }

        def run(x, g):
            leaf, low, high = (v.detach().requires_grad_() for v in (x, lower.clone(), upper.clone()))
            y = fake_quantize(leaf, low, high, levels=8, delta=0.1, channel_axis=axis)
            y.backward(g)
            return y.detach(), leaf.grad, low.grad, high.grad

        for name, g in grads.items():
            y, grad_x, *grad_range = run(x, g)
            plain_y, plain_grad_x, *plain_range = run(x.contiguous(), g.contiguous())
            assert torch.equal(y, plain_y), name
            assert torch.equal(grad_x, plain_grad_x), name
            # 1e-5: float32 sums in another order.
            torch.testing.assert_close(grad_range, plain_range, rtol=1e-5, atol=1e-5, msg=name)

    @pytest.mark.parametrize("axis", [None, 0, 1])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
    def test_the_output_has_the_strides_of_a_dense_input(self, layout, axis):
        # A convolution in channels-last pays for a copy otherwise.
        x = LAYOUTS[layout](seeded(4, 6, 5, 3)).requires_grad_()
        channels = 1 if axis is None else x.shape[axis]
        y = fake_quantize(x, torch.zeros(channels), torch.ones(channels), levels=8, channel_axis=axis)
        assert y.stride() == x.stride()


class TestDerivatives:
    """Finite differences, where the function has a derivative: the codes must not change along the way."""

    @pytest.mark.parametrize("options", [{}, {"delta": 0.5}, {"clip_only": True}, {"binary": True}], ids=str)
    @pytest.mark.parametrize("axis", [None, 0])
    def test_clipped_elements_move_with_the_end_that_clips_them(self, axis, options):
        x = torch.tensor([[-3.0, -2.5, 2.5], [3.0, -4.0, 5.0]], dtype=torch.float64, requires_grad=True)
        channels = 1 if axis is None else 2
        lower = torch.linspace(-1.0, -0.5, channels, dtype=torch.float64).requires_grad_()
        upper = torch.linspace(1.0, 1.5, channels, dtype=torch.float64).requires_grad_()
        levels = 2 if "binary" in options else 8
        assert torch.autograd.gradcheck(
            lambda *tensors: fake_quantize(*tensors, levels=levels, channel_axis=axis, **options), (x, lower, upper)
        )

    @pytest.mark.parametrize("delta", [0.0, 0.5])
    @pytest.mark.parametrize("axis", [None, 1])
    def test_values_that_move_with_the_range_stay_on_their_code(self, axis, delta):
        # y(l, u) = fake_quantize(l + (u - l) t) = l + (u - l) q(t): the rounding error cancels, for every delta.
        t = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.4 - 0.2
        channels = 1 if axis is None else 3
        lower = torch.linspace(-1.0, -0.5, channels, dtype=torch.float64).requires_grad_()
        upper = torch.linspace(1.0, 1.5, channels, dtype=torch.float64).requires_grad_()
        clamped = t.clamp(0.02, 0.98)
        assert (clamped * 7 % 1 - 0.5).abs().min() > 1e-3  # none so near a rounding tie that a step crosses it

        def moved(lower, upper):
            return fake_quantize(
                lower + (upper - lower) * clamped, lower, upper, levels=8, delta=delta, channel_axis=axis
            )

        assert torch.autograd.gradcheck(moved, (lower, upper))

    def test_scale_gradient_is_the_identity_with_a_scaled_gradient(self):
        x = torch.tensor([3.0, -0.1, 1e-8, 1e8], requires_grad=True)
        y = scale_gradient(x, 0.3)
        y.backward(torch.tensor([1.0, 2.0, -4.0, 0.5]))
        assert torch.equal(y, x)
        assert torch.equal(x.grad, torch.tensor([1.0, 2.0, -4.0, 0.5]) * 0.3)
        assert torch.autograd.gradcheck(
            lambda v: scale_gradient(v, 1.0), (seeded(4, dtype=torch.float64).requires_grad_(),)
        )


float32s = st.floats(-30, 30, width=32)
ranges = st.tuples(st.floats(-10, 10, width=32), st.floats(2**-10, 20, width=32), st.integers(1, 8))


class TestProperties:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(float32s, min_size=1, max_size=20), ranges, st.booleans(), st.booleans())
    def test_every_value_is_one_of_the_grid_and_larger_inputs_give_no_smaller_values(
        self, values, bounds, integer_zero_point, binary
    ):
        low, width, bits = bounds
        levels = 2**bits
        binary = binary and bits == 1
        lower, upper = torch.tensor([low]), torch.tensor([low + width])
        grid = affine_grid(lower, upper, levels, integer_zero_point)
        x = torch.tensor(values).sort().values

        y = fake_quantize(x, lower, upper, levels, grid=grid, binary=binary)

        every = dequantize(torch.arange(levels), grid)
        assert torch.isin(y, every).all()
        assert (y.diff() >= 0).all()
        assert torch.equal(fake_quantize(torch.tensor([-1e30, 1e30]), lower, upper, levels, grid=grid), every[[0, -1]])

    @settings(max_examples=100, deadline=None)
    @given(st.lists(float32s, min_size=1, max_size=20), ranges, st.booleans())
    def test_the_error_inside_the_range_is_at_most_half_a_step(self, values, bounds, integer_zero_point):
        low, width, bits = bounds
        lower, upper = torch.tensor([low]), torch.tensor([low + width])
        grid = affine_grid(lower, upper, 2**bits, integer_zero_point)
        x = torch.tensor(values).clamp(grid.lower, grid.upper)

        y = fake_quantize(x, lower, upper, 2**bits, grid=grid)

        # Four float32 roundings of numbers as large as the range's ends (x / scale, the zero point and their sums).
        slack = 4 * torch.finfo(torch.float32).eps * max(grid.lower.abs().item(), grid.upper.abs().item())
        assert ((y - x).abs() <= grid.scale / 2 + slack).all()

    @settings(max_examples=100, deadline=None)
    @given(ranges)
    def test_zero_is_exact_with_an_integer_zero_point(self, bounds):
        low, width, bits = bounds
        lower, upper = torch.tensor([low]), torch.tensor([low + width])
        grid = affine_grid(lower, upper, 2**bits, integer_zero_point=True)
        assert fake_quantize(torch.zeros(1), lower, upper, 2**bits, grid=grid).item() == 0.0

    @settings(max_examples=100, deadline=None)
    @given(st.lists(float32s, min_size=1, max_size=20), st.floats(2**-10, 10, width=32), st.integers(1, 8))
    def test_opposite_inputs_get_opposite_codes_on_a_symmetric_grid(self, values, upper, bits):
        upper, qmax = torch.tensor([upper]), 2**bits - 1
        grid = affine_grid(-upper, upper, 2**bits)
        x = torch.tensor(values)
        position = (x.double() / upper.double() + 1) / 2 * qmax
        x = x[((position % 1) - 0.5).abs() > 1e-3]  # a tie goes to the even code, which has an odd opposite
        assume(x.numel() > 0)

        codes, opposite = quantize(x, grid, 2**bits), quantize(-x, grid, 2**bits)

        assert (codes.int() + opposite.int()).unique().tolist() == [qmax]

    @settings(max_examples=50, deadline=None)
    @given(st.floats(-10, 10, width=32), st.floats(1, 20, width=32), st.integers(1, 8), st.booleans())
    def test_every_code_survives_the_round_trip(self, low, width, bits, integer_zero_point):
        grid = affine_grid(torch.tensor([low]), torch.tensor([low + width]), 2**bits, integer_zero_point)
        codes = torch.arange(2**bits, dtype=torch.uint8)
        assert torch.equal(quantize(dequantize(codes, grid), grid, 2**bits), codes)


@pytest.fixture
def compiler(monkeypatch):
    """Let the kernels compile, from a clean record, and restore the record."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(functional, "_compiler_failures", [])


@pytest.fixture
def broken_compiler(monkeypatch):
    """Let every compilation fail as `error` says, and restore the record of failures."""
    monkeypatch.setattr(functional, "_compiler_failures", [])

    def install(error):
        def fail(*args):
            raise error

        monkeypatch.setattr(functional, "_compiled", fail)

    return install


def compiled_graphs():
    return counters["stats"]["unique_graphs"]


# All above functional._MIN_FUSED_NUMEL. The fused kernels see them as `(n,)` or `(channels, n)`.
LARGE = {
    "contiguous": lambda: seeded(2, 8, 48, 48),
    "non-square": lambda: seeded(3, 8, 40, 50),
    "channels_last": lambda: seeded(2, 8, 48, 48).to(memory_format=torch.channels_last),
    "transposed": lambda: seeded(30, 40, 50).transpose(1, 2),
    "sliced": lambda: seeded(4, 9, 40, 51)[:, 1:, :, ::2],
    "tokens": lambda: seeded(5, 50, 192),
    "matrix": lambda: seeded(192, 200),
    "batch of one": lambda: seeded(1, 4, 100, 100),
    "five dimensions": lambda: seeded(2, 3, 8, 30, 40),
    "six dimensions": lambda: seeded(2, 3, 8, 6, 5, 40),
    "vector": lambda: seeded(40_000),
}


def fused_and_eager(monkeypatch, x, axis, bits, **options):
    """Return (y, grad_x, grad_lower, grad_upper) of the compiled and of the eager bodies."""
    channels = 1 if axis is None else x.shape[axis]
    g = seeded(*x.shape, seed=1, dtype=x.dtype)

    def run():
        leaf = x.detach().requires_grad_()
        lower = torch.linspace(-0.7, -1.4, channels).requires_grad_()
        upper = torch.linspace(1.1, 0.5, channels).requires_grad_()
        y = fake_quantize(leaf, lower, upper, 2**bits, channel_axis=axis, **options)
        y.backward(g)
        return y.detach(), leaf.grad, lower.grad, upper.grad

    with monkeypatch.context() as context:
        context.setattr(functional, "_MIN_FUSED_NUMEL", sys.maxsize)
        eager = run()
    assert x.numel() >= functional._MIN_FUSED_NUMEL
    return run(), eager


def assert_fused_is_eager(fused, eager, case):
    assert functional._compiler_failures == []
    assert torch.equal(fused[0], eager[0]), case
    assert torch.equal(fused[1], eager[1]), case
    for fused_sum, eager_sum in zip(fused[2:], eager[2:], strict=True):
        # 1e-3 of a sum of tens of thousands of float32 terms with both signs: the order of the sum differs.
        torch.testing.assert_close(fused_sum, eager_sum, rtol=1e-4, atol=1e-3, msg=str(case))


class TestFusedKernels:
    @pytest.mark.parametrize("axis", [None, 0, 1])
    def test_give_the_bits_of_the_eager_bodies_for_every_layout(self, axis, compiler, monkeypatch):
        for layout, make in LARGE.items():
            x = make()
            if axis == 1 and x.dim() == 1 or axis is not None and x.shape[axis] == 1:
                continue
            for bits, delta in ((1, 0.0), (2, 0.2), (4, 0.0), (8, 1e-3)):
                case = layout, axis, bits, delta
                assert_fused_is_eager(*fused_and_eager(monkeypatch, x, axis, bits, delta=delta), case)

    @pytest.mark.parametrize(
        "options",
        [{"binary": True}, {"clip_only": True}, {"dtype": torch.bfloat16}],
        ids=["binary", "clip_only", "bfloat16"],
    )
    def test_give_the_bits_of_the_eager_bodies_for_every_option(self, options, compiler, monkeypatch):
        options = {"delta": 0.2, **options}
        x = LARGE["contiguous"]().to(options.pop("dtype", torch.float32))
        bits = 1 if "binary" in options else 4
        assert_fused_is_eager(*fused_and_eager(monkeypatch, x, None, bits, **options), options)

    @pytest.mark.parametrize("axis", [None, 0])
    def test_one_compilation_serves_every_size_layout_and_bit_width(self, axis, compiler, monkeypatch):
        # Compiles, unless a test before did. Inductor sums rows of up to 4096 elements in a kernel of their own.
        for shape in ((9, 5000), (200, 300)):
            fused_and_eager(monkeypatch, seeded(*shape), axis, 4, delta=0.1)
        before = compiled_graphs()

        for layout, make in LARGE.items():
            x = make()
            if axis is not None and x.dim() == 1 or axis is not None and x.shape[axis] == 1:
                continue
            fused_and_eager(monkeypatch, x, axis, 8, delta=0.3)
            with torch.no_grad():
                channels = 1 if axis is None else x.shape[axis]
                fake_quantize(x, torch.zeros(channels), torch.ones(channels), 4, channel_axis=axis)
            assert compiled_graphs() == before, layout
        assert functional._compiler_failures == []

    def test_survive_more_kinds_of_tensors_than_dynamo_recompiles_for(self, compiler):
        # Eight recompilations are dynamo's limit; the ninth raised FailOnRecompileLimitHit in the middle of training.
        for dims in range(1, 8):
            for requires_grad in (True, False):
                x = seeded(*[2] * (dims - 1), 2**15).requires_grad_(requires_grad)
                y = fake_quantize(x, torch.zeros(1), torch.ones(1), 4)
                assert y.shape == x.shape
        assert functional._compiler_failures == []

    def test_each_variant_has_a_recompilation_limit_of_its_own(self, compiler, monkeypatch):
        # Twelve variants of the forward's body. Dynamo's own backend stands in for Inductor: it compiles nothing.
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        monkeypatch.setattr(functional, "_compiled", functools.cache(functional._compiled.__wrapped__))
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for binary, axis in ((False, None), (True, None), (False, 0)):
                channels = 1 if axis is None else 2
                x = seeded(2, 2**14, dtype=dtype)
                ends = -torch.ones(channels), torch.ones(channels)
                fake_quantize(x, *ends, 2, binary=binary, channel_axis=axis)
                assert functional._compiler_failures == [], (dtype, binary, axis)
        assert functional._compiled.cache_info().currsize == 12

    def test_divide_on_a_gpu_as_eager_torch_does(self, monkeypatch):
        # Its own division there is approximate: forward and quantize, which is eager, would differ next to ties.
        seen = []
        monkeypatch.setattr(torch, "compile", lambda body, **options: seen.append(options["options"]) or body)
        functional._compiled.__wrapped__(functional._forward)
        (options,) = seen
        assert options == functional._exact_division()
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        assert list(options.values()) == [True] * (version >= (2, 10))
        assert all("div" in name and "rounding" in name for name in options)

    def test_each_mode_and_each_size_of_one_has_one_too(self, compiler, monkeypatch):
        # On a GPU everything is compiled, and four modes by four kinds of weights are more than dynamo's eight.
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        monkeypatch.setattr(functional, "_compiled", functools.cache(functional._compiled.__wrapped__))
        monkeypatch.setattr(functional, "_MIN_FUSED_NUMEL", 0)
        modes = (
            contextlib.nullcontext(),
            torch.autocast("cpu", torch.bfloat16),
            torch.autocast("cpu", torch.float16),
            torch.inference_mode(),
        )
        for mode, shape in itertools.product(modes, ((6, 5), (6, 1), (1, 5), (1, 1), (0, 5), (6, 0))):
            with mode:
                y = fake_quantize(seeded(*shape), -torch.ones(shape[0]), torch.ones(shape[0]), 4, channel_axis=0)
            assert y.shape == shape
            assert functional._compiler_failures == [], (mode, shape)

    def test_wait_for_tensors_that_are_worth_it(self, broken_compiler):
        broken_compiler(AssertionError("compiled"))
        fake_quantize(torch.zeros(functional._MIN_FUSED_NUMEL - 1), torch.zeros(1), torch.ones(1), 4)
        with pytest.raises(AssertionError, match="compiled"):
            fake_quantize(torch.zeros(functional._MIN_FUSED_NUMEL), torch.zeros(1), torch.ones(1), 4)

    @pytest.mark.parametrize(
        "error",
        [
            torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no g++"), None),
            torch._dynamo.exc.TorchDynamoException("unsupported"),
            torch._dynamo.exc.FailOnRecompileLimitHit("Hard failure due to fullgraph=True"),
            FileNotFoundError(2, "No such file or directory: 'g++'"),
            OSError(),
        ],
        ids=["backend", "unsupported", "recompile limit", "no such file", "no message"],
    )
    def test_fall_back_to_eager_with_one_message(self, error, broken_compiler, monkeypatch, caplog):
        x = LARGE["contiguous"]()
        with monkeypatch.context() as context:
            context.setattr(functional, "_MIN_FUSED_NUMEL", sys.maxsize)
            expected = fake_quantize(x, torch.zeros(1), torch.ones(1), 4)
        broken_compiler(error)

        with caplog.at_level(logging.DEBUG, logger="sqakd_hf.quantization.functional"):
            leaf = x.clone().requires_grad_()
            for _ in range(3):
                y = fake_quantize(leaf, torch.zeros(1), torch.ones(1), 4)
            y.sum().backward()

        assert torch.equal(y, expected)
        assert torch.equal(leaf.grad, ((x >= 0) & (x <= 1)).float())
        assert [(record.levelname, record.name) for record in caplog.records] == [("INFO", functional.__name__)]
        assert caplog.messages[0].startswith("Quantizers run without a compiled kernel, up to a third slower: ")
        assert "\n" not in caplog.messages[0]

    def test_an_error_of_another_kind_is_not_hidden(self, broken_compiler):
        broken_compiler(ValueError("a bug"))
        with pytest.raises(ValueError, match="a bug"):
            fake_quantize(LARGE["contiguous"](), torch.zeros(1), torch.ones(1), 4)
        assert functional._compiler_failures == []

    def test_stay_out_of_the_way_of_a_dispatch_mode(self, broken_compiler):
        broken_compiler(AssertionError("compiled"))
        with FlopCounterMode(display=False):
            y = fake_quantize(LARGE["matrix"](), torch.zeros(1), torch.ones(1), 2)
        assert y.unique().tolist() == [0.0, 1.0]


class Layer(nn.Module):
    """A range that is learned, and nothing else."""

    def __init__(self, channels, **options):
        super().__init__()
        self.lower = nn.Parameter(torch.linspace(-0.7, -1.4, channels))
        self.upper = nn.Parameter(torch.linspace(1.1, 0.5, channels))
        self.options = {"levels": 8, "delta": 0.1, **options}

    def forward(self, x):
        return fake_quantize(x, self.lower, self.upper, **self.options)


class TestWholeGraphCompilation:
    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ((4, 6, 5), {}),
            ((4, 6, 5), {"channel_axis": 0}),
            ((4, 6, 5), {"channel_axis": -2}),
            ((50,), {}),
            ((50,), {"channel_axis": 0}),
            ((), {}),
            ((4, 6), {"levels": 2, "binary": True}),
            ((4, 6), {"clip_only": True, "channel_axis": 1}),
        ],
        ids=str,
    )
    def test_is_one_graph_with_the_eager_values_and_gradients(self, shape, options):
        axis = options.get("channel_axis")
        layer = Layer(1 if axis is None else shape[axis], **options)
        x, g = seeded(*shape), seeded(*shape, seed=1)
        # Its eager backend is enough: nothing but the capture of the graph is in question.
        backend = CompileCounterWithBackend("aot_eager")

        def run(function):
            leaf = x.clone().requires_grad_()
            layer.zero_grad()
            y = function(leaf)
            y.backward(g)
            return y.detach(), leaf.grad, layer.lower.grad.clone(), layer.upper.grad.clone()

        # The cases share one code object, which dynamo would compile eight times only.
        with torch._dynamo.config.patch(recompile_limit=64):
            compiled = run(torch.compile(layer, backend=backend, fullgraph=True))
        eager = run(layer)

        assert backend.frame_count == 1
        assert torch.equal(compiled[0], eager[0])
        assert torch.equal(compiled[1], eager[1])
        # 1e-5: float32 sums in another order.
        torch.testing.assert_close(compiled[2:], eager[2:], rtol=1e-5, atol=1e-5)

    def test_keeps_channels_last(self):
        x = seeded(2, 3, 4, 5).to(memory_format=torch.channels_last)
        with torch._dynamo.config.patch(recompile_limit=64):
            y = torch.compile(Layer(3, channel_axis=1), backend="aot_eager", fullgraph=True)(x)
        assert y.stride() == x.stride()

    @pytest.mark.slow  # a cold C++ compilation of its own
    def test_inductor_gives_the_bits_of_eager(self):
        layer = Layer(6, channel_axis=1)
        x = seeded(4, 6, 50, 50).requires_grad_()
        with torch._dynamo.config.patch(recompile_limit=64):
            y = torch.compile(layer, fullgraph=True)(x)
        assert torch.equal(y, layer(x))


class TestGrid:
    def test_is_named_so_that_quantizers_can_replace_single_fields(self):
        grid = affine_grid(torch.zeros(1), torch.ones(1), levels=4)
        assert isinstance(grid, Grid)
        assert Grid._fields == ("lower", "upper", "scale", "zero_point")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"residual_bits": 8}),
        ("test_vit", {"attention_bits": 8}),
        ("test_resnet", {"quantizer": "ewgs", "weight_bits": 1, "activation_bits": 1}),
        ("test_resnet", {"quantizer": "dorefa"}),
    ],
)
class TestTracing:
    """A student in eval mode as a graph of TorchScript."""

    @pytest.fixture
    def student(self, name, options):
        torch.manual_seed(0)
        size = {"img_size": 32} if "vit" in name else {}
        model, images = timm.create_model(name, num_classes=4, **size), torch.randn(4, 3, 32, 32)
        quantize_model(model, QuantizationConfig(**options), images)
        calibrate_model(model, [images], disable_progress=True)
        return model.eval()

    def test_gives_the_same_bits(self, student):
        images = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            traced = torch.jit.trace(student, images)
            for x in (images, torch.randn(2, 3, 32, 32)):
                assert torch.equal(traced(x), student(x))

    @pytest.mark.export
    def test_is_what_openvino_reads(self, student):
        openvino = pytest.importorskip("openvino")
        images = torch.randn(4, 3, 32, 32)
        model = openvino.convert_model(student, example_input=images)
        precision = {"INFERENCE_PRECISION_HINT": "f32"}
        found = openvino.Core().compile_model(model, "CPU", precision)(images.numpy())[0]
        with torch.no_grad():
            # Sums in another order move values over the threshold between two codes.
            expected = student(images)
            assert (torch.from_numpy(found) - expected).norm() < 0.05 * expected.norm()
