"""`residual_bits`: what residual connections add, and pooling takes, is quantized where it is made."""

import copy
import io

import pytest
import timm
import torch
from torch import nn

from sqakd_hf import (
    FakeQuantizer,
    InputError,
    QuantizationConfig,
    calibrate_model,
    list_quantizers,
    plan_quantization,
    quantize_model,
)
from sqakd_hf.conversion.convert import dequantize_model
from tests.helpers.training import make_trainer


class Block(nn.Module):
    """A residual block in one of several styles."""

    def __init__(self, style):
        super().__init__()
        self.style = style
        self.conv, self.norm, self.act = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()

    def forward(self, x):
        shortcut = x
        x = self.norm(self.conv(x))
        if self.style == "iadd":
            x += shortcut
        elif self.style == "add":
            x = torch.add(x, shortcut)
        elif self.style == "keyword":
            x = torch.add(x, other=shortcut)
        elif self.style == "shared act":
            x = self.norm.bias[:, None, None] * 0 + self.act(x)  # an output of no module
            return self.act(x + shortcut)
        else:
            x = x + shortcut
        return self.act(x)


class Net(nn.Module):
    num_classes = 4

    def __init__(self, *styles):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(*map(Block, styles))
        self.head = nn.Linear(6, 4)

    def forward(self, pixel_values):
        return self.head(self.blocks(self.stem(pixel_values)).mean((2, 3)))


def images(count=6, size=16, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def student_of(model, **config):
    plan = quantize_model(model, QuantizationConfig(**{"residual_bits": 8, **config}))
    calibrate_model(model, [images()], disable_progress=True)
    return model.eval(), plan


@pytest.mark.parametrize("style", ["add", "iadd", "operator", "keyword"])
def test_operands_and_sums_that_go_on_are_quantized_where_they_are_made(style):
    model = Net(style, style)
    plan = plan_quantization(model, QuantizationConfig(residual_bits=7, quantizer="ewgs"))
    names = ["blocks.0.norm", "stem", "blocks.0.act", "blocks.1.norm"]
    assert [line.name for line in plan.residuals] == names
    assert {(line.activation_bits, line.quantizer, line.skipped) for line in plan.residuals} == {(7, "ewgs", None)}
    assert "4 added or pooled feature maps at A7" in plan.summary()
    assert str(plan).count("  output\n") == 4


def test_the_forward_is_that_of_the_float_blocks_with_quantizers_between():
    model, _ = student_of(Net("iadd", "operator"), weight_bits=4, activation_bits=4)
    x = images(3, seed=5)
    with torch.no_grad():
        logits = model(x)
        stem, (one, two) = model.stem, model.blocks
        hidden = stem.output_quantizer(type(stem).__mro__[2].forward(stem, x))
        branch = one.norm.output_quantizer(
            nn.functional.batch_norm(
                one.conv(hidden), one.norm.running_mean, one.norm.running_var, one.norm.weight, one.norm.bias
            )
        )
        hidden = one.act.output_quantizer((branch + hidden).relu())
        branch = two.norm.output_quantizer(
            nn.functional.batch_norm(
                two.conv(hidden), two.norm.running_mean, two.norm.running_var, two.norm.weight, two.norm.bias
            )
        )
        expected = model.head((branch + hidden).relu().mean((2, 3)))
    assert torch.equal(logits, expected)
    for quantizer in (stem.output_quantizer, one.act.output_quantizer):
        assert quantizer.bits == 8 and quantizer.calibrated


def test_each_range_has_a_gradient_and_the_trainer_learns_it(tmp_path):
    trainer = make_trainer(tmp_path, lambda: Net("iadd", "add"), {"residual_bits": 3}, size=16)
    trainer.calibrate()
    ranges = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "output_quantizer" in n}
    assert len(ranges) == 4
    trainer.train()
    assert all(not torch.equal(p, trainer.model.get_parameter(n)) for n, p in ranges.items())
    group = trainer.optimizer.param_groups[-1]
    ids = {id(p) for p in group["params"]}
    assert all(id(trainer.model.get_parameter(n)) in ids for n in ranges) and group["weight_decay"] == 0


@pytest.mark.parametrize("quantizer", list_quantizers())
def test_calibration_by_batch_statistics_keeps_the_range_of_a_norms_output(quantizer):
    """The statistics that come back afterwards are the norm's own, not what its quantizer holds in buffers."""
    model = Net("add")
    quantize_model(model, QuantizationConfig(quantizer))
    calibrate_model(model, [images()], disable_progress=True)
    found = model.blocks[0].norm.output_quantizer
    assert all(torch.isfinite(tensor).all() for tensor in found.range_tensors().values())
    again = copy.deepcopy(found)
    again.load_state_dict(found.state_dict())
    assert again.signed is found.signed is True and again.calibrated


def test_copies_pickles_and_the_way_back_to_float():
    float_model = Net("iadd", "add").eval()
    model, _ = student_of(copy.deepcopy(float_model), weight_bits=8, activation_bits=8)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = images(2, seed=3)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(x), model(x))
        dequantize_model(model)
        assert not any(isinstance(module, FakeQuantizer) for module in model.modules())
        assert [type(module) for module in model.modules()] == [type(module) for module in float_model.modules()]
        torch.testing.assert_close(model(x), float_model(x), rtol=0.1, atol=0.1)


def test_what_no_module_puts_out_stays_in_float_with_the_reason(caplog):
    plan = quantize_model(Net("shared act"), QuantizationConfig(residual_bits=8))
    lines = {line.name: line.skipped for line in plan.residuals}
    assert lines == {"blocks.0": "it adds what is the output of no module of its own", "stem": None}
    assert "blocks.0 (it adds what is the output of no module of its own)" in caplog.text


def test_modules_that_are_not_to_be_converted_are_left_alone():
    plan = plan_quantization(Net("add", "add"), QuantizationConfig(residual_bits=8, modules_to_not_convert=["norm"]))
    assert [line.skipped is None for line in plan.residuals] == [False, True, True, False]


def test_without_an_addition_of_convolutions_it_is_refused():
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), timm.create_model("test_vit")):
        with pytest.raises(InputError, match="residual_bits is set, but no convolutions' feature maps that are added"):
            quantize_model(model, QuantizationConfig(residual_bits=8))


@pytest.mark.parametrize("bits", [0, 9, True, "8"])
def test_bits_are_checked(bits):
    with pytest.raises(InputError, match=r"^residual_bits \('auto': 8 where there are any; None: in float\)"):
        QuantizationConfig(residual_bits=bits)


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "mobilenetv2_050", "regnetx_002"])
def test_networks_of_timm(name):
    model = timm.create_model(name, num_classes=4)
    plan = plan_quantization(model, QuantizationConfig(residual_bits=8))
    assert plan.residuals and all(line.skipped is None for line in plan.residuals)
    # Batch norms at the end of a branch, the sums, and what the first shortcut passes on.
    assert {line.layer_type for line in plan.residuals} <= {
        "BatchNorm2d",
        "BatchNormAct2d",
        "ReLU",
        "MaxPool2d",
        "InvertedResidual",
        "ReLU6",  # before pooling
    }


def test_a_module_that_was_converted_afterwards_is_found_out(tmp_path):
    trainer = make_trainer(tmp_path, lambda: Net("iadd", "add"), {"residual_bits": 8}, size=16)
    trainer.calibrate()
    trainer.model = trainer.model_wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(trainer.model)
    with pytest.raises(InputError, match=r"'blocks.0.norm' \(now SyncBatchNorm"):
        trainer.train()


class TestAuto:
    """8 bits for what a convolution puts out by itself, which gives it an integer kernel; sums stay in float."""

    def test_it_is_the_default_and_takes_what_convolutions_put_out(self):
        plan = plan_quantization(Net("iadd", "add"), QuantizationConfig())
        assert [(line.name, line.activation_bits) for line in plan.residuals] == [
            ("blocks.0.norm", 8),
            ("stem", 8),
            ("blocks.1.norm", 8),
        ]

    def test_float_activations_are_left_in_float(self):
        assert not plan_quantization(Net("add"), QuantizationConfig(activation_bits=None)).residuals

    def test_what_can_not_be_quantized_was_not_asked_for(self, caplog):
        plan = quantize_model(Net("shared act"), QuantizationConfig())
        assert [line.name for line in plan.residuals] == ["stem"] and "Left in float" not in caplog.text

    def test_a_network_without_such_maps_is_quantized_without(self):
        assert not quantize_model(timm.create_model("test_vit"), QuantizationConfig()).residuals
        assert not quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))).residuals

    def test_a_saved_config_without_the_field_is_of_a_time_without_it(self):
        saved = QuantizationConfig().to_dict()
        assert saved.pop("residual_bits") == "auto"
        assert QuantizationConfig.from_dict(saved).residual_bits is None
        assert QuantizationConfig.from_dict({}).residual_bits == "auto"


def pooling(norm, act, pool):
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), norm, act, pool, nn.Flatten(), nn.Linear(6, 4))


class Mean(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.args, self.kwargs = args, kwargs

    def forward(self, x):
        return x.mean(*self.args, **self.kwargs)


@pytest.mark.parametrize(
    ("act", "pool", "name"),
    [
        (nn.ReLU(), nn.AdaptiveAvgPool2d(1), "3"),
        (nn.ReLU6(inplace=True), Mean((2, 3)), "3"),
        (nn.Identity(), Mean(dim=(-2, -1), keepdim=True), "2"),
        (nn.Hardtanh(), nn.AvgPool2d(12), "3"),
        (nn.ReLU(), nn.AvgPool2d(2), None),  # no global pooling
        (nn.ReLU(), Mean(1, keepdim=True), None),  # of channels
        (nn.SiLU(), nn.AdaptiveAvgPool2d(1), None),  # no engine computes it along with the convolution
    ],
)
def test_a_convolution_before_global_pooling_puts_out_integers(act, pool, name):
    model = pooling(nn.BatchNorm2d(6), act, pool)
    model[5] = nn.Flatten(1)
    model[6] = nn.LazyLinear(4)
    model(images())
    plan = quantize_model(model, QuantizationConfig(), images())
    assert [line.name for line in plan.residuals] == ([] if name is None else [name])
