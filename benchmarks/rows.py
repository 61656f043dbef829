"""One row of a table of accuracies: a student, how it trains, and what came of it, kept in a JSON file.

A row is trained once: its file is read from then on. Several processes can fill one folder; each takes rows that no
other is at.
"""

import contextlib
import copy
import fcntl
import functools
import io
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measure import machine
from peers import PEERS, PeerTrainer
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from sqakd_hf import (
    ImageCollator,
    ImageTransform,
    QuantizationConfig,
    SQAKDTrainer,
    SQAKDTrainingArguments,
    build_model,
    load_image_data,
    load_model,
    quantize_model,
)
from sqakd_hf.distillation.teacher import Teacher
from sqakd_hf.hub.model_preprocessing import preprocessing
from sqakd_hf.research.objective import feature_terms, parse_objective


SIZE, BATCH, CLASSES = 28, 64, 10
HELD_OUT = 5000
# Augmentations that are done in memory: pixels by which an image is shifted at most, after it was mirrored or not.
SHIFTS = {"none": 0, "crop-flip": SIZE // 8}


@dataclass(frozen=True)
class Row:
    """What a row trains, on Fashion-MNIST. Fields at their defaults do not appear in its name.

    Args:
        quantizer, bits: Weights and activations have the same bits; the first and the last layer have 8.
        objective: See `SQAKDTrainingArguments`.
        seed: Of the training images, the teacher, the order of the batches and the test of everything else.
        learning_rate: Of the weights; ranges have a hundredth. In the table "tuning" of reproduction.py 3e-3 is the
            best for each of its objectives, by the mean over both widths.
        model, model_args: timm's name, and arguments of the architecture, as JSON.
        epochs, images: Of the student's training; the teacher has the same images.
        share: The part of the teacher's images that the student sees; its number of steps stays that of all of them.
        student_images: So many images for the student instead, the teacher's among them; the steps stay.
        source: `"fashion_mnist"`, or `"photographs"`: grey patches of scikit-learn's two photographs for the student.
        augment: See `ImageTransform`.
        on_held_out: Measure on `HELD_OUT` training images that nobody else sees, instead of the test images.
        teacher_epochs, teacher_learning_rate: Of the teacher, augmented by crop-flip.
        first_last_bits: Of the first and the last layer.
        peer: A name of `PEERS` in peers.py, whose quantizers take the place of ours, in all layers.
        quantizer_kwargs, training: Further options of the quantizer and of the training, as JSON.
    """

    quantizer: str
    bits: int
    objective: str
    seed: int
    learning_rate: float = 3e-3
    model: str = "test_resnet"
    epochs: int = 10
    images: int = 10_000
    share: float = 1.0
    student_images: int = 0
    source: str = "fashion_mnist"
    augment: str = "crop-flip"
    on_held_out: bool = False
    teacher_epochs: int = 40
    teacher_learning_rate: float = 5e-3
    first_last_bits: int = 8
    peer: str = ""
    model_args: str = "{}"
    quantizer_kwargs: str = "{}"
    training: str = "{}"

    @property
    def name(self) -> str:
        """The name of the row's file."""
        parts = [self.model, self.quantizer, f"w{self.bits}a{self.bits}", self.objective]
        for item in fields(self)[4:]:
            value = getattr(self, item.name)
            if value != item.default and item.name != "model":
                parts.append(f"{item.name}={value}")
        return _file_name("-".join([*parts, f"seed={self.seed}"]))

    @property
    def teacher_name(self) -> str:
        """The name of the teacher's folder: rows with the same one share it."""
        rate = self.teacher_learning_rate
        own = f"{self.model}-{self.images}x{self.teacher_epochs}-{rate:g}-{self.model_args}-{self.seed}"
        return _file_name(own)


def _file_name(text: str) -> str:
    return "".join(letter for letter in text if letter.isalnum() or letter in "=-.+*_,:").replace(":", "=")


@dataclass
class Rows:
    """The rows in one folder, and the teachers that they share."""

    folder: Path
    teachers: Path = field(default=Path("outputs/reproduction/teachers"))

    def read(self, row: Row) -> dict[str, Any] | None:
        """Return the row's results, or `None` before it was run."""
        path = self.folder / f"{row.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, row: Row) -> None:
        """Train the row unless its results exist or another process is at it."""
        if self.read(row) is not None:
            return
        with _alone(self.teachers.parent / "locks" / row.name) as alone:
            if alone and self.read(row) is None:
                result = {"row": asdict(row), **self._train(row)}
                path = self.folder / f"{row.name}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
                path.with_suffix(".part").rename(path)

    def _train(self, row: Row) -> dict[str, Any]:
        start = time.time()
        teacher = self.teacher(row)
        data = images_of(row.seed, row.images)
        student = copy.deepcopy(teacher)
        if row.source == "photographs":
            train = Preloaded(photographs(row.images, row.seed).with_transform(data.transform()), SHIFTS[row.augment])
        else:
            train = data.train(row.augment, row.student_images or round(row.share * row.images))
        steps = row.epochs * -(-row.images // BATCH)
        folder = self.teachers.parent / "runs" / row.name
        looks_inside = feature_terms(parse_objective(row.objective))
        in_memory = row.augment == "none" and not looks_inside
        args = SQAKDTrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=row.learning_rate,
            objective=row.objective,
            cache_teacher_logits=str(folder / "logits") if in_memory else None,
            **common(row.seed),
            **{"freeze_batch_norm": False, **json.loads(row.training)},  # teachers were trained on these images
        )
        if row.peer:
            _, build, _ = PEERS[row.peer]
            images = torch.stack([train[index]["pixel_values"] for index in range(args.calibration_images)])
            with contextlib.redirect_stdout(io.StringIO()):
                student = build(student, images, row.bits)
            trainer = PeerTrainer(student, teacher, args, train_dataset=train)
        else:
            config = QuantizationConfig(
                row.quantizer,
                weight_bits=row.bits,
                depthwise_bits=None,  # these two as in the papers, and when the first rows were measured
                residual_bits=None,
                activation_bits=row.bits,
                first_last_bits=row.first_last_bits,
                quantizer_kwargs=json.loads(row.quantizer_kwargs),
            )
            quantize_model(student, config)
            trainer = SQAKDTrainer(student, teacher, args, train_dataset=train)
            trainer.calibrate()
        trainer.remove_callback(PrinterCallback)
        test = data.held_out if row.on_held_out else data.test
        before = trainer.evaluate(test)
        trained = time.time()
        trainer.train()
        seconds = time.time() - trained
        after = trainer.evaluate(test)
        names = {"accuracy": "eval_accuracy", "agreement": "eval_agreement", "kl": "eval_loss"}
        return {
            "teacher": trainer.results["teacher"],
            "calibrated": {name: before[key] for name, key in names.items()},
            "student": {name: after[key] for name, key in names.items()},
            "curve": [
                {key: entry[key] for key in ("step", "loss", "agreement")}
                for entry in trainer.state.log_history
                if "loss" in entry
            ],
            "steps": steps,
            "seconds": round(seconds),
            "seconds_with_all": round(time.time() - start),
            "teacher_fingerprint": Teacher([teacher], torch.device("cpu")).fingerprint()[:16],
            "commit": commit(),
            "machine": machine(),
        }

    def teacher(self, row: Row) -> nn.Module:
        """Return the teacher of the row's model, seed and images: trained once, with labels."""
        folder = self.teachers / row.teacher_name
        with _alone(folder.with_name(f"{folder.name}.lock"), wait=True):
            if not (folder / "config.json").exists():
                set_seed(row.seed)
                options = json.loads(row.model_args)
                model = build_model(f"timm/{row.model}", CLASSES, image_size=SIZE, model_args=options)
                args = TrainingArguments(
                    output_dir=str(folder),
                    num_train_epochs=row.teacher_epochs,
                    learning_rate=row.teacher_learning_rate,
                    warmup_steps=0.1,
                    weight_decay=0.01,
                    **common(row.seed),
                )
                data = images_of(row.seed, row.images)
                Trainer(model, args, train_dataset=data.train("crop-flip"), data_collator=ImageCollator()).train()
                model.save_pretrained(folder)
        return load_model(str(folder))


def commit() -> str:
    """Return the commit of this repository, with a mark if files differ from it; "unknown" of a copy without one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def common(seed: int) -> dict[str, Any]:
    """Return the training arguments that teachers and students share."""
    return {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 250,
        "lr_scheduler_type": "cosine",
        "logging_strategy": "steps",
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }


class Preloaded(Dataset):
    """Images as the network takes them, in memory; with `shift`, mirrored at random and shifted by so many pixels.

    That is `ImageTransform(augment="crop-flip")`, of tensors instead of files.
    """

    def __init__(self, dataset, shift: int = 0) -> None:
        self.fingerprint = dataset._fingerprint
        self.shift = shift
        self.items = [dataset[i] for i in range(len(dataset))]
        if shift:
            for item in self.items:
                item["pixel_values"] = nn.functional.pad(item["pixel_values"], (shift,) * 4, mode="reflect")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        if not self.shift:
            return item
        top, left = torch.randint(2 * self.shift + 1, (2,)).tolist()
        mirrored = torch.rand(1).item() < 0.5
        pixels = item["pixel_values"][:, top : top + SIZE, left : left + SIZE]
        return {**item, "pixel_values": pixels.flip(2) if mirrored else pixels}


class Images:
    """Fashion-MNIST for one seed: training images drawn by it, held-out ones beside them, and all test images."""

    def __init__(self, seed: int, count: int) -> None:
        data = load_image_data("fashion_mnist", seed=seed)
        self.transform = functools.partial(ImageTransform, SIZE, *_normalisation())
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed)).tolist()
        self._train, self._held_out, self._test = data.train, order[-HELD_OUT:], data.test
        self._order, self._count = order[:-HELD_OUT], count

    def train(self, augment: str, count: int | None = None) -> Dataset:
        """Return the first `count` training images, by default the teacher's."""
        images = self._train.select(self._order[: self._count if count is None else count])
        if augment in SHIFTS:
            return Preloaded(images.with_transform(self.transform()), SHIFTS[augment])
        return images.with_transform(self.transform(augment=augment))

    @functools.cached_property
    def held_out(self) -> Dataset:
        """Images for choosing a learning rate."""
        return Preloaded(self._train.select(self._held_out).with_transform(self.transform()))

    @functools.cached_property
    def test(self) -> Dataset:
        """All test images."""
        return Preloaded(self._test.with_transform(self.transform()))


images_of = functools.lru_cache(maxsize=1)(Images)


def photographs(count: int, seed: int) -> datasets.Dataset:
    """Return square patches of scikit-learn's sample photographs, grey, of 28 to 112 pixels: no clothes to be seen."""
    generator = np.random.default_rng(seed)
    pictures = [Image.fromarray(picture).convert("L") for picture in load_sample_images().images]
    patches = []
    for number in range(count):
        picture, side = pictures[number % len(pictures)], int(generator.integers(SIZE, 4 * SIZE))
        left, top = (int(generator.integers(0, length - side)) for length in picture.size)
        patches.append(picture.crop((left, top, left + side, top + side)).resize((SIZE, SIZE)))
    return datasets.Dataset.from_dict({"image": patches}, datasets.Features({"image": datasets.Image()}))


def _normalisation() -> tuple[tuple[float, ...], tuple[float, ...]]:
    expected = preprocessing(build_model("timm/test_resnet", CLASSES, image_size=SIZE))
    return expected.mean, expected.std


@contextlib.contextmanager
def _alone(path: Path, wait: bool = False) -> Iterator[bool]:
    """Context that one process is in at a time; the others wait, or get `False`. A killed process lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
