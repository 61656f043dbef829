"""Exported files beside their students, model by model: are the integers equal, and how many bytes do they take?

    pip install -e ".[test]"
    python benchmarks/export_models.py

Random weights with BatchNorm statistics of noise, but EfficientNet-Lite0, which has its ImageNet weights and sees
photograph crops; students are calibrated, not trained, and their ranges are then moved at random as a training would.
`codes` are those of activations that differ where each layer computes on the student's codes, with ONNX Runtime's
optimisations off, and by how much at most; `logits` the largest relative difference on equal codes, and of the file by
itself. Bytes: the `int8` file by one byte for each weight, the `packed` one by the saved student's weights.
`agreement` is the share of other photograph crops for which file, optimised, and student name the same class of 1,000;
in brackets that of the file without optimisations, and of the student with itself in float64.
"""

import argparse
import copy
import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from efficientnet_lite0 import agree, crops, photographs, pretrained
from measure import machine
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForImageClassification, ResNetConfig, ViTConfig

from sqakd_hf import QuantizationConfig, build_model, calibrate_model, export_onnx, quantize_model, quantized_layers
from sqakd_hf.quantization.quantizers import FakeQuantizer


LITE0 = "EfficientNet-Lite0, ImageNet"
HF_RESNET = ResNetConfig(
    embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000
)
HF_VIT = ViTConfig(
    hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=1000
)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm ResNet-18": lambda: build_model("timm/resnet18", 1000),
    "timm MobileNetV2": lambda: build_model("timm/mobilenetv2_100", 1000),
    "timm MobileNetV3": lambda: build_model("timm/mobilenetv3_large_100", 1000),
    LITE0: pretrained,
    "timm ConvNeXt-atto": lambda: build_model("timm/convnext_atto", 1000),
    "timm ViT-tiny": lambda: build_model("timm/vit_tiny_patch16_224", 1000),
    "transformers ViT": lambda: AutoModelForImageClassification.from_config(HF_VIT),
    "transformers ResNet": lambda: AutoModelForImageClassification.from_config(HF_RESNET),
}
SIZE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--quantizers", nargs="+", default=["lsq", "ewgs"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2])
    parser.add_argument("--agreement_images", type=int, default=500, help="photographs for the pretrained network")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    print(f"{machine()}, onnxruntime {onnxruntime.__version__}\n")
    print("| | | codes that differ | by | logits, equal codes | by itself | int8 bytes | packed bytes | agreement |")
    print("|---|---|---|---|---|---|---|---|---|")
    progress = tqdm(total=len(options.models) * len(options.quantizers) * len(options.bits), leave=False)
    for name in options.models:
        torch.manual_seed(0)
        model = MODELS[name]()
        images = torch.randn(8, 3, SIZE, SIZE)
        if name == LITE0:
            images = crops(photographs("flower", "astronaut", "coffee", "rocket"), 64, seed=1)
        else:
            see(model, images)
        for quantizer in options.quantizers:
            for bits in options.bits:
                student = student_of(model, quantizer, bits, images)
                cells = compare(student, images[:8], options.agreement_images if name == LITE0 else 0)
                tqdm.write(f"| {name} | {quantizer} W{bits}A{bits} | {' | '.join(cells)} |")
                progress.update()


def see(model: nn.Module, images: torch.Tensor) -> None:
    """Give BatchNorm the statistics of these images, all of them: else what deep layers put out fades away."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(images)


def student_of(model: nn.Module, quantizer: str, bits: int, images: torch.Tensor) -> nn.Module:
    """Return a calibrated student in eval mode, whose ranges are not where calibration put them."""
    student = copy.deepcopy(model)
    config = QuantizationConfig(quantizer, weight_bits=bits, activation_bits=bits)
    quantize_model(student, config)
    calibrate_model(student, [images], disable_progress=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, FakeQuantizer):
                for parameter in module.parameters(recurse=False):
                    parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator).clamp(-2, 2))
    return student.eval()


@torch.no_grad()
def compare(student: nn.Module, images: torch.Tensor, agreement_images: int) -> list[str]:
    """Return the cells of one line."""
    weights = sum(layer.stored_weight.numel() for layer in quantized_layers(student).values())
    with TemporaryDirectory() as folder:
        report = export_onnx(student, Path(folder) / "int8.onnx", images=images)
        packed = export_onnx(student, Path(folder) / "packed.onnx", "packed", images=images[:2], verify=False)
        student.save_pretrained(folder)
        stored = (Path(folder) / "model.safetensors").stat().st_size
        check, agreement = report.check, "-"
        if agreement_images:
            unseen = crops(photographs("china", "chelsea", "motorcycle"), agreement_images, seed=2)
            agreement = "{:.1%} ({:.1%}, {:.1%})".format(*agree(student, report.path, unseen))
        return [
            f"{sum(check.differing.values())} of {check.codes:,}",
            str(check.max_code_difference),
            f"{check.layer_logit_difference:.1e}",
            f"{check.logit_difference:.1e}",
            f"{report.file_bytes / weights:.3f}",
            f"{packed.file_bytes / stored:.3f}",
            agreement,
        ]


if __name__ == "__main__":
    main()
