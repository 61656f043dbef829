import copy

import pytest
import torch
from torch import nn

from sqakd_hf import QuantizationConfig, calibrate_model, plan_quantization, quantize_model, quantized_layers
from sqakd_hf.conversion.convert import dequantize_model
from sqakd_hf.layers.attention import QuantizedMultiheadAttention


class Exact(nn.Module):
    """A quantizer that changes nothing: what remains is the module's own arithmetic."""

    def forward(self, x):
        return x


def pair(**options):
    torch.manual_seed(0)
    float_module = nn.MultiheadAttention(8, 2, **options).eval()
    nn.init.normal_(float_module.in_proj_bias) if float_module.in_proj_bias is not None else None
    return float_module, QuantizedMultiheadAttention.from_float(float_module, Exact(), Exact())


def causal(length):
    return torch.triu(torch.full((length, length), float("-inf")), 1)


CASES = {
    "self": {},
    "cross": {"source": 7},
    "no bias": {"options": {"bias": False}},
    "batch first": {"options": {"batch_first": True}},
    "unbatched": {"batch": None},
    "unbatched, padded": {"batch": None, "padding": True},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "float mask": {"attn_mask": causal(5)},
    "boolean mask": {"attn_mask": causal(5).bool()},
    "mask per head": {"attn_mask": torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(1))},
    "padding": {"padding": True},
    "padding and mask": {"padding": True, "attn_mask": causal(5), "need_weights": False},
    "causal": {"attn_mask": causal(5), "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_computes_what_the_float_module_does(case):
    case = dict(case)
    options, batch, source = case.pop("options", {}), case.pop("batch", 3), case.pop("source", None)
    float_module, twin = pair(**options)
    shape = (5, 8) if batch is None else (batch, 5, 8) if options.get("batch_first") else (5, batch, 8)
    query = torch.randn(shape)
    key = query if source is None else torch.randn(source, batch, 8)
    value = key if source is None else torch.randn(source, batch, 8)
    if case.pop("padding", False):
        mask = torch.zeros(5, dtype=torch.bool) if batch is None else torch.zeros(batch, 5, dtype=torch.bool)
        mask[..., -2:] = True
        case["key_padding_mask"] = mask
    expected, weights = float_module(query, key, value, **case)
    output, ours = twin(query, key, value, **case)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert (ours is None) == (weights is None)
    if ours is not None:
        torch.testing.assert_close(ours, weights, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x.mean(1))


def test_both_projections_and_the_products_are_quantized():
    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(8, 3, 16, 16)
    expected = model(images)
    student = copy.deepcopy(model)
    plan = quantize_model(student, QuantizationConfig(weight_bits=8, activation_bits=8, attention_bits=8))
    assert [(layer.name, layer.num_weights) for layer in plan.quantized] == [
        ("stem", 384),
        ("attention", 192),
        ("attention.out_proj", 64),
        ("head", 32),
    ]
    assert [(line.name, line.activation_bits) for line in plan.attention] == [("attention", 8)]
    calibrate_model(student, [images], disable_progress=True)
    error = (student.eval()(images) - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    # 224 px: 56 * 56 tokens, by 3 * 8 * 8 and 8 * 8 weights.
    assert [layer.macs for layer in plan][1:3] == [56**2 * 192, 56**2 * 64]
    assert plan.attention[0].macs == 2 * 56**4 * 8


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8, "vdim": 6}])
def test_forms_that_are_not_computed_stay_in_float_with_all_their_layers(options):
    torch.manual_seed(0)

    class Cross(Net):
        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2)
            x, _ = self.attention(x, x, x[..., : self.attention.vdim], need_weights=False)
            return self.head(x.mean(1))

    plan = plan_quantization(Cross(**options), QuantizationConfig(), torch.randn(1, 3, 16, 16))
    assert [layer.name for layer in plan.quantized] == ["stem", "head"]
    assert "attention.out_proj" in [layer.name for layer in plan.skipped]


def test_dequantizing_gives_both_projections_back():
    torch.manual_seed(0)
    model, images = Net(), torch.randn(4, 3, 32, 32)
    quantize_model(model, QuantizationConfig(weight_bits=4, activation_bits=None), images)
    calibrate_model(model, [images], disable_progress=True)
    with torch.no_grad():
        expected = model.eval()(images)
        dequantize_model(model)
        assert not quantized_layers(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)  # other kernels
