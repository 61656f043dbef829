"""Time of a whole SQAKD step, student and teacher, against the float32 step with cross-entropy and no teacher.

    python benchmarks/sqakd_step.py

The student is LSQ at W4A4, first and last layer at 8 bits; the teacher is the float model. The floor is the float
step with a float teacher's forward beside it: what distillation costs where quantization is free. All variants run
in one process, one step each in turn, one thread; the ratio is the median over the rounds. The last line is the
divergence of a bfloat16 teacher's distribution from the same teacher's in float64.
"""

import argparse
import copy

import torch
from measure import Step, begin, parser_of_steps
from torch import nn
from train_step import FLOAT, NETWORKS, build, student_of

from sqakd_hf import distillation_loss
from sqakd_hf.distillation.teacher import Teacher
from sqakd_hf.export.timing import interleaved, ratios


FLOOR = "floor: float32 student, float32 teacher"


def main() -> None:
    options = parser_of_steps(__doc__, list(NETWORKS)).parse_args()
    begin(options)
    for name in options.networks:
        measure(name, options)


def measure(name: str, options: argparse.Namespace) -> None:
    """Print the table of one network."""
    images, labels, model = build(name, options.device)
    teachers = teachers_of(model, torch.device(options.device))
    steps = steps_of(model, teachers, images, labels, options.bf16)
    seconds = interleaved(steps, options.rounds, options.device)
    print(f"\n{name}, batch {len(images)}: float32 step {1000 * sum(seconds[FLOAT]) / options.rounds:.0f} ms\n")
    print("| variant | time / float | ± |\n|---|---|---|")
    for row, times in seconds.items():
        median, spread = ratios(times, seconds[FLOAT])
        print(f"| {row} | {median:.3f} | {spread:.3f} |", flush=True)
    rounded = teachers["bfloat16 teacher"].predict({"pixel_values": images}, 4.0).logits
    exact = teachers["bfloat16 teacher"].models[0].double()(images.double())
    print(f"\nKL(float64 teacher, bfloat16 teacher) = {distillation_loss(rounded, exact, 1.0).item():.1e}")


def teachers_of(model: nn.Module, device: torch.device) -> dict[str, Teacher]:
    """Return the float model as teacher in several precisions."""
    return {
        "float32 teacher": Teacher([copy.deepcopy(model)], device),
        "bfloat16 teacher": Teacher([copy.deepcopy(model)], device, torch.bfloat16),
        "bfloat16 teacher in channels-last": Teacher([copy.deepcopy(model)], device, torch.bfloat16, True),
    }


def steps_of(
    model: nn.Module, teachers: dict[str, Teacher], images: torch.Tensor, labels: torch.Tensor, bf16: bool
) -> dict[str, Step]:
    """Return the steps that are compared, by the name of their row."""
    student = student_of(model, images, "lsq", 4)
    cached = teachers["float32 teacher"].predict({"pixel_values": images}, 4.0).logits
    return {
        FLOAT: Step(model, images, lambda logits: nn.functional.cross_entropy(logits, labels), bf16),
        FLOOR: Step(copy.deepcopy(model), images, learn_from(teachers["float32 teacher"], images), bf16),
        **{
            f"**sqakd_hf, {what}**": Step(copy.deepcopy(student), images, learn_from(teacher, images), bf16)
            for what, teacher in teachers.items()
        },
        "**sqakd_hf, cached logits**": Step(
            student, images, lambda logits: distillation_loss(logits, cached, 4.0), bf16
        ),
    }


def learn_from(teacher: Teacher, images: torch.Tensor):
    """Return the SQAKD loss as a function of the student's logits; the teacher runs in each call."""
    return lambda logits: distillation_loss(logits, teacher.predict({"pixel_values": images}, 4.0).logits, 4.0)


if __name__ == "__main__":
    main()
