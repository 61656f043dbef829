"""What storing relies on: codes come back from the values they stand for, and values from the latents made of them."""

import pytest
import torch

from sqakd_hf import InputError, create_quantizer, list_quantizers


BITS = range(1, 9)
each_quantizer = pytest.mark.parametrize("name", list_quantizers())
each_width = pytest.mark.parametrize("bits", BITS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def quantizer_and_weight(name, bits, channel_axis, dtype=torch.float32, spread=0.1):
    generator = torch.Generator().manual_seed(10 * bits)
    weight = spread * torch.randn(6, 5, 3, 3, generator=generator)
    weight[4] *= 30  # where tanh saturates
    weight = weight.to(dtype)
    quantizer = create_quantizer(name, bits=bits, role="weight", channel_axis=channel_axis, num_channels=6)
    quantizer.init_range(weight)
    return quantizer.eval(), weight


@each_quantizer
@each_width
@each_dtype
@pytest.mark.parametrize("channel_axis", [None, 0, 1])
def test_codes_come_back_from_their_values(name, bits, dtype, channel_axis):
    quantizer, weight = quantizer_and_weight(name, bits, channel_axis, dtype)
    codes = quantizer.quantize(weight)
    values = quantizer.dequantize(codes).to(dtype)
    assert torch.equal(quantizer.encode(values), codes)
    assert torch.equal(quantizer(weight), values)


@each_quantizer
@each_width
@each_dtype
@pytest.mark.parametrize("channel_axis", [None, 0])
def test_a_latent_quantizes_to_the_values_it_was_made_of(name, bits, dtype, channel_axis):
    quantizer, weight = quantizer_and_weight(name, bits, channel_axis, dtype)
    values = quantizer(weight)
    latent = quantizer.latent(values)
    assert latent.dtype == dtype and torch.isfinite(latent).all()
    assert torch.equal(quantizer(latent), values)
    quantizer.train()
    assert torch.allclose(quantizer(latent), values, rtol=1e-2 if dtype != torch.float32 else 1e-5)


@each_quantizer
@each_width
def test_a_channel_of_zeros_stays_what_it_was(name, bits):
    quantizer = create_quantizer(name, bits=bits, role="weight", channel_axis=0, num_channels=2)
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(bits))
    weight[1] = 0
    quantizer.init_range(weight)
    values = quantizer.eval()(weight)
    assert torch.equal(quantizer(quantizer.latent(values)), values)


@each_quantizer
def test_a_value_between_two_codes_has_none(name):
    quantizer, weight = quantizer_and_weight(name, 4, 0)
    values = quantizer(weight)
    with pytest.raises(InputError, match="no longer lies on its grid"):
        quantizer.encode(values * 1.03)
