import contextlib
import copy

import pytest
import timm
import torch
from torch import nn

from sqakd_hf import QuantizationConfig, calibrate_model, create_quantizer, quantize_model
from sqakd_hf.quantization.recompute import _Again, recompute_quantized


class Counting(recompute_quantized):
    """Counts the bytes that the backward keeps: each storage once, parameters apart."""

    def __init__(self, model, recompute=True):
        super().__init__()
        self.own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.recompute, self.kept, self.again = recompute, {}, 0

    def _pack(self, tensor):
        packed = super()._pack(tensor)
        if isinstance(packed, _Again) and self.recompute:
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
            quantize_model(model, QuantizationConfig(residual_bits=None))
            calibrate_model(model, [images], disable_progress=True)
            model.train()
        with (counting := Counting(model, recompute=key == "low")):
            model(images).sum()
        counted[key] = counting.bytes()
    assert counted["normal"] > least * counted["float"]
    assert counted["low"] <= 1.02 * counted["float"]


class TestChangesInPlace:
    @pytest.mark.parametrize(
        ("name", "size", "options"),
        [
            ("test_resnet", 32, {"residual_bits": 8}),
            ("mobilenetv2_050", 32, {"residual_bits": 8}),
            ("test_efficientnet", 32, {}),
            ("test_vit", 160, {"attention_bits": 8}),
            ("test_convnext", 32, {}),
            ("levit_128s", 224, {"attention_bits": 8}),
        ],
    )
    def test_gradients_are_the_same_bits_wherever_networks_add_and_activate_in_place(self, name, size, options):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
        images = torch.randn(2, 3, size, size)
        config = QuantizationConfig(weight_bits=4, activation_bits=4, **options)
        quantize_model(model, config, images)
        calibrate_model(model, [images], disable_progress=True)
        model.train()
        expected = gradients(model, images, contextlib.nullcontext())
        for key, gradient in gradients(model, images, recompute_quantized()).items():
            assert torch.equal(gradient, expected[key]), key

    @pytest.mark.parametrize(
        "change",
        [
            lambda y: y.add_(1),
            lambda y: y.relu_(),
            lambda y: y.sigmoid_(),
            lambda y: nn.functional.silu(y, inplace=True),
            lambda y: y[1:].mul_(2),  # a view
            lambda y: y.detach().neg_(),  # beside autograd, whose version counts all the same
            lambda y: y.view(-1)[0].zero_(),
        ],
    )
    @pytest.mark.parametrize("earlier", [False, True])
    def test_of_an_output_count_from_the_operation_that_saves_it(self, change, earlier):
        def run(context):
            torch.manual_seed(0)
            quantizer = create_quantizer("lsq", bits=3, role="activation")
            x, weight = torch.randn(2, 6, 6).unbind()
            x.requires_grad_(), weight.requires_grad_()
            quantizer.init_range(x)
            with context:
                y = quantizer(x)
                before = y * 2 @ weight if earlier else 0  # not a kind that keeps `y`
                change(y)
                (y @ weight * y + before).sum().backward()
            return x.grad, weight.grad, quantizer.scale.grad

        for expected, found in zip(run(contextlib.nullcontext()), run(recompute_quantized()), strict=True):
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("needs_gradient", [True, False])
    def test_of_what_it_needs_are_an_error_instead_of_other_gradients(self, needs_gradient):
        quantizer = create_quantizer("dorefa", bits=3, role="activation")
        x, weight = torch.randn(8, requires_grad=needs_gradient), torch.randn(8, requires_grad=True)
        quantizer.init_range(x)
        with recompute_quantized():
            x = x * 2
            y = quantizer(x) * weight
            x.add_(1)
        with pytest.raises(RuntimeError, match="changed in place after it was used"):
            y.sum().backward()


def test_a_tensor_that_died_is_not_taken_for_a_later_one_in_its_place():
    context = recompute_quantized()
    with context:
        gone = torch.zeros(1000)
        context.remember(gone, torch.zeros(1), lambda _: pytest.fail("computed a tensor that nothing keeps"))
        del gone
        x = torch.randn(1000, requires_grad=True)
        others = [torch.randn(1000) for _ in range(20)]
        total = sum((x * other).sum() for other in others)
    total.backward()
    torch.testing.assert_close(x.grad, sum(others))
    assert not context._made


def test_contexts_end_with_the_forward_and_with_errors():
    from sqakd_hf.quantization import recompute

    with pytest.raises(ZeroDivisionError), recompute_quantized():
        assert len(recompute._active) == 1
        raise ZeroDivisionError
    assert recompute._active == []
