"""Distil a low-bit segmentation model, without labels: per-pixel distributions instead of one an image.

    python examples/segmentation.py

Runs offline in minutes on a CPU: a small Segformer learns to find shapes on photographs, then its quantized copy
learns from it, from images alone. Label maps of the test images only serve to report accuracy.
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

from sqakd_hf import (
    ImageCollator,
    InputError,
    QuantizationConfig,
    SQAKDTrainer,
    SQAKDTrainingArguments,
    quantize_model,
)
from sqakd_hf.outputs.forward import predict


CLASSES = ("background", "disk", "square", "triangle")
SIZE = 64


class ShapesOnPhotographs(Dataset):
    """Crops of two photographs with one or two shapes of random colour; the same image for the same index.

    Args:
        count (`int`): Number of images.
        seed (`int`): Other seeds give other images.
        labelled (`bool`, *optional*, defaults to `True`): Yield `labels` `(64, 64)` beside `pixel_values`.
    """

    def __init__(self, count: int, seed: int, labelled: bool = True):
        self.count, self.seed, self.labelled = count, seed, labelled
        self.photographs = load_sample_images().images

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng((self.seed, index))
        photograph = self.photographs[random.integers(len(self.photographs))]
        top, left = (random.integers(side - SIZE) for side in photograph.shape[:2])
        image = photograph[top : top + SIZE, left : left + SIZE].astype(np.float32) / 127.5 - 1
        labels = np.zeros((SIZE, SIZE), dtype=np.int64)
        rows, columns = np.mgrid[:SIZE, :SIZE]
        for _ in range(random.integers(1, 3)):
            kind = random.integers(1, len(CLASSES))
            radius = random.integers(9, 18)
            y, x = random.integers(radius, SIZE - radius, 2)
            dy, dx = rows - y, columns - x
            inside = {
                1: dy**2 + dx**2 <= radius**2,
                2: np.maximum(abs(dy), abs(dx)) <= radius * 0.8,
                3: (dy <= radius * 0.8) & (2 * abs(dx) <= dy + radius),
            }[int(kind)]
            image[inside] = random.uniform(-1, 1, 3)
            labels[inside] = kind
        item = {"pixel_values": torch.from_numpy(image).permute(2, 0, 1)}
        return {**item, "labels": torch.from_numpy(labels)} if self.labelled else item


def build_teacher() -> SegformerForSemanticSegmentation:
    """A small Segformer with random weights."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_labels=len(CLASSES),
            id2label=dict(enumerate(CLASSES)),
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 32, 48, 64],
            decoder_hidden_size=64,
            num_attention_heads=[1, 2, 3, 4],
            hidden_dropout_prob=0.0,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
        )
    )


def accuracies(model: torch.nn.Module, data: Dataset, teacher: torch.nn.Module | None = None) -> dict[str, float]:
    """Return pixel accuracy and mean intersection over union on labelled data, and pixel agreement with `teacher`."""
    model.eval()
    counts = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
    agreed, pixels = 0, 0
    with torch.no_grad():
        for start in range(0, len(data), 64):
            batch = ImageCollator()([data[i] for i in range(start, min(start + 64, len(data)))])
            found = predict(model, batch)
            whole = F.interpolate(found.logits, (SIZE, SIZE), mode="bilinear", align_corners=False).argmax(1)
            counts += torch.bincount(
                (batch["labels"] * len(CLASSES) + whole).flatten(), minlength=len(CLASSES) ** 2
            ).view_as(counts)
            if teacher is not None:
                agreed += int((found.classes() == predict(teacher, batch).classes()).sum())
                pixels += found.classes().numel()
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    result = {
        "pixel accuracy": (counts.diag().sum() / counts.sum()).item(),
        "mean IoU": (counts.diag() / union.clamp(min=1)).mean().item(),
    }
    return result if teacher is None else {**result, "agreement": agreed / pixels}


def plot(path: Path, data: Dataset, models: dict[str, torch.nn.Module], count: int = 6) -> None:
    """Draw test images, their labels and what each model sees."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batch = ImageCollator()([data[i] for i in range(count)])
    columns = {"image": batch["pixel_values"].permute(0, 2, 3, 1) / 2 + 0.5, "labels": batch["labels"]}
    with torch.no_grad():
        columns.update({name: predict(model.eval(), batch).classes() for name, model in models.items()})
    figure, axes = plt.subplots(count, len(columns), figsize=(1.7 * len(columns), 1.6 * count), squeeze=False)
    for row, line in enumerate(axes):
        for axis, (name, pictures) in zip(line, columns.items(), strict=True):
            axis.imshow(pictures[row].numpy(), vmin=0, vmax=len(CLASSES) - 1, cmap="viridis", interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="segmentation-output")
    parser.add_argument("--weight_bits", type=int, default=2)
    parser.add_argument("--activation_bits", type=int, default=2)
    parser.add_argument("--attention_bits", type=int, default=None)
    parser.add_argument("--train_images", type=int, default=2000)
    parser.add_argument("--test_images", type=int, default=300)
    parser.add_argument("--teacher_epochs", type=float, default=25)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    common = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "report_to": "none",
        "seed": options.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_strategy": "epoch",
    }
    output = Path(options.output_dir)
    test = ShapesOnPhotographs(options.test_images, seed=options.seed + 1)

    teacher = build_teacher()
    Trainer(
        teacher,
        TrainingArguments(
            str(output), num_train_epochs=options.teacher_epochs, learning_rate=3e-3, warmup_steps=60, **common
        ),
        data_collator=ImageCollator(),
        train_dataset=ShapesOnPhotographs(options.train_images, seed=options.seed),
    ).train()
    teacher.eval().to("cpu")

    student = copy.deepcopy(teacher)
    config = QuantizationConfig(
        weight_bits=options.weight_bits,
        activation_bits=options.activation_bits,
        attention_bits=options.attention_bits,
    )
    print(quantize_model(student, config, test[0]["pixel_values"][None]).coverage())
    unlabelled = ShapesOnPhotographs(options.train_images, seed=options.seed, labelled=False)
    trainer = SQAKDTrainer(
        student,
        teacher,
        SQAKDTrainingArguments(
            str(output), num_train_epochs=options.epochs, learning_rate=1e-3, freeze_batch_norm=False, **common
        ),
        train_dataset=unlabelled,
    )
    trainer.calibrate()
    rows = {"teacher": accuracies(teacher.to("cpu"), test, teacher)}
    rows[f"{config_name(options)}, calibrated"] = accuracies(student.to("cpu"), test, teacher)
    trainer.train()
    trainer.save_model()
    rows[f"{config_name(options)}, distilled"] = accuracies(student.to("cpu"), test, teacher.to("cpu"))
    print(f"\n{'':24}" + "".join(f"{name:>16}" for name in rows["teacher"]))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{100 * value:14.2f} %" for value in row.values()))
    plot(output / "predictions.png", test, {"teacher": teacher, "student": student})
    print(f"\nStudent and predictions.png are in {output}")


def config_name(options: argparse.Namespace) -> str:
    return f"W{options.weight_bits}A{options.activation_bits}"


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
