"""Tiny models that the tests share."""

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig


CLASSES = 4
IMAGE_SIZE = 16


class TinyConvNet(nn.Module):
    """Three convolutions with BatchNorm and a linear head, for images `(B, 3, 16, 16)`."""

    num_classes = CLASSES

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, groups=2),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Wrapper(nn.Module):
    """Passes its arguments on, as DataParallel and DistributedDataParallel do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


class Compiled(nn.Module):
    """Holds what it wraps where `torch.compile` does."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *args, **kwargs):
        return self._orig_mod(*args, **kwargs)


def tiny_vit() -> PreTrainedModel:
    """A native transformers ViT of two blocks, for images `(B, 3, 16, 16)`."""
    return AutoModelForImageClassification.from_config(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=IMAGE_SIZE,
            patch_size=4,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
