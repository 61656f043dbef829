"""Time of inference in PyTorch: the float model, the student as it was trained, and the student dequantized.

    python benchmarks/inference.py

A student simulates its integers in float: PyTorch gains nothing by it, and this is what it costs. Dequantized, it is
the float network with quantized weights (and unquantized activations). All variants run in one process, one batch
each in turn, one thread, in eval mode and without gradients; the ratio is the median over the rounds.
"""

import argparse
import copy
import functools

import torch
from measure import begin, interleaved, parser_of_steps, ratios
from train_step import FLOAT, NETWORKS, student_of

from sqakd_hf import build_model
from sqakd_hf.convert import dequantize_model


BATCHES = (1, 32)
SIZE = 224


def main() -> None:
    options = parser_of_steps(__doc__, list(NETWORKS)).parse_args()
    begin(options)
    print("\nLSQ W4A4\n\n| network | batch | float32 ms | student / float | dequantized / float |")
    print("|---|---|---|---|---|", flush=True)
    for name in options.networks:
        for batch in BATCHES:
            measure(name, batch, options)


def measure(name: str, batch: int, options: argparse.Namespace) -> None:
    """Print the row of one network and batch."""
    torch.manual_seed(0)
    size = SIZE if "32 px" not in name else 32  # a network for small images
    images = torch.randn(batch, 3, size, size, device=options.device)
    model = build_model(NETWORKS[name][0], 100, image_size=size).timm_model.to(options.device)
    student = student_of(model, torch.randn(4, 3, size, size, device=options.device), "lsq", 4).eval()
    plain = copy.deepcopy(student)
    dequantize_model(plain)
    variants = {FLOAT: model.eval(), "student": student, "dequantized": plain}
    with torch.inference_mode(), torch.autocast(torch.device(options.device).type, torch.bfloat16, options.bf16):
        steps = {row: functools.partial(variant, images) for row, variant in variants.items()}
        seconds = interleaved(steps, options.rounds, options.device)
    cells = [f"{1000 * sum(seconds[FLOAT]) / options.rounds:.0f}"]
    for row in ("student", "dequantized"):
        median, spread = ratios(seconds[row], seconds[FLOAT])
        cells.append(f"{median:.2f} ± {spread:.2f}")
    print(f"| {name.split(' ')[0]} {size} px | {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
