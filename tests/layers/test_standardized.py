import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from sqakd_hf import QuantizationConfig, calibrate_model, create_quantizer, list_quantizers, quantize_model
from sqakd_hf.layers.quantized_layer import quantized_class


def case(cls, size=8, **options):
    torch.manual_seed(0)
    layer = cls(4, 8, 3, **options).eval()
    if hasattr(layer, "gain"):
        nn.init.uniform_(layer.gain, 0.5, 2.0)
    nn.init.normal_(layer.weight, 1.0, 2.0)  # far from standardised
    return layer, torch.randn(2, 4, size, size)


CASES = {
    "StdConv2d": lambda: case(timm.layers.StdConv2d, bias=True),
    "StdConv2dSame": lambda: case(timm.layers.StdConv2dSame, stride=2),
    "StdConv2dSame, odd": lambda: case(timm.layers.StdConv2dSame, size=7, stride=2, groups=2),
    "ScaledStdConv2d": lambda: case(timm.layers.ScaledStdConv2d, gamma=1.7),
    "ScaledStdConv2dSame": lambda: case(timm.layers.ScaledStdConv2dSame, stride=2, gamma=1.7),
    "BiT": lambda: case(WeightStandardizedConv2d, stride=2),
    "BiT, padding": lambda: case(WeightStandardizedConv2d, padding=1),
}
each = pytest.mark.parametrize("build", CASES.values(), ids=CASES)


def standardised(layer):
    """The papers' formula, in float64: mean 0 and variance 1 over each output channel, times gain / sqrt(fan-in)."""
    weight = layer.weight.detach().double()
    mean = weight.mean((1, 2, 3), keepdim=True)
    variance = weight.var((1, 2, 3), keepdim=True, unbiased=False)
    weight = (weight - mean) / (variance + layer.eps).sqrt()
    return weight if not hasattr(layer, "gain") else weight * layer.gain.double() * layer.scale


def student_of(layer, bits=4, quantizer="lsq", images=None):
    twin = quantized_class(layer).from_float(
        layer,
        create_quantizer(quantizer, bits=bits, role="weight", channel_axis=0, num_channels=8),
        None,
    )
    twin.weight_quantizer.init_range(twin.float_weight())
    return twin


@each
class TestStandardizedConv:
    def test_quantizes_the_standardised_weight(self, build):
        layer, x = build()
        twin = student_of(layer)
        torch.testing.assert_close(twin.float_weight().double(), standardised(layer), rtol=1e-4, atol=1e-5)
        # With that weight instead of its own the float layer's convolution is the twin's.
        twin.weight_quantizer = nn.Identity()
        assert torch.equal(twin(x), layer(x))

    def test_codes_are_those_of_the_standardised_weight(self, build):
        layer, _ = build()
        twin = student_of(layer)
        expected = twin.weight_quantizer.quantize(standardised(layer).float())
        # Where float32 standardisation rounds across a tie, codes may differ by one.
        difference = (twin.weight_codes().int() - expected.flatten(1).int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01

    def test_gradients_flow_through_the_standardisation(self, build):
        layer, x = build()
        twin = student_of(layer)
        twin(x).square().sum().backward()
        # Standardised weights do not change with the scale of the latent ones: the gradient is orthogonal to them.
        centred = layer.weight - layer.weight.mean((1, 2, 3), keepdim=True)
        along = (layer.weight.grad * centred).sum((1, 2, 3))
        assert layer.weight.grad.abs().sum() > 0
        assert (along.abs() < 1e-3 * layer.weight.grad.flatten(1).norm(dim=1) * centred.flatten(1).norm(dim=1)).all()
        if hasattr(layer, "gain"):
            assert layer.gain.grad.abs().sum() > 0

    @pytest.mark.parametrize("quantizer", list_quantizers())
    def test_after_loading_codes_it_is_plain_for_good(self, build, quantizer):
        layer, x = build()
        twin = student_of(layer, quantizer=quantizer)
        with torch.no_grad():
            expected = twin(x)
            loaded = copy.deepcopy(twin)
            loaded.set_weight_codes(twin.weight_codes(), layer.weight.shape, torch.float32)
            assert torch.equal(loaded(x), expected) and torch.equal(loaded.weight_codes(), twin.weight_codes())
            # As in packed files, and through a training checkpoint.
            assert loaded.state_dict()["standardized"].tolist() == [1] == twin.packed_state()["standardized"].tolist()
            plain = loaded.dequantized()
            torch.testing.assert_close(plain(x), expected)
            assert not any("gain" in name or "standardized" in name for name in plain.state_dict())
            loaded.train()
            torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
            resumed = student_of(build()[0], quantizer=quantizer)
            resumed.load_state_dict(loaded.state_dict())
            assert torch.equal(resumed.train()(x), loaded(x))
        if hasattr(layer, "gain"):
            assert not loaded.gain.requires_grad and layer.gain.requires_grad

    def test_in_a_model_calibration_sets_the_range_of_the_standardised_weight(self, build):
        layer, x = build()
        model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(8, 2, 1))
        images = torch.randn(4, 3, x.shape[-1], x.shape[-1])
        quantize_model(model, QuantizationConfig(weight_bits=8, activation_bits=8), images)
        calibrate_model(model, [images], disable_progress=True)
        values = model[1].weight_quantizer.dequantize(model[1].weight_quantizer.quantize(model[1].float_weight()))
        error = (values - standardised(layer)).norm() / standardised(layer).norm()
        assert 0 < error < 0.02


def test_padding_of_the_quantized_input_is_zero():
    layer, x = CASES["StdConv2dSame"]()
    twin = student_of(layer)
    x = torch.zeros_like(x)
    padded = F.pad(x, (0, 1, 0, 1))
    assert torch.equal(twin(x), F.conv2d(padded, twin.quantized_weight(), None, 2))
