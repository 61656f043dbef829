"""Time and memory of a training step with fake quantization, against the float32 step of the same model and batch.

    pip install brevitas nncf nvidia-modelopt torchao
    python benchmarks/train_step.py

A step is forward, cross-entropy, backward and SGD, without a teacher (sqakd_step.py has it); every convolution and
linear layer is quantized, the first and last included. All variants run in one process, one step each in turn, one
thread; the ratio is the median over the rounds of a variant's step by the float step of the same round. "saved" are
the bytes that autograd keeps for the backward, parameters apart. Rows of "torch.compile" compare whole compiled
models, with the compiled float model.
"""

import argparse
import copy
import functools
from collections.abc import Callable

import torch
from measure import Step, begin, parser_of_steps, without_compiler
from peers import build_peers
from torch import nn

from sqakd_hf import QuantizationConfig, build_model, calibrate_model, quantize_model
from sqakd_hf.export.timing import interleaved, ratios
from sqakd_hf.quantization.recompute import recompute_quantized


FLOAT, COMPILED_FLOAT = "float32", "torch.compile(float32)"
STUDENT, COMPILED_STUDENT = "**sqakd_hf, lsq W4A4**", "**torch.compile(sqakd_hf, lsq W4A4)**"
LOW_MEMORY = "sqakd_hf, lsq W4A4, activation_memory=low"
WITHOUT_COMPILER = "sqakd_hf, lsq W4A4, without a compiler"
# Name: architecture, side of the images in pixels, batch.
NETWORKS = {
    "ResNet-18 128 px": ("timm/resnet18", 128, 8),
    "ViT-tiny 96 px": ("timm/vit_tiny_patch16_224", 96, 32),
    "ResNet-20 32 px": ("timm/resnet20_cifar", 32, 64),
    "ResNet-50 224 px": ("timm/resnet50", 224, 64),
    "ViT-S/16 224 px": ("timm/vit_small_patch16_224", 224, 64),
    "tiny ResNet 16 px": ("timm/test_resnet", 16, 2),
    "tiny ViT 32 px": ("timm/test_vit", 32, 2),
}


def main() -> None:
    parser = parser_of_steps(__doc__, list(NETWORKS))
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--no_peers", action="store_true")
    parser.add_argument("--no_compile", action="store_true", help="leave the rows of whole compiled models out")
    options = parser.parse_args()
    begin(options)
    for name in options.networks:
        measure(name, options)


def measure(name: str, options: argparse.Namespace) -> None:
    """Print the table of one network."""
    images, labels, model = build(name, options.device)
    if options.channels_last:
        images, model = images.to(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)

    models, contexts = students(model, images)
    models, absent = {FLOAT: model, **models}, []
    for bits in () if options.no_peers else (4, 8):
        peers, missing = build_peers(model, images, bits)
        # At 8 bits only who has no 4: the cost does not depend on the width.
        models.update({row: peer for row, peer in peers.items() if bits == 4 or row.startswith("NNCF")})
        absent += [line for line in missing if bits == 4]
    if not options.no_compile:
        models.update(compiled(model, images))

    steps = steps_of(models, contexts, images, labels, options.bf16)
    seconds = interleaved(steps, options.rounds, options.device)
    saved = {row: step.saved() for row, step in steps.items()}
    unit = sum(seconds[FLOAT]) / options.rounds
    print(f"\n{name}, batch {len(images)}: float32 step {1000 * unit:.0f} ms, {saved[FLOAT] / 2**20:.1f} MiB saved\n")
    print("| variant | time / float | ± | saved / float |\n|---|---|---|---|")
    for row in models:
        reference = reference_of(row)
        median, spread = ratios(seconds[row], seconds[reference])
        print(f"| {row} | {median:.3f} | {spread:.3f} | {saved[row] / saved[reference]:.2f} |", flush=True)
    for line in sorted(set(absent)):
        print(f"\n{line}")


def build(name: str, device: str, batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    """Return a batch of noise, its labels, and the float network of that name with random weights, in train mode."""
    architecture, size, own = NETWORKS[name]
    batch = batch or own
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(100, (batch,), device=device)
    return images, labels, build_model(architecture, 100, image_size=size).timm_model.to(device).train()


def students(model: nn.Module, images: torch.Tensor) -> tuple[dict[str, nn.Module], dict[str, Callable]]:
    """Return our students of a float model by the name of their row, and the contexts that some of them run in."""
    models, contexts = {}, {}
    for method, bits in (("lsq", 4), ("ewgs", 4), ("lsq", 8)):
        models[f"**sqakd_hf, {method} W{bits}A{bits}**"] = student_of(model, images, method, bits)
    for row, context in {LOW_MEMORY: recompute_quantized, WITHOUT_COMPILER: without_compiler}.items():
        models[row], contexts[row] = student_of(model, images, "lsq", 4), context
    return models, contexts


def compiled(model: nn.Module, images: torch.Tensor, **options: object) -> dict[str, nn.Module]:
    """Return the float model and a student, each compiled as a whole with these options of `torch.compile`."""
    return {
        COMPILED_FLOAT: torch.compile(copy.deepcopy(model), **options),
        COMPILED_STUDENT: torch.compile(student_of(model, images, "lsq", 4), **options),
    }


def steps_of(
    models: dict[str, nn.Module],
    contexts: dict[str, Callable],
    images: torch.Tensor,
    labels: torch.Tensor,
    bf16: bool,
) -> dict[str, Step]:
    """Return a training step with cross-entropy for each model."""
    loss = functools.partial(nn.functional.cross_entropy, target=labels)
    return {row: Step(each, images, loss, bf16, contexts.get(row)) for row, each in models.items()}


def reference_of(row: str) -> str:
    """Return the row that a row's time is divided by."""
    return COMPILED_FLOAT if row.strip("*").startswith("torch.compile") else FLOAT


def student_of(model: nn.Module, images: torch.Tensor, method: str, bits: int) -> nn.Module:
    """Return a calibrated student with `bits` for every layer."""
    student = copy.deepcopy(model)
    config = QuantizationConfig(quantizer=method, weight_bits=bits, activation_bits=bits, residual_bits=None)
    quantize_model(student, config)
    calibrate_model(student, [images], disable_progress=True)
    return student.train()


if __name__ == "__main__":
    main()
