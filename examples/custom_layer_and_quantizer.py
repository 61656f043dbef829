"""A layer type and a quantizer of your own, in one file: quantized, saved, and reloaded in a fresh process.

    python examples/custom_layer_and_quantizer.py

Whoever loads such a student imports this file first, as they import `sqakd_hf`.
"""

import argparse
import subprocess
import sys
import tempfile

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from sqakd_hf import (
    FakeQuantizer,
    QuantizationConfig,
    QuantizedLayer,
    calibrate_model,
    quantize_model,
    register_quantized_layer,
    register_quantizer,
)


class CosineLinear(nn.Linear):
    """A linear layer on inputs of unit length: its outputs are cosines times the lengths of its rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.normalize(input, dim=-1), self.weight, self.bias)


@register_quantized_layer(CosineLinear)
class QuantizedCosineLinear(QuantizedLayer, CosineLinear):
    """What reaches the product is quantized: the input after it is normalised."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        unit = nn.functional.normalize(input, dim=-1)
        return nn.functional.linear(self.quantized_input(unit), self.quantized_weight(), self.bias)


@register_quantizer("percentile")
class PercentileQuantizer(FakeQuantizer):
    """A learned end of the range that starts where a share of the data lies within."""

    def __init__(self, *args, share: float = 0.99, **kwargs):
        super().__init__(*args, **kwargs)
        self.share = share
        self.upper = self.new_range_parameter()

    def init_range(self, x: torch.Tensor) -> None:
        rows = self.rows(x).abs()
        position = max(int(self.share * rows.shape[1]), 1)
        upper = rows.kthvalue(position, dim=1).values
        self.set_range(upper=torch.where(upper > 0, upper, 1.0))

    def clip_range(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return (-self.upper if self.signed else torch.zeros_like(self.upper)), self.upper


class CosineNetConfig(PreTrainedConfig):
    model_type = "cosine_net"
    image_size = 16


class CosineNet(PreTrainedModel):
    """A small network that ends in the custom layer."""

    config_class = CosineNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CosineNetConfig):
        super().__init__(config)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU())
        self.head = CosineLinear(32, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        features = self.body(self.stem(pixel_values)).mean((2, 3))
        return ImageClassifierOutput(logits=self.head(features))


AutoConfig.register("cosine_net", CosineNetConfig)
AutoModelForImageClassification.register(CosineNetConfig, CosineNet)


def reload(folder: str) -> None:
    """Load the student that another process saved, and compare."""
    images, expected = torch.load(f"{folder}/images.pt")
    student = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        same = torch.equal(student(images).logits, expected)
    print(f"reloaded in a fresh process: {type(student.head).__name__}, logits equal: {same}")
    sys.exit(0 if same else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reload", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reload:
        reload(options.reload)
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16)
    student = CosineNet(CosineNetConfig(num_labels=10))
    config = QuantizationConfig(quantizer="percentile", weight_bits=3, activation_bits=3)
    print(quantize_model(student, config))
    calibrate_model(student, [images], disable_progress=True)
    # Any training changes it; see run_sqakd.py for SQAKDTrainer.
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    student.train()(images).logits.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        expected = student.eval()(images).logits
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        torch.save((images, expected), f"{folder}/images.pt")
        sys.exit(subprocess.run([sys.executable, __file__, "--reload", folder]).returncode)


if __name__ == "__main__":
    main()
