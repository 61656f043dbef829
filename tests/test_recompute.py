import contextlib
import copy

import pytest
import timm
import torch
from torch import nn

from sqakd_hf import QuantizationConfig, calibrate_model, quantize_model
from sqakd_hf.recompute import _Again, recompute_quantized


class Counting(recompute_quantized):
    """Counts the bytes that the backward keeps: each storage once, parameters apart."""

    def __init__(self, model, recompute=True):
        super().__init__()
        self.own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.recompute, self.kept, self.again = recompute, {}, 0

    def _pack(self, tensor):
        packed = super()._pack(tensor) if self.recompute else tensor
        if isinstance(packed, _Again):
            self.again += 1
        elif tensor.untyped_storage()._cdata not in self.own:
            # Held, so that no other tensor takes its place in the count.
            self.kept[tensor.untyped_storage()._cdata] = tensor
        return packed

    def bytes(self):
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def conv_net():
    layers = []
    for before, after in ((3, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


MODELS = {
    "conv net": (conv_net, 16),
    "timm resnet": (lambda: timm.create_model("test_resnet", num_classes=10), 32),
    "timm vit": (lambda: timm.create_model("test_vit", num_classes=10, img_size=32, patch_size=8), 32),
    "timm nfnet": (lambda: timm.create_model("test_nfnet", num_classes=10), 32),
}


def student_of(name, **config):
    torch.manual_seed(0)
    build, size = MODELS[name]
    model = build()
    images = torch.randn(16, 3, size, size)
    quantize_model(model, QuantizationConfig(**config))
    calibrate_model(model, [images], disable_progress=True)
    return model.train(), images


def gradients(model, images, context):
    model = copy.deepcopy(model)
    torch.manual_seed(0)  # stochastic depth
    with context:
        output = model(images)
    output.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("name", "quantizer"),
    [("conv net", "ewgs"), ("timm resnet", "lsq"), ("timm vit", "lsq+"), ("timm nfnet", "pact")],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_gradients_are_the_same_bits(name, quantizer, layout):
    model, images = student_of(name, quantizer=quantizer, attention_bits=4 if "vit" in name else None)
    images = images.contiguous(memory_format=layout)
    expected = gradients(model, images, contextlib.nullcontext())
    context = Counting(model)
    found = gradients(model, images, context)
    assert context.again >= len(expected) // 8  # it did compute again
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key


@pytest.mark.parametrize(("name", "least"), [("timm resnet", 1.4), ("timm vit", 1.3)])
def test_memory_is_that_of_the_float_network(name, least):
    torch.manual_seed(0)
    build, size = MODELS[name]
    images = torch.randn(64, 3, size, size)
    counted = {}
    for key in ("float", "normal", "low"):
        model = build().train()
        if key != "float":
            quantize_model(model, QuantizationConfig())
            calibrate_model(model, [images], disable_progress=True)
            model.train()
        with (counting := Counting(model, recompute=key == "low")):
            model(images).sum()
        counted[key] = counting.bytes()
    assert counted["normal"] > least * counted["float"]
    assert counted["low"] <= 1.02 * counted["float"]


def test_a_tensor_that_died_is_not_taken_for_a_later_one_in_its_place():
    context = recompute_quantized()
    with context:
        gone = torch.zeros(1000)
        context.remember(gone, lambda: pytest.fail("computed a tensor that nothing keeps"))
        del gone
        x = torch.randn(1000, requires_grad=True)
        others = [torch.randn(1000) for _ in range(20)]
        total = sum((x * other).sum() for other in others)
    total.backward()
    torch.testing.assert_close(x.grad, sum(others))
    assert not context._made


def test_contexts_end_with_the_forward_and_with_errors():
    from sqakd_hf import recompute

    with pytest.raises(ZeroDivisionError), recompute_quantized():
        assert len(recompute._active) == 1
        raise ZeroDivisionError
    assert recompute._active == []
