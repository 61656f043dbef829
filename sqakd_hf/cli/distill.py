"""Distil a low-bit student from a full-precision teacher, without labels.

    sqakd distill --model timm/resnet18
    sqakd distill --model google/vit-base-patch16-224 --dataset path/to/images
    accelerate launch -m sqakd_hf distill --model ...        # several processes, GPUs

A trained --model and images without labels: the model is its own teacher. With labels, a teacher is fine-tuned first,
by ordinary supervised training, unless --teacher names one. Distillation itself never reads a label (unless
--objective asks for it, to compare, or --metric_for_best_model for accuracy); labels of the test images, where they
exist, only serve to report accuracy.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed

from ..conversion.convert import quantize_model
from ..conversion.plan import plan_quantization
from ..data.collator import ImageCollator
from ..data.dataset import ImageData, is_labelled, load_image_data, split_holdout
from ..data.reproducible import own_random_numbers
from ..data.transforms import AUGMENTATIONS, ImageTransform
from ..distillation.checkpoint import last_checkpoint
from ..distillation.interrupt import InterruptCallback
from ..distillation.last_batch import check_last_batch
from ..distillation.metrics import TopKAccuracy
from ..distillation.publishing import ARGUMENTS_FILE
from ..distillation.trainer import SQAKDTrainer
from ..distillation.training_args import SQAKDTrainingArguments
from ..errors import InputError
from ..hub.loading import (
    Preprocessing,
    WeightsNotFoundError,
    build_model,
    image_processor,
    load_teacher,
    preprocessing,
    record_preprocessing,
)
from ..reporting.tables import results_table
from ..reporting.training_record import to_json
from ..research.objective import parse_objective, reads_labels
from .quantization_arguments import QuantizationArguments, parse_json
from .students import class_names


logger = logging.getLogger(__name__)

RESULT_KEYS = {"accuracy": "accuracy", "agreement": "agreement", "kl": "loss"}
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


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    kinds = (ScriptArguments, QuantizationArguments, DistillationArguments)
    parser = HfArgumentParser(
        kinds,
        prog="sqakd distill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    try:
        script, quantization, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:  # transformers' way to say that two arguments contradict each other
        raise InputError(str(error)) from error
    set_up_logging(args)
    args.check_devices()
    check_output_folder(script, args)
    given = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in argv if argument.startswith("--")}
    choose_by_holdout(script, args, given)
    try:
        distil(script, quantization, args, given)
    except KeyboardInterrupt:
        last = None
        with contextlib.suppress(InputError):
            last = last_checkpoint(args.output_dir)
        way_on = "--resume_from_checkpoint last to go on" if last else "--overwrite_output_dir to start again"
        sys.exit(f"\nInterrupted{f', saved {last}' if last else ''}. Run the same command with {way_on}.")


def choose_by_holdout(script: ScriptArguments, args: DistillationArguments, given: set[str]) -> None:
    """Let training keep its best epoch by the held-out images; refuse arguments that contradict it."""
    if not script.validation_fraction:
        if args.eval_strategy != "no":
            raise InputError("--eval_strategy measures held-out images, and --validation_fraction 0 holds out none.")
        return
    # Epochs with more bits than the student's own would win.
    needed = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
    }
    for name, value in needed.items():
        if name in given and getattr(args, name) != value:
            raise InputError(
                f"--{name} does not go with --validation_fraction {script.validation_fraction:g}: the student is "
                "measured and saved after each epoch, and the best one kept. Pass --validation_fraction 0."
            )
        setattr(args, name, value)
    if "metric_for_best_model" in given:
        args.metric_for_best_model = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    elif "greater_is_better" in given:
        raise InputError("--greater_is_better is of a metric: pass --metric_for_best_model as well.")
    else:
        terms = parse_objective(args.objective)
        by_labels = reads_labels(terms) and all(term.name != "kl" for term in terms)
        args.metric_for_best_model = "eval_accuracy" if by_labels else "eval_loss"
        args.greater_is_better = by_labels


def distil(
    script: ScriptArguments, quantization: QuantizationArguments, args: DistillationArguments, given: set[str]
) -> None:
    if script.num_threads:
        torch.set_num_threads(script.num_threads)
    config = quantization.to_config()
    output = Path(args.output_dir)

    data = load_image_data(
        script.dataset,
        validation_dataset=script.validation_dataset,
        test_dataset=script.test_dataset,
        label_column=script.label_column,
        max_train_images=script.max_train_images,
        max_test_images=script.max_test_images,
        seed=args.seed,
    )
    data = with_validation_images(data, script, args, given)

    set_seed(args.seed)
    teacher, origin = get_teacher(script, args, data)
    set_defaults(args, given, origin, config.weight_bits)
    data = data.numbered_like(class_names(teacher))
    plan = plan_quantization(teacher, config)  # a pattern that matches nothing is better found before the training
    transform = image_transform(script, teacher)
    # Small centred pictures gain nothing from cropping in a few epochs, and a mirrored digit is another sign.
    augment = script.augment or ("none" if script.dataset in IMAGE_SIZES else "crop-flip")
    plain, augmented = transform("none"), transform(augment)
    used = Preprocessing(plain.size, plain.mean, plain.std, plain.crop_pct, plain.interpolation)
    record_preprocessing(teacher, used)
    train, test = data.train.with_transform(augmented), data.test.with_transform(plain)
    if origin != GIVEN:
        train_teacher(teacher, train, used, script, args)
    results = {"teacher": {"accuracy": accuracy(teacher, test, args), "agreement": 1.0, "kl": 0.0}}

    student = copy.deepcopy(teacher)
    quantize_model(student, config)
    interrupt = InterruptCallback()
    trainer = SQAKDTrainer(
        student,
        teacher,
        args,
        train_dataset=train,
        eval_dataset=None if data.validation is None else data.validation.with_transform(plain),
        processing_class=image_processor(used),
        callbacks=[interrupt],
        optimizer_cls_and_kwargs=coupled_adam(args) if script.adam else None,
    )
    trainer.calibrate()
    if trainer.is_world_process_zero():
        print(student.quantization_plan, flush=True)
    results["calibrated"] = evaluate(trainer, test)
    trainer.measure_layers()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if interrupt.interrupted:
        raise KeyboardInterrupt
    results["student"] = {**evaluate(trainer, test), "step": trainer.results["student"]["step"]}
    trainer.measure_layers()

    if trainer.is_world_process_zero():
        results["arguments"] = {**asdict(script), **config.to_dict(), "training": json.loads(args.to_json_string())}
        (output / "results.json").write_text(to_json(results) + "\n")
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script.dataset)
    else:
        trainer.save_model()
        trainer.create_model_card(dataset=script.dataset)
    if trainer.is_world_process_zero():
        report = " and report.html" * (output / "report.html").exists()
        print(f"\n{results_table(results, plan)}\n\nStudent, card, results.json{report} are in {output}.")
    trainer.accelerator.end_training()  # of several processes: gloo's threads would abort one that ends without it


def with_validation_images(
    data: ImageData, script: ScriptArguments, args: DistillationArguments, given: set[str]
) -> ImageData:
    """Return the images with those to choose the best epoch by: their own, or a part of the training images."""
    if not script.validation_fraction:
        if script.validation_dataset is not None:
            raise InputError("--validation_dataset has images to choose by, and --validation_fraction 0 wants none.")
        return replace(data, validation=None)
    if data.validation is not None and "validation_fraction" in given:
        raise InputError(
            f"{script.validation_dataset or script.dataset!r} has validation images: leave out --validation_fraction, "
            "or pass 0 to choose by none."
        )
    by_labels = args.metric_for_best_model == "eval_accuracy"
    if by_labels and not is_labelled(data.validation or data.train):
        raise InputError(
            f"The images of {script.dataset!r} have no labels to choose the best epoch by. Pass "
            "--metric_for_best_model eval_loss (the divergence) or --validation_fraction 0."
        )
    if data.validation is None:
        train, validation = split_holdout(data.train, script.validation_fraction, args.seed, keep_labels=by_labels)
        return replace(data, train=train, validation=validation)
    unread = () if by_labels or not is_labelled(data.validation) else ("label",)
    return replace(data, validation=data.validation.remove_columns(unread))


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


def get_teacher(script: ScriptArguments, args: DistillationArguments, data: ImageData) -> tuple[PreTrainedModel, str]:
    """Return the teacher and where it comes from; one that is not `GIVEN` is still to be trained on these classes."""
    if args.resume_from_checkpoint and script.teacher is None and is_labelled(data.train):
        return load_teacher(teacher_folder(args)), GIVEN
    teacher = script.teacher or (None if is_labelled(data.train) else script.model)
    if teacher is not None:
        return load_given_teacher(script, teacher), GIVEN
    classes, model_args = len(data.class_names), parse_json("model_args", script.model_args)
    try:
        if model_args or script.teacher_from_scratch:
            why = "--model_args change the architecture." if model_args else "--teacher_from_scratch asks for it."
            raise WeightsNotFoundError(why)
        model, origin = load_teacher(script.model, num_labels=classes), FINE_TUNED
    except WeightsNotFoundError as error:
        size = script.image_size or IMAGE_SIZES.get(script.dataset)
        model, origin = build_model(script.model, classes, size, model_args), FROM_SCRATCH
        logger.warning("The teacher starts from random weights. %s", error)
    model.config.id2label = dict(enumerate(data.class_names))
    model.config.label2id = {name: index for index, name in enumerate(data.class_names)}
    return model, origin


def load_given_teacher(script: ScriptArguments, name: str) -> PreTrainedModel:
    """Return a trained teacher; refuse arguments that ask for another network than its own."""
    if script.teacher_from_scratch and script.teacher is None:
        raise InputError("--teacher_from_scratch trains a teacher by labels, and the images have none.")
    try:
        model = load_teacher(name)
    except WeightsNotFoundError as error:
        if script.teacher is not None:
            raise
        raise InputError(
            f"The images of {script.dataset!r} have no labels to train a teacher with, and {name!r} is not trained. "
            f"Pass a trained --model. {error}"
        ) from error
    model_args = parse_json("model_args", script.model_args)
    if script.model != name or model_args:
        with own_random_numbers(0):
            stated = build_model(script.model, model.config.num_labels, preprocessing(model).image_size, model_args)
        shapes, own = ({key: value.shape for key, value in each.state_dict().items()} for each in (stated, model))
        if shapes != own:
            raise InputError(
                f"The student is a copy of its teacher, and --model {script.model!r} is another network than "
                f"{name!r}. Pass --model {name!r} alone."
            )
    return model


def image_transform(script: ScriptArguments, model: PreTrainedModel):
    """Return a function from augmentation to the model's `ImageTransform`."""
    expected = preprocessing(model)
    size = script.image_size or expected.image_size
    if script.image_size is None and script.dataset in IMAGE_SIZES and not expected.fixed_size:
        size = IMAGE_SIZES[script.dataset]
    crop_pct = expected.crop_pct if script.dataset not in IMAGE_SIZES else 1.0

    def make(augment: str) -> ImageTransform:
        return ImageTransform(
            size,
            expected.mean,
            expected.std,
            crop_pct=crop_pct,
            interpolation=expected.interpolation,
            augment=augment,
        )

    return make


def train_teacher(
    teacher: PreTrainedModel, train, used: Preprocessing, script: ScriptArguments, args: DistillationArguments
) -> None:
    """Fine-tune the teacher in place, with labels, and save it."""
    logger.info("Fine-tuning the teacher on labelled images (ordinary supervised training).")
    interrupt = InterruptCallback()
    teacher_args = TrainingArguments(
        output_dir=teacher_folder(args),
        num_train_epochs=script.teacher_epochs,
        max_steps=args.max_steps,
        learning_rate=script.teacher_learning_rate,
        per_device_train_batch_size=args.per_device_train_batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=script.teacher_warmup_steps,
        weight_decay=script.teacher_weight_decay,
        optim=script.teacher_optim,
        optim_args=script.teacher_optim_args,
        label_smoothing_factor=script.teacher_label_smoothing,
        max_grad_norm=args.max_grad_norm,
        dataloader_drop_last=args.dataloader_drop_last,
        logging_strategy="epoch",
        save_strategy="no",
        **shared_arguments(args),
    )
    check_last_batch(teacher, teacher_args, train, ImageCollator())
    trainer = Trainer(
        teacher,
        teacher_args,
        train_dataset=train,
        data_collator=ImageCollator(),
        processing_class=image_processor(used),
        callbacks=[interrupt],
    )
    with contextlib.closing(interrupt):
        trainer.train()
    if interrupt.interrupted:
        raise KeyboardInterrupt
    trainer.save_model()


def coupled_adam(args: DistillationArguments) -> tuple[type[torch.optim.Optimizer], dict]:
    """Return Adam, whose weight decay is a part of the gradient; Trainer's choices decouple it."""
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.Adam, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def shared_arguments(args: DistillationArguments) -> dict:
    """Return what the teacher's Trainer takes over from the student's."""
    names = ("seed", "use_cpu", "bf16", "fp16", "disable_tqdm", "dataloader_pin_memory", "dataloader_num_workers")
    return {name: getattr(args, name) for name in names} | {"remove_unused_columns": False, "report_to": "none"}


def accuracy(model: PreTrainedModel, test, args: DistillationArguments) -> float | None:
    """Return the model's accuracy on the test images, or `None` where they have no labels."""
    if not is_labelled(test):
        return None
    eval_args = TrainingArguments(
        output_dir=args.output_dir,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        **shared_arguments(args),
    )
    output = Trainer(model, eval_args, data_collator=ImageCollator()).predict(test)
    return TopKAccuracy().compute(predictions=output.predictions, references=output.label_ids)["top1_accuracy"]


def evaluate(trainer: SQAKDTrainer, test) -> dict[str, float | None]:
    """Return accuracy (`None` without labels), agreement with the teacher and KL on the test images."""
    metrics = trainer.evaluate(test, metric_key_prefix="test")
    return {name: metrics.get(f"test_{key}") for name, key in RESULT_KEYS.items()}


def teacher_folder(args: DistillationArguments) -> str:
    return os.path.join(args.output_dir, "teacher")


def check_output_folder(script: ScriptArguments, args: DistillationArguments) -> None:
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint == "last":
        args.resume_from_checkpoint = last_checkpoint(args.output_dir)
    if args.resume_from_checkpoint or script.overwrite_output_dir:
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"The output folder {args.output_dir!r} is not empty. Pass --overwrite_output_dir to write into it, "
            "--resume_from_checkpoint last to go on with its run, or another --output_dir."
        )


def set_up_logging(args: DistillationArguments) -> None:
    ours = logging.getLogger("sqakd_hf")
    if not any(type(handler) is logging.StreamHandler for handler in ours.handlers):  # of a call before
        ours.addHandler(logging.StreamHandler())
    ours.setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    if args.process_index != 0:
        transformers.utils.logging.set_verbosity_error()
