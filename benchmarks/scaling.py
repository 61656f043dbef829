"""How the cost of an SQAKD step grows: with the size of the network, and its memory with the batch.

    python benchmarks/scaling.py

Times as in sqakd_step.py, with a float32 teacher: the share of a step that quantization adds must not grow with the
network. "saved" are the bytes that autograd keeps for the backward, here for one batch, for two and for four times
it: they must double and double again.
"""

import argparse
import copy
import logging

import torch
from measure import SavedBytes, Step, machine
from sqakd_step import learn_from
from torch import nn
from train_step import student_of

from sqakd_hf import build_model
from sqakd_hf.distillation.teacher import Teacher
from sqakd_hf.export.timing import interleaved, ratios


# Name: architecture, side of the images in pixels, batch.
NETWORKS = {
    "ResNet-18": ("timm/resnet18", 96, 8),
    "ResNet-34": ("timm/resnet34", 96, 8),
    "ResNet-50": ("timm/resnet50", 96, 8),
    "ViT-tiny": ("timm/vit_tiny_patch16_224", 96, 8),
    "ViT-small": ("timm/vit_small_patch16_224", 96, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    print(machine(), flush=True)
    heads = ("network, W4A4", "student step / float", "SQAKD step / float with teacher", "saved MiB, batch x 1, 2, 4")
    print(f"\n| {' | '.join(heads)} |\n|---|---|---|---|")
    for name in options.networks:
        architecture, size, batch = NETWORKS[name]
        torch.manual_seed(0)
        images = torch.randn(batch, 3, size, size)
        labels = torch.randint(100, (batch,))
        model = build_model(architecture, 100, image_size=size).timm_model.train()
        student = student_of(model, images, "lsq", 4)
        teacher = Teacher([copy.deepcopy(model)], torch.device("cpu"))

        def by_labels(logits: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
            return nn.functional.cross_entropy(logits, labels)

        steps = {
            "float": Step(model, images, by_labels),
            "student": Step(student, images, by_labels),
            "float with teacher": Step(copy.deepcopy(model), images, learn_from(teacher, images)),
            "SQAKD": Step(copy.deepcopy(student), images, learn_from(teacher, images)),
        }
        seconds = interleaved(steps, options.rounds)
        cells = [ratios(seconds["student"], seconds["float"]), ratios(seconds["SQAKD"], seconds["float with teacher"])]
        saved = []
        for times in (1, 2, 4):
            with SavedBytes(student) as kept:
                student(images.repeat(times, 1, 1, 1))
            saved.append(f"{kept.total / 2**20:.1f}")
        shown = [f"{median:.2f} ± {spread:.2f}" for median, spread in cells]
        print(f"| {name} | {' | '.join(shown)} | {', '.join(saved)} |", flush=True)


if __name__ == "__main__":
    main()
