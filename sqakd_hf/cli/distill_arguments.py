"""The arguments of the command `distill`, and their defaults by situation."""

import json
import os
import re
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from .._text import quote
from ..conversion.planner import is_depthwise
from ..data.transforms import AUGMENTATIONS
from ..distillation.publishing import ARGUMENTS_FILE
from ..distillation.training_args import SQAKDTrainingArguments
from ..errors import InputError


RECIPES = ("auto", "paper", "calibrate", "reconstruct")
# Students of so many bits that are so near to their teacher after calibration (`eval_kl`) are left there.
LOSSLESS_BITS, LOSSLESS_KL = 8, 0.02


# The learning rate times the number of steps between a weight's codes; 1e-3 at 2 bits.
RATE_IN_STEPS = 3e-3


# Small images train a small network in a minute; everything else uses the model's own size.
IMAGE_SIZES = {"digits": 32, "fashion_mnist": 32}


def seconds_of(time: str) -> float:
    """Return the seconds of a time such as `90s`, `10m` or `1h`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", time)
    if match is None or not float(match[1]):
        raise InputError(f"--time_budget must be a time such as 90s, 10m or 1h, got {time!r}.")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


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
    recipe: str = field(
        default="auto",
        metadata={
            "help": f"one of {', '.join(RECIPES)}; calibrate: ranges, statistics and biases alone; reconstruct: also "
            "each block by itself; auto: these and training, as far as they help on the held-out images; paper: plain "
            "ranges, then training with new BatchNorm statistics"
        },
    )
    time_budget: str | None = field(
        default=None,
        metadata={"help": "time for the reconstruction, such as 90s, 10m or 1h; default: 100 updates a block"},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "write into a folder that is not empty"})

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise InputError(f"--recipe must be one of {quote(RECIPES)}, got {self.recipe!r}.")
        if self.time_budget is not None and self.recipe in ("paper", "calibrate"):
            raise InputError(f"--time_budget is of the reconstruction, which --recipe {self.recipe} leaves out.")
        if self.time_budget is not None:
            seconds_of(self.time_budget)


@dataclass
class DistillationArguments(SQAKDTrainingArguments):
    output_dir: str = field(default="sqakd-output", metadata={"help": "folder for student, results and checkpoints"})
    num_train_epochs: float = field(default=6.0, metadata={"help": "epochs of distillation"})
    learning_rate: float = field(
        default=1e-3,
        metadata={"help": "learning rate of the student's weights; default: less for more than 2 bits"},
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "training batch of each process"})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "evaluation batch of each process"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    logging_strategy: str = field(default="epoch", metadata={"help": "when to log"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints to keep beside the best"})
    report_to: str = field(default="none", metadata={"help": "experiment tracker"})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "pin memory for faster transfers to a GPU"}
    )


@dataclass(frozen=True)
class Recipe:
    """What a run does, after the ranges are set.

    Args:
        keeps_statistics (`bool`): Whether BatchNorm keeps the teacher's statistics, corrected by what quantization
            changed.
        reconstructs (`bool`): Whether each block learns to put out what the teacher's does.
        trains (`bool`): Whether the student learns its teacher's logits.
        by_need (`bool`): Whether both are left out where calibration is enough, and training ends after two epochs
            without a gain.
    """

    keeps_statistics: bool
    reconstructs: bool
    trains: bool
    by_need: bool = False

    @classmethod
    def of(cls, name: str) -> "Recipe":
        """Return the recipe of that name."""
        return {
            "auto": cls(True, True, True, by_need=True),
            "paper": cls(False, False, True),
            "calibrate": cls(True, False, False),
            "reconstruct": cls(True, True, False),
        }[name]


def set_defaults(
    args: DistillationArguments, given: set[str], recipe: Recipe, bits: int, teacher: PreTrainedModel
) -> None:
    """Choose what nobody gave: learning rate and BatchNorm's statistics by the recipe, and the memory format.

    A student that keeps its teacher's statistics begins near to it, and a rate for few bits takes one of many bits
    further away. The rate is the same in units of a weight's step at every width. On a CPU, networks with depthwise
    convolutions are faster in channels-last. A resumed training goes on as it began.
    """
    if args.resume_from_checkpoint:
        with open(os.path.join(args.resume_from_checkpoint, ARGUMENTS_FILE), encoding="utf-8") as file:
            defaults = json.load(file)
    elif recipe.keeps_statistics:
        defaults = {"learning_rate": min(args.learning_rate, RATE_IN_STEPS / (2**bits - 1))}
    else:
        defaults = {"freeze_batch_norm": False}
    if not args.resume_from_checkpoint:
        defaults["channels_last"] = args.device.type == "cpu" and any(map(is_depthwise, teacher.modules()))
    for name in ("learning_rate", "freeze_batch_norm", "channels_last"):
        if name in defaults and name not in given:
            setattr(args, name, defaults[name])
    if "quantizer_learning_rate" not in given:
        args.quantizer_learning_rate = args.learning_rate / 100
