"""Quantizers by themselves: compiled kernels, the eager form, the CPU, and the formulas in float64."""

import copy
import itertools

import pytest
import torch

from sqakd_hf import create_quantizer, list_quantizers
from sqakd_hf.quantization.functional import along


pytestmark = pytest.mark.gpu

ROLES = ("weight", "activation")
BITS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_DTYPE = ("lsq", "ewgs")  # the backward of the others in float32 alone: each kernel takes a second to compile
LAYOUTS = {
    "odd": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
}


def data(signed, dtype=torch.float32, layout="odd", seed=0):
    """Normal values with zeros among them, rectified for unsigned codes, `(5, 7, 13, 11)` on the CPU."""
    x = torch.randn(5, 7, 13, 11, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::17] = 0.0
    return LAYOUTS[layout]((x if signed else x.relu()).to(dtype))


def cases(name, role):
    """Yield a quantizer with a range, on the CPU, for each width, sign and axis."""
    signs = (True, False) if role == "activation" else (True,)
    for bits, axis, signed in itertools.product(BITS, (None, 1), signs):
        quantizer = create_quantizer(name, bits=bits, role=role, signed=signed, channel_axis=axis)
        quantizer.init_range(data(signed, seed=1))
        yield quantizer


def ties(quantizer, x, codes, others):
    """Return how many codes differ, each by 1 and within a few roundings of the threshold between the two."""
    differ = codes != others
    scale, zero_point = (along(each, x, quantizer.channel_axis) for each in quantizer.qparams())
    position = quantizer.transform(x).double() / scale.double() + zero_point.double()
    from_threshold = (position - position.floor() - 0.5).abs() if not quantizer.binary else (position - 0.5).abs()
    # Half a unit of float32 in the last place of up to 256 codes, and what tanh is off by.
    assert (from_threshold[differ] < 1e-4).all()
    assert ((codes.int() - others.int()).abs() <= 1).all()
    return int(differ.sum())


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", list_quantizers())
class TestQuantizers:
    def test_kernels_give_the_bits_of_eager_torch_which_are_those_of_the_codes(
        self, name, role, device, compiled, eagerly
    ):
        for quantizer, layout, dtype in itertools.product(cases(name, role), LAYOUTS, DTYPES):
            quantizer = quantizer.to(device)
            x = data(quantizer.signed, dtype, layout).to(device)
            with torch.no_grad():
                y = quantizer(x)
                with eagerly():
                    eager = quantizer(x)
            case = quantizer, layout, dtype
            assert torch.equal(y, eager), case
            assert torch.equal(y, quantizer.dequantize(quantizer.quantize(x)).to(dtype)), case
            assert y.stride() == x.stride() and y.dtype == dtype, case

    def test_codes_are_the_cpus_but_at_ties(self, name, role, device, note):
        total = differing = 0
        for quantizer, dtype in itertools.product(cases(name, role), DTYPES):
            x = data(quantizer.signed, dtype)
            expected = quantizer.quantize(x)
            found = copy.deepcopy(quantizer).to(device).quantize(x.to(device)).cpu()
            total, differing = total + x.numel(), differing + ties(quantizer, x, found, expected)
        note(f"{name}, {role}: {differing} of {total} codes are not the CPU's, all of them ties")
        # By rounding alone: what maps the weights before (tanh) is another function on another device.
        assert differing <= (1e-4 * total if name in ("dorefa", "pact") else 0)

    def test_gradients_are_those_of_float64(self, name, role, device, compiled, eagerly):
        dtypes = DTYPES if name in EVERY_DTYPE else DTYPES[:1]
        for quantizer, dtype in itertools.product(cases(name, role), dtypes):
            x = data(quantizer.signed, dtype)
            g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
            found = gradients(copy.deepcopy(quantizer).to(device), x.to(device), g.to(device))
            with eagerly():
                eager = gradients(copy.deepcopy(quantizer).to(device), x.to(device), g.to(device))
            expected = gradients(quantizer, x.double(), g.double())
            # A value at a tie has another code in float64, and another gradient of the range.
            same = quantizer.quantize(x) == quantizer.quantize(x.double())
            if quantizer.transform(x) is not x:
                # In float64 the largest weight, which is the end of its range in float32, lies beyond it or before.
                same &= x.abs() < along(quantizer.rows(x).abs().amax(1), x, quantizer.channel_axis)
            assert same.float().mean() > 0.998
            precision = max(torch.finfo(dtype).eps, 1e-5)
            for other in (found, eager):
                case = f"{quantizer}, {dtype}"
                torch.testing.assert_close(
                    other[0].cpu().double()[same], expected[0][same], rtol=precision, atol=precision, msg=case
                )
                largest = g.double().abs().sum().item() / (1 if quantizer.channel_axis is None else x.shape[1])
                for one, value in zip(other[1:], expected[1:], strict=True):
                    slack = 1e-5 * largest + 4 * int((~same).sum())
                    torch.testing.assert_close(one.cpu().double(), value.double(), rtol=1e-4, atol=slack, msg=case)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_model_that_is_compiled_as_a_whole_has_other_values_next_to_ties_alone(dtype, device, on_gpu, note):
    # Its graph is not ours to choose the division of: Inductor's own is approximate on a GPU.
    quantizer = create_quantizer("ewgs", bits=8, role="activation").to(device)
    x = torch.randn(1_000_003 if on_gpu else 1003, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    quantizer.init_range(x)
    with torch.no_grad():
        found = torch.compile(quantizer, **({} if on_gpu else {"backend": "aot_eager"}))(x)
    differing = (found != quantizer(x)).sum().item()
    note(f"compiled as a whole, {dtype}: {differing} of {x.numel()} values are others")
    assert differing <= 1e-4 * x.numel()


def gradients(quantizer, x, g):
    """Return the gradients of the input and of what the range learns by."""
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    quantizer(x).backward(g)
    return [x.grad, *(parameter.grad for parameter in quantizer.parameters())]


def test_one_value_and_none_are_quantized_as_well(device, compiled):
    quantizer = create_quantizer("lsq", bits=4, role="activation").to(device)
    quantizer.init_range(data(True).to(device))
    for shape in ((1,), (1, 1, 1), (0, 3)):
        x = torch.full(shape, 0.3, device=device, requires_grad=True)
        quantizer(x).sum().backward()
        assert x.grad.shape == shape


def test_large_tensors_are_summed_as_exactly_as_small_ones(device, on_gpu, compiled):
    # A range's gradient is a sum over the whole tensor, in float32: of many terms, by a tree and not one by one.
    count = 50_000_003 if on_gpu else 30_003
    x = torch.rand(count, device=device) * 2 - 0.5
    quantizer = create_quantizer("ewgs", bits=4, role="activation", integer_zero_point=False).to(device)
    quantizer.set_range(lower=torch.zeros(1), upper=torch.ones(1))
    quantizer(x).sum().backward()
    above = (x > 1).sum().item()
    # Inside, x_q - kappa x_n sums up to nearly nothing beside what is clipped.
    assert quantizer.upper.grad.item() == pytest.approx(above, rel=1e-3)
