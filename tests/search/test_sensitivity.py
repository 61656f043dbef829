"""`sensitivity`: one place is quantized at a time, the rest of the network is the float one."""

import copy
import json
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sqakd_hf import InputError, QuantizationConfig, create_quantizer, quantize_model, sensitivity
from sqakd_hf.search import prefix as prefix_module
from sqakd_hf.search import sensitivity as sensitivity_module
from tests.helpers.models import TinyConvNet, tiny_vit


def images(count=40, size=16, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def conv_net():
    """A network whose BatchNorms have seen images."""
    torch.manual_seed(0)
    model = TinyConvNet()
    model.train()(images())
    return model.eval()


def measure(model, count=40, size=16, **options):
    return sensitivity(model, images(count, size), disable_progress=True, **options)


def of(report, name, kind, bits):
    (error,) = [e for e in report.errors if (e.name, e.kind, e.bits) == (name, kind, bits)]
    return error


def compared(found, expected):
    """KL divergence and agreement by their definitions, with standard errors."""
    kl = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="none", log_target=True).sum(1).double()
    same = (found.argmax(1) == expected.argmax(1)).double()
    return [value for x in (kl, same) for value in (x.mean().item(), (x.std() / math.sqrt(len(x))).item())]


def ranged(role, x, bits, name="lsq", **options):
    quantizer = create_quantizer(name, bits=bits, role=role, **options)
    quantizer.first_range = "error"
    quantizer.init_range(x)
    return quantizer


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_weight_alone(bits):
    model, x = conv_net(), images()
    report = measure(model, widths=[bits])
    changed = copy.deepcopy(model)
    weight = changed.body[0].weight
    with torch.no_grad():
        weight.copy_(ranged("weight", weight, bits, channel_axis=0, num_channels=len(weight))(weight))
        expected = compared(changed(x), model(x))
    error = of(report, "body.0", "weight", bits)
    assert [error.kl, error.kl_error, error.agreement, error.agreement_error] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 8])
def test_an_input_alone(bits):
    model, x = conv_net(), images()
    report = measure(model, widths=[bits])
    changed, seen = copy.deepcopy(model), []
    quantizers = []

    def quantize(_module, args):
        if not quantizers:  # on the first 32 images
            quantizers.append(ranged("activation", args[0], bits, "lsq+", signed=bool(args[0].amin() < 0)))
        seen.append(len(args[0]))
        return (quantizers[0](args[0]),)

    changed.body[3].register_forward_pre_hook(quantize)
    with torch.no_grad():
        found = torch.cat([changed(x[:32]), changed(x[32:])])
        expected = compared(found, model(x))
    error = of(report, "body.3", "input", bits)
    assert seen == [32, 8]
    assert [error.kl, error.kl_error, error.agreement, error.agreement_error] == pytest.approx(expected, abs=1e-6)


class Dense(nn.Module):
    """What the first layer puts out is read again behind the second."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.three, self.head = nn.Conv2d(12, 6, 3), nn.Linear(6, 4)

    def forward(self, pixel_values):
        x = self.one(pixel_values)
        return self.head(self.three(torch.cat([x, self.two(x)], 1)).relu().mean((2, 3)))


MODELS = {
    "conv net": (conv_net, {}),
    "dense": (Dense, {}),
    "resnet": (lambda: timm.create_model("test_resnet", num_classes=5), {}),
    "vit": (tiny_vit, {"attention_bits": 8}),
}


class Products(TorchFunctionMode):
    """Counts the products that layers compute."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.conv2d, F.conv2d, F.linear)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_in_front_is_skipped_and_changes_nothing(name, monkeypatch):
    build, config = MODELS[name]
    torch.manual_seed(0)
    model, size = build().eval(), 32 if name == "resnet" else 16
    config = QuantizationConfig(weight_bits=4, activation_bits=4, **config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with Products() as skipping:
        report = measure(model, 34, size, config=config, widths=[3])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    real = prefix_module.Prefix
    monkeypatch.setattr(sensitivity_module, "Prefix", lambda units, *rest: real([], *rest))
    with Products() as running:
        assert measure(model, 34, size, config=config, widths=[3]) == report
    assert running.count > 1.2 * skipping.count or name in ("conv net", "dense")  # too few layers to gain by it
    kinds = {error.kind for error in report.errors}
    assert {"weight", "input"} <= kinds and ("attention" in kinds) is (name == "vit")
    assert ("output" in kinds) is (name in ("conv net", "resnet"))


def test_dense_connections_are_not_skipped():
    model = Dense().eval()
    units = sensitivity_module.find_units(model, ["one", "two", "three", "head"], {"pixel_values": images(5)})
    chunks = sensitivity_module.Images(images(4), model)
    with torch.no_grad():
        whole = [bool(prefix_module.Prefix(units[:n], model, chunks)._names) for n in range(len(units))]
    assert whole[:3] == [False, True, False]  # none; before `two`; `three` reads `one` as well


def test_a_channel_out_of_proportion_is_named_first():
    model = conv_net()
    with torch.no_grad():  # ReLU passes a factor on: the network computes what it did
        model.stem[1].weight[2] *= 500
        model.stem[1].bias[2] *= 500
        model.body[0].weight[:, 2] /= 500
    report = measure(model, widths=[8, 4])
    for bits in (8, 4):
        assert (report.ranked(bits)[0].name, report.ranked(bits)[0].kind) == ("body.0", "input")
    assert report.keep_high(8)[0] == report.ranked(8)[0] and "keep these high" in str(report)


def test_fewer_bits_cost_more_and_the_table_says_it():
    report = measure(conv_net(), widths=[2, 4, 8])
    for error in report.ranked(2):
        assert error.kl > of(report, error.name, error.kind, 8).kl
    ranked = report.ranked()
    assert [e.bits for e in ranked] == [8] * len(ranked) and ranked == sorted(ranked, key=lambda e: -e.kl)
    lines = str(report).splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [[e.name, e.kind] for e in ranked]
    assert json.loads(json.dumps(report.to_dict()))["errors"][0]["kind"] == "weight"
    high = report.keep_high()
    assert sum(e.kl for e in high) >= 0.8 * sum(e.kl for e in ranked) > sum(e.kl for e in high[:-1])


def test_what_the_config_leaves_in_float_is_no_place():
    config = QuantizationConfig(weight_bits=4, activation_bits=None, modules_to_not_convert=["body"])
    assert {(e.name, e.kind) for e in measure(conv_net(), config=config, widths=[4]).errors} == {
        ("stem.0", "weight"),
        ("head", "weight"),
    }


class TwoHeads(nn.Module):
    """A network with a second head, of other classes."""

    def __init__(self):
        super().__init__()
        self.net, self.other = conv_net(), nn.Linear(8, 3)

    def forward(self, pixel_values):
        stem = self.net.stem(pixel_values)
        return {"a": self.net(pixel_values), "b": self.other(stem.mean((2, 3)))}


def test_of_several_heads_one_is_compared():
    torch.manual_seed(0)
    model = TwoHeads().eval()
    for field, silent in (("a", "other"), ("b", "net.head")):
        report = measure(model, widths=[2], output_field=field)
        assert of(report, silent, "weight", 2).kl == 0 < of(report, "net.stem.0", "weight", 2).kl
    with pytest.raises(InputError, match="output_field"):
        measure(model, widths=[2])


def test_interrupted_and_resumed_is_never_interrupted(tmp_path, monkeypatch):
    whole, path = measure(conv_net(), widths=[2, 8]), tmp_path / "sensitivity.json"
    real, calls = sensitivity_module._compare, []

    def interrupted(*args):
        calls.append(args[-1].name)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sensitivity_module, "_compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(conv_net(), widths=[2, 8], progress_file=path)
    kept = len(json.loads(path.read_text())["errors"])
    assert kept == 3  # places of two widths
    assert measure(conv_net(), widths=[2, 8], progress_file=path) == whole
    assert len(calls) == 7 + len(whole.errors) - 2 * kept
    assert measure(conv_net(), widths=[2, 8], progress_file=path) == whole
    assert len(calls) == 7 + len(whole.errors) - 2 * kept and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_of_another_run_is_refused(tmp_path):
    path = tmp_path / "sensitivity.json"
    measure(conv_net(), widths=[2], progress_file=path)
    with pytest.raises(InputError, match="of another run, with other widths"):
        measure(conv_net(), widths=[3], progress_file=path)
    with pytest.raises(InputError, match="of another run, with other images"):
        measure(conv_net(), count=39, widths=[2], progress_file=path)
    path.write_text("[]")
    with pytest.raises(InputError, match="is no file of a sensitivity"):
        measure(conv_net(), widths=[2], progress_file=path)
    with pytest.raises(InputError, match="The folder .* does not exist"):
        measure(conv_net(), widths=[2], progress_file=tmp_path / "none" / "a.json")


def test_what_can_not_be_measured_is_refused():
    with pytest.raises(InputError, match="There are no images"):
        sensitivity(conv_net(), images(0), disable_progress=True)
    for widths, message in (([], "at least one number of bits"), ([0], "widths"), ([9], "widths")):
        with pytest.raises(InputError, match=message):
            measure(conv_net(), widths=widths)
    student = conv_net()
    quantize_model(student, QuantizationConfig())
    with pytest.raises(InputError, match="quantized already"):
        measure(student)
