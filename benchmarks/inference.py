"""Time of inference: the float network and the student, in PyTorch and in the engines that run exported files.

    pip install -e ".[onnx,openvino]"
    python benchmarks/inference.py

A student simulates its integers in float: PyTorch gains nothing by it. `export_onnx` writes them as integers, which
ONNX Runtime and OpenVINO compute with. All variants of a network run in one process in turn, five batches each, on
`--threads` threads; a speed-up is the median over the rounds of eager float32 PyTorch's time by the variant's.
Students are calibrated on noise, not trained: times do not depend on that.
"""

import argparse
import copy
import functools
import importlib.util
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from measure import begin, parser_of_steps
from torch import nn

from sqakd_hf import QuantizationConfig, build_model, calibrate_model, export_onnx, quantize_model
from sqakd_hf.conversion.convert import dequantize_model
from sqakd_hf.export.latency import REPEATS, Run, engine_runs, export_float, repeat
from sqakd_hf.export.timing import interleaved, ratios


NETWORKS = {
    "ResNet-18": "timm/resnet18",
    "ViT-tiny": "timm/vit_tiny_patch16_224",
    "MobileNetV2": "timm/mobilenetv2_100",
    "EfficientNet-Lite0": "timm/tf_efficientnet_lite0",
    "ResNet-20": "timm/resnet20_cifar",
}
SIZES = {"ResNet-20": 32}
WITHOUT_RESIDUALS = ("ViT-tiny",)  # of convolutions
WIDTHS = (8, 4)
FLOAT = "PyTorch, float32"


def main() -> None:
    parser = parser_of_steps(__doc__, list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    options = parser.parse_args()
    begin(options)
    engines = ["onnxruntime"] + ["openvino"] * bool(importlib.util.find_spec("openvino"))
    print(", ".join(f"{name} {version(name)}" for name in engines))
    for name in options.networks:
        for batch in options.batches:
            measure(name, batch, options)


def measure(name: str, batch: int, options: argparse.Namespace) -> None:
    """Print the table of one network and batch."""
    torch.manual_seed(0)
    size = SIZES.get(name, 224)
    images = torch.randn(batch, 3, size, size)
    model = build_model(NETWORKS[name], 100, image_size=size)
    model.train()(torch.randn(8, 3, size, size))  # BatchNorm's statistics
    model.eval()
    variants: dict[str, Run] = {FLOAT: functools.partial(model, images)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        export_float(model, images, path)
        variants |= engines_of(path, images, "float32", options.threads)
        residuals = ("auto", None)[: 1 + (name not in WITHOUT_RESIDUALS)]
        kinds = [(bits, residual, "int8") for bits in WIDTHS for residual in residuals]
        for bits, residual_bits, container in [*kinds, (WIDTHS[-1], "auto", "packed")]:
            student = student_of(model, size, bits, residual_bits)
            if (bits, residual_bits, container) == (WIDTHS[-1], "auto", "int8"):
                plain = copy.deepcopy(student)
                dequantize_model(plain)
                variants[f"PyTorch, student W{bits}A{bits}"] = functools.partial(student, images)
                variants[f"PyTorch, dequantized W{bits}"] = functools.partial(plain, images)
            path = Path(folder) / f"{bits}-{residual_bits}-{container}.onnx"
            export_onnx(student, path, container, image_size=size, verify=False)
            what = f"W{bits}A{bits}" + ", residual_bits=None" * (residual_bits is None)
            what += ", packed" * (container == "packed")
            variants |= engines_of(path, images, what, options.threads)
        with torch.inference_mode():
            seconds = interleaved(
                {name: functools.partial(repeat, run) for name, run in variants.items()}, options.rounds
            )
    milliseconds = 1000 * sum(seconds[FLOAT]) / options.rounds / REPEATS
    print(f"\n{name}, {size} px, batch {batch}: float32 in PyTorch {milliseconds:.1f} ms\n\n| | speed-up |\n|---|---|")
    for variant in list(variants)[1:]:
        median, spread = ratios(seconds[FLOAT], seconds[variant])
        print(f"| {variant} | {median:.2f} ± {spread:.2f} |", flush=True)


def student_of(model: nn.Module, size: int, bits: int, residual_bits: str | None) -> nn.Module:
    """Return a calibrated student in eval mode."""
    student = copy.deepcopy(model)
    quantize_model(
        student, QuantizationConfig("lsq", weight_bits=bits, activation_bits=bits, residual_bits=residual_bits)
    )
    calibrate_model(student, [torch.randn(8, 3, size, size)], disable_progress=True)
    return student.eval()


def engines_of(path: Path, images: torch.Tensor, what: str, threads: int) -> dict[str, Run]:
    """Return what runs a file in each engine, by a line's name."""
    runs = engine_runs(path, images, threads, in_float32=what == "float32")
    return {f"{engine}, {what}": run for engine, run in runs.items()}


if __name__ == "__main__":
    main()
