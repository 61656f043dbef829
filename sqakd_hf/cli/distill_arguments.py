"""The arguments of the command `distill`, and their defaults by situation."""

import json
import os
from dataclasses import dataclass, field

import torch

from ..data.transforms import AUGMENTATIONS
from ..distillation.publishing import ARGUMENTS_FILE
from ..distillation.training_args import SQAKDTrainingArguments


# Where a teacher comes from.
GIVEN, FINE_TUNED, FROM_SCRATCH = "given", "fine-tuned", "from scratch"


# The learning rate times the number of steps between a weight's codes; 1e-3 at 2 bits.
RATE_IN_STEPS = 3e-3


# Small images train a small network in a minute; everything else uses the model's own size.
IMAGE_SIZES = {"digits": 32, "fashion_mnist": 32}


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "timm/NAME, a Hugging Face id, or a folder with a model or a config.json"})
    dataset: str = field(
        default="digits",
        metadata={"help": "digits (embedded), fashion_mnist, a folder of images, a parquet file, or a Hub dataset"},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "a trained --model to distil from; otherwise labels fine-tune one first"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "column of the labels, where a dataset has several"}
    )
    image_size: int | None = field(default=None, metadata={"help": "side in pixels; default: per model and dataset"})
    model_args: str = field(default="{}", metadata={"help": 'JSON arguments of the architecture: {"patch_size": 4}'})
    augment: str | None = field(
        default=None,
        metadata={
            "help": f"one of {', '.join(AUGMENTATIONS)}; default: none for digits and fashion_mnist, else crop-flip"
        },
    )
    max_train_images: int | None = field(default=None, metadata={"help": "use so many training images"})
    max_test_images: int | None = field(default=None, metadata={"help": "use so many test images"})
    validation_dataset: str | None = field(
        default=None,
        metadata={"help": "images to choose the best epoch by; default: the folder's validation/ beside its test/"},
    )
    test_dataset: str | None = field(
        default=None, metadata={"help": "images to report on; default: the folder's test/, or a fifth of the images"}
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={"help": "share of the training images to choose by where there are no validation images; 0: none"},
    )
    teacher_from_scratch: bool = field(
        default=False, metadata={"help": "train the teacher from random weights, whatever weights there are"}
    )
    teacher_epochs: float = field(default=8.0, metadata={"help": "epochs to fine-tune a teacher"})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "learning rate to fine-tune a teacher"})
    teacher_optim: str = field(default="adamw_torch", metadata={"help": "optimizer to fine-tune a teacher, see optim"})
    teacher_optim_args: str | None = field(default=None, metadata={"help": "its options, such as momentum=0.9"})
    teacher_weight_decay: float = field(default=0.01, metadata={"help": "weight decay to fine-tune a teacher"})
    teacher_warmup_steps: float = field(
        default=0.1, metadata={"help": "warm-up steps to fine-tune a teacher; below 1: a share of all"}
    )
    teacher_label_smoothing: float = field(default=0.0, metadata={"help": "label smoothing to fine-tune a teacher"})
    adam: bool = field(
        default=False, metadata={"help": "the student's optimizer is Adam with coupled weight decay, as in the paper"}
    )
    num_threads: int | None = field(default=None, metadata={"help": "threads that torch uses on a CPU"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "write into a folder that is not empty"})


@dataclass
class DistillationArguments(SQAKDTrainingArguments):
    output_dir: str = field(default="sqakd-output", metadata={"help": "folder for student, results and checkpoints"})
    num_train_epochs: float = field(default=6.0, metadata={"help": "epochs of distillation"})
    learning_rate: float = field(
        default=1e-3,
        metadata={"help": "learning rate of the student's weights; default: less for a given teacher and many bits"},
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "training batch of each process"})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "evaluation batch of each process"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    logging_strategy: str = field(default="epoch", metadata={"help": "when to log"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints to keep beside the best"})
    report_to: str = field(default="none", metadata={"help": "experiment tracker"})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "pin memory for faster transfers to a GPU"}
    )


def set_defaults(args: DistillationArguments, given: set[str], origin: str, bits: int) -> None:
    """Choose what nobody gave, learning rate and BatchNorm's statistics, by where the teacher comes from.

    A teacher that is given was trained on other images: its BatchNorm statistics are better than those of a thousand
    photographs, and a student of many bits begins so near to it that a rate for few bits takes it further away. The
    rate is the same in units of a weight's step at every width. A resumed training goes on as it began.
    """
    if args.resume_from_checkpoint:
        with open(os.path.join(args.resume_from_checkpoint, ARGUMENTS_FILE), encoding="utf-8") as file:
            defaults = json.load(file)
    elif origin == GIVEN:
        defaults = {"learning_rate": min(args.learning_rate, RATE_IN_STEPS / (2**bits - 1))}
    else:
        defaults = {"freeze_batch_norm": False}
    for name in ("learning_rate", "freeze_batch_norm"):
        if name in defaults and name not in given:
            setattr(args, name, defaults[name])
    if "quantizer_learning_rate" not in given:
        args.quantizer_learning_rate = args.learning_rate / 100
