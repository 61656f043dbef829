import pytest
import torch

from sqakd_hf import create_quantizer
from tests.helpers.vectors import VECTORS


CASES = [case for case in VECTORS if case["id"].startswith("statsq_")]


def weight_quantizer(weight, bits, channel_axis=0):
    quantizer = create_quantizer("statsq", bits=bits, role="weight", channel_axis=channel_axis)
    quantizer.init_range(weight)
    return quantizer


def test_every_width_is_there():
    assert [case["inputs"]["bits"] for case in CASES] == [1, 2, 3, 4]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_reference_vectors(case):
    w = torch.tensor(case["inputs"]["w"], requires_grad=True)
    quantizer = weight_quantizer(3 * w.detach(), case["inputs"]["bits"])  # the range is that of the weight it meets
    y = quantizer(w)
    y.backward(torch.tensor(case["inputs"]["grad_out"]))
    torch.testing.assert_close(y.detach(), torch.tensor(case["expect"]["out"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(w.grad, torch.tensor(case["expect"]["grad_w"]), rtol=0, atol=0)


def test_the_range_stays_in_eval_mode():
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    quantizer = weight_quantizer(w, 2).eval()
    before = quantizer.qparams()
    quantizer(5 * w)
    assert all(torch.equal(one, other) for one, other in zip(quantizer.qparams(), before, strict=True))
    quantizer.train()(5 * w)
    torch.testing.assert_close(quantizer.qparams()[0], 5 * before[0])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tail", ["missing", "there"])
def test_training_goes_on_from_stored_values_with_the_same_range(bits, tail):
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(4, 60, generator=generator)
    # With and without weights beyond the last value: where it is missing, all others make up the mean.
    w = w * 3 if tail == "there" else w.sign() * (1 + 0.1 * w.clamp(-2, 2))
    quantizer = weight_quantizer(w, bits)
    values = quantizer(w)
    magnitude = quantizer.magnitude.clone()
    torch.testing.assert_close(quantizer(quantizer.latent(values)), values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.magnitude, magnitude, rtol=1e-5, atol=0)


def test_activations_are_those_of_lsq():
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    outputs = []
    for name in ("statsq", "lsq"):
        quantizer = create_quantizer(name, bits=3, role="activation")
        quantizer.init_range(x)
        outputs.append(quantizer(x))
    assert torch.equal(*outputs)
