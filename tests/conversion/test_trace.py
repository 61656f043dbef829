import pytest
import timm
import torch
from torch import nn

from sqakd_hf.conversion.trace import image_channels, trace_model
from sqakd_hf.layers.quantized_layer import weight_of


def trace(model, images=None):
    return trace_model(model, {n: m for n, m in model.named_modules() if weight_of(m) is not None}, images)


# Families with several stems or heads: what their metadata says, found from the pass alone.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("repvgg_a0", {}),
        ("crossvit_tiny_240", {}),
        ("fastvit_t8", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("levit_128s", {}),
        ("densenet121", {}),
        ("test_efficientnet", {}),
    ],
)
def test_first_and_last_layers_are_those_of_timms_metadata(name, options):
    model = timm.create_model(name, **options)
    stated = [model.pretrained_cfg[key] for key in ("first_conv", "classifier")]
    first, last = ({value} if isinstance(value, str) else set(value) for value in stated)
    found = trace(model)
    # FastViT's metadata leaves out nothing, but names layers by the branch.
    assert found.first == first and found.last == last


def test_multiply_accumulates_are_those_of_the_literature():
    # He et al., table 1 counts 1.8 G for ResNet-18; torchvision's 1.814 G includes the classifier.
    assert sum(trace(timm.create_model("resnet18")).macs.values()) == 1_814_073_344
    # DeiT, table 5 of the survey counts: ViT-Ti/16 1.08 G in layers, and 12 * 2 * 197² * 192 in attention.
    vit = trace(timm.create_model("vit_tiny_patch16_224"))
    assert sum(vit.attention_macs.values()) == 12 * 2 * 197**2 * 192
    assert sum(vit.macs.values()) == 196 * 768 * 192 + 12 * 197 * 12 * 192**2 + 192 * 1000


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").train()
    model.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert trace(model) is not None
    assert torch.equal(torch.get_rng_state(), state) and modes == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_that_do_not_run_are_missing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model.add_module("unused", nn.Identity())
    model.unused.extra = nn.Linear(2, 2)
    assert list(trace(model).macs) == ["0", "3"]


def test_a_model_that_takes_no_images_gives_none_and_the_reason(caplog):
    assert trace(nn.Sequential(nn.Linear(7, 2))) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "does not run on noise" in caplog.text and "mat1 and mat2" in caplog.text
    assert "Pass example images" in caplog.text
    assert trace(nn.Sequential(nn.Linear(7, 2)), torch.randn(3, 7)).macs == {"0": 14}


def test_a_skip_connection_from_the_image_makes_no_first_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 2, 1)

        def forward(self, x):
            return self.b(torch.cat([self.a(x), x], 1)).mean((2, 3))

    found = trace(Net())
    assert found.first == {"a"} and found.last == {"b"}


def test_works_without_memory():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    assert sum(trace(model).macs.values()) == 1_814_073_344


def test_caches_of_eval_mode_and_the_callers_images_are_left_alone():
    torch.manual_seed(0)
    model, other = (timm.create_model("levit_128s").eval() for _ in range(2))
    images = torch.randn(1, 3, 224, 224)
    trace(model, images)
    assert not vars(images)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images), other(images))


class FoldedStem(nn.Module):
    """Folds 2 x 2 pixels into channels before its first convolution, which has groups."""

    num_classes = 4

    def __init__(self, channels):
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.stem = nn.Conv2d(4 * channels, 8, 3, groups=4)
        self.pretrained_cfg = {"input_size": (channels, 16, 16), "first_conv": "stem"}

    def forward(self, x):
        return self.head(self.stem(nn.functional.pixel_unshuffle(x, 2)).mean((2, 3)))


class LateStem(nn.Module):
    """Has its first convolution registered behind another one, and metadata of other weights."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Conv2d(8, 8, 3)
        self.stem = nn.Conv2d(channels, 8, 3, groups=channels if 8 % channels == 0 else 1)
        self.pretrained_cfg = {"input_size": (3, 16, 16), "first_conv": "stem"}

    def forward(self, x):
        return self.body(self.stem(x)).mean((2, 3))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("kind", [FoldedStem, LateStem])
def test_channels_are_those_that_the_model_runs_on(kind, channels):
    model = kind(channels).train()
    assert image_channels(model) == channels
    assert model.training and all(module.training for module in model.modules())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert trace_model(model, layers).first == {"stem"}


def test_channels_of_a_model_on_no_device_are_those_of_its_convolution():
    with torch.device("meta"):
        assert image_channels(LateStem(4)) == 4


def test_channels_of_a_model_without_convolutions_are_three():
    assert image_channels(nn.Linear(3, 4)) == 3
