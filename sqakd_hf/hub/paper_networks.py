"""The networks of the paper's tables, in timm's registry once this module is imported.

CIFAR forms: `resnet20_cifar`, `resnet32_cifar`, `vgg8_cifar`, `vgg13_cifar`. ImageNet forms from torchvision, with its
state-dict keys: `vgg11`, `resnet18` (timm's own are the same networks and keep their names), `mobilenet_v2`,
`shufflenet_v2_x0_5`, `squeezenet1_0`. Stored students state these names; one that is taken is left as it is.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import nn
from torch.nn import functional as F

from ..errors import InputError


logger = logging.getLogger(__name__)

_CIFAR = {
    "input_size": (3, 32, 32),
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
_IMAGENET = {
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}

default_cfgs = generate_default_cfgs(
    {
        "resnet20_cifar": {**_CIFAR, "first_conv": "conv1", "classifier": "fc", "num_classes": 10},
        "resnet32_cifar": {**_CIFAR, "first_conv": "conv1", "classifier": "fc", "num_classes": 10},
        "vgg8_cifar": {**_CIFAR, "first_conv": "features.0.0", "classifier": "fc", "num_classes": 100},
        "vgg13_cifar": {**_CIFAR, "first_conv": "features.0.0", "classifier": "fc", "num_classes": 100},
        "mobilenet_v2": {**_IMAGENET, "first_conv": "features.0.0", "classifier": "classifier.1", "num_classes": 1000},
        "shufflenet_v2_x0_5": {**_IMAGENET, "first_conv": "conv1.0", "classifier": "fc", "num_classes": 1000},
        "squeezenet1_0": {
            **_IMAGENET,
            "first_conv": "features.0",
            "classifier": "classifier.1",
            "num_classes": 1000,
        },
    }
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: where the shape changes, every other pixel and zeros.

    Option A of [Deep Residual Learning](https://huggingface.co/papers/1512.03385), section 4.2.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.new_channels // 2, self.new_channels - self.new_channels // 2))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: `3 * blocks` basic blocks of 16, 32 and 64 channels, `6 * blocks + 2` layers."""

    def __init__(self, blocks: int, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 32, 64)
        for stage, (before, width) in enumerate(zip((16, *widths), widths, strict=False), 1):
            first = BasicBlock(before, width, 1 if stage == 1 else 2)
            others = (BasicBlock(width, width, 1) for _ in range(blocks - 1))
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
        self.fc = nn.Linear(64, num_classes)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class CifarVGG(nn.Module):
    """VGG for 32x32 images: five groups of `convs` 3x3 convolutions with BatchNorm, one linear layer.

    After [Very Deep Convolutional Networks](https://huggingface.co/papers/1409.1556), with the single classifier that
    distillation papers use on CIFAR.
    """

    def __init__(self, convs: int, num_classes: int = 100, in_chans: int = 3):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 512
        groups, before = [], in_chans
        for width in (64, 128, 256, 512, 512):
            layers = []
            for _ in range(convs):
                layers += [nn.Conv2d(before, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            groups.append(nn.Sequential(*layers))
        self.features = nn.ModuleList(groups)
        self.fc = nn.Linear(512, num_classes)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, group in enumerate(self.features):
            x = group(x if i == 0 else F.max_pool2d(x, 2))
        return self.fc(x.mean((2, 3)))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _torchvision(name: str, num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    if in_chans != 3:
        raise InputError(f"{name} takes images of 3 channels, got in_chans={in_chans}.")
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
    model.num_classes = num_classes
    return model


def _register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a network, unless its name is taken: somebody's own, or one that timm has by now."""
    if is_model(build.__name__):
        logger.warning("timm's registry has another %r: models of that name are not sqakd_hf's.", build.__name__)
        return build
    return register_model(build)


@_register
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for CIFAR, 0.27 M parameters."""
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, blocks=3, **kwargs)


@_register
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for CIFAR, 0.46 M parameters."""
    return build_model_with_cfg(CifarResNet, "resnet32_cifar", pretrained, blocks=5, **kwargs)


@_register
def vgg8_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-8 for CIFAR, 3.9 M parameters."""
    return build_model_with_cfg(CifarVGG, "vgg8_cifar", pretrained, convs=1, **kwargs)


@_register
def vgg13_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-13 for CIFAR, 9.4 M parameters."""
    return build_model_with_cfg(CifarVGG, "vgg13_cifar", pretrained, convs=2, **kwargs)


@_register
def mobilenet_v2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """torchvision's MobileNetV2, 3.5 M parameters."""
    return build_model_with_cfg(_torchvision, "mobilenet_v2", pretrained, name="mobilenet_v2", **kwargs)


@_register
def shufflenet_v2_x0_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """torchvision's ShuffleNetV2 x0.5, 1.4 M parameters."""
    return build_model_with_cfg(_torchvision, "shufflenet_v2_x0_5", pretrained, name="shufflenet_v2_x0_5", **kwargs)


@_register
def squeezenet1_0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """torchvision's SqueezeNet 1.0, 1.2 M parameters."""
    return build_model_with_cfg(_torchvision, "squeezenet1_0", pretrained, name="squeezenet1_0", **kwargs)
