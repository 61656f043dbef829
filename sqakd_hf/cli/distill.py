"""Distil a low-bit student from a full-precision teacher, without labels.

    sqakd distill --model timm/resnet18
    sqakd distill --model google/vit-base-patch16-224 --dataset path/to/images --teacher path/to/trained/model
    accelerate launch -m sqakd_hf distill --model ...        # several processes, GPUs

Without --teacher a teacher is fine-tuned first, by ordinary supervised training. Distillation itself never reads a
label (unless --objective asks for it, to compare, or --metric_for_best_model for accuracy); labels of the test images,
where they exist, only serve to report accuracy.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed

from ..checkpoint import last_checkpoint
from ..collator import ImageCollator
from ..convert import quantize_model
from ..data import ImageData, load_image_data, split_holdout
from ..errors import InputError
from ..interrupt import InterruptCallback
from ..metrics import TopKAccuracy
from ..modeling import (
    Preprocessing,
    WeightsNotFoundError,
    build_model,
    image_processor,
    load_teacher,
    preprocessing,
    record_preprocessing,
)
from ..objective import parse_objective, reads_labels
from ..plan import plan_quantization
from ..report import results_table
from ..trainer import SQAKDTrainer
from ..training_args import SQAKDTrainingArguments
from ..transforms import AUGMENTATIONS, ImageTransform
from .quantization_arguments import QuantizationArguments, parse_json


logger = logging.getLogger(__name__)

RESULT_KEYS = {"accuracy": "accuracy", "agreement": "agreement", "kl": "loss"}
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
        default=None, metadata={"help": "a trained model to distil from; otherwise one is fine-tuned first"}
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
    validation_fraction: float = field(
        default=0.1,
        metadata={
            "help": "share of the training images held out to choose the best epoch, without their labels; 0: none"
        },
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
    learning_rate: float = field(default=1e-3, metadata={"help": "learning rate of the student's weights"})
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
    choose_by_holdout(script, args, argv)
    try:
        distil(script, quantization, args)
    except KeyboardInterrupt:
        last = None
        with contextlib.suppress(InputError):
            last = last_checkpoint(args.output_dir)
        way_on = "--resume_from_checkpoint last to go on" if last else "--overwrite_output_dir to start again"
        sys.exit(f"\nInterrupted{f', saved {last}' if last else ''}. Run the same command with {way_on}.")


def choose_by_holdout(script: ScriptArguments, args: DistillationArguments, argv: Sequence[str]) -> None:
    """Let training keep its best epoch by the held-out images; refuse arguments that contradict it."""
    if not script.validation_fraction:
        if args.eval_strategy != "no":
            raise InputError("--eval_strategy measures held-out images, and --validation_fraction 0 holds out none.")
        return
    given = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in argv if argument.startswith("--")}
    # Epochs with more bits than the student's own would win.
    needed = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": not args.progressive_bits,
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


def distil(script: ScriptArguments, quantization: QuantizationArguments, args: DistillationArguments) -> None:
    if script.num_threads:
        torch.set_num_threads(script.num_threads)
    config = quantization.to_config()
    output = Path(args.output_dir)

    data = load_image_data(
        script.dataset,
        label_column=script.label_column,
        max_train_images=script.max_train_images,
        max_test_images=script.max_test_images,
        seed=args.seed,
    )
    train, holdout = data.train, None
    if script.validation_fraction:
        by_labels = args.metric_for_best_model == "eval_accuracy"
        if by_labels and data.class_names is None:
            raise InputError(
                f"The images of {script.dataset!r} have no labels to choose the best epoch by. Pass "
                "--metric_for_best_model eval_loss (the divergence) or --validation_fraction 0."
            )
        train, holdout = split_holdout(data.train, script.validation_fraction, args.seed, keep_labels=by_labels)

    set_seed(args.seed)
    teacher, is_trained = get_teacher(script, args, data)
    plan = plan_quantization(teacher, config)  # a pattern that matches nothing is better found before the training
    transform = image_transform(script, teacher)
    # Small centred pictures gain nothing from cropping in a few epochs, and a mirrored digit is another sign.
    augment = script.augment or ("none" if script.dataset in IMAGE_SIZES else "crop-flip")
    plain, augmented = transform("none"), transform(augment)
    used = Preprocessing(plain.size, plain.mean, plain.std, plain.crop_pct, plain.interpolation)
    record_preprocessing(teacher, used)
    train, test = train.with_transform(augmented), data.test.with_transform(plain)
    if not is_trained:
        train_teacher(teacher, train, used, script, args)
    results = {"teacher": {"accuracy": accuracy(teacher, test, args, data), "agreement": 1.0, "kl": 0.0}}

    student = copy.deepcopy(teacher)
    quantize_model(student, config)
    interrupt = InterruptCallback()
    trainer = SQAKDTrainer(
        student,
        teacher,
        args,
        train_dataset=train,
        eval_dataset=None if holdout is None else holdout.with_transform(plain),
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
    results["student"] = evaluate(trainer, test)
    trainer.measure_layers()

    if trainer.is_world_process_zero():
        results["arguments"] = {**asdict(script), **config.to_dict(), "training": json.loads(args.to_json_string())}
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script.dataset)
    else:
        trainer.save_model()
        trainer.create_model_card(dataset=script.dataset)
    if trainer.is_world_process_zero():
        report = " and report.html" * (output / "report.html").exists()
        print(f"\n{results_table(results, plan)}\n\nStudent, card, results.json{report} are in {output}.")
    trainer.accelerator.end_training()  # of several processes: gloo's threads would abort one that ends without it


def get_teacher(script: ScriptArguments, args: DistillationArguments, data: ImageData) -> tuple[PreTrainedModel, bool]:
    """Return the teacher, and whether it is trained on these classes already."""
    if args.resume_from_checkpoint and script.teacher is None:
        return load_teacher(teacher_folder(args)), True
    if script.teacher is not None:
        model = load_teacher(script.teacher)
        if data.class_names is not None and model.config.num_labels != len(data.class_names):
            raise InputError(
                f"The teacher {script.teacher!r} has {model.config.num_labels} classes but the images of "
                f"{script.dataset!r} have {len(data.class_names)}. Pass a teacher trained on these classes."
            )
        return model, True
    if data.class_names is None:
        raise InputError(
            f"The images of {script.dataset!r} have no labels to train a teacher with. "
            "Pass --teacher with a trained model."
        )
    classes, model_args = len(data.class_names), parse_json("model_args", script.model_args)
    try:
        if model_args or script.teacher_from_scratch:
            why = "--model_args change the architecture." if model_args else "--teacher_from_scratch asks for it."
            raise WeightsNotFoundError(why)
        model = load_teacher(script.model, num_labels=classes)
    except WeightsNotFoundError as error:
        size = script.image_size or IMAGE_SIZES.get(script.dataset)
        model = build_model(script.model, classes, size, model_args)
        logger.warning("The teacher starts from random weights. %s", error)
    model.config.id2label = dict(enumerate(data.class_names))
    model.config.label2id = {name: index for index, name in enumerate(data.class_names)}
    return model, False


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
        logging_strategy="epoch",
        save_strategy="no",
        **shared_arguments(args),
    )
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


def accuracy(model: PreTrainedModel, test, args: DistillationArguments, data: ImageData) -> float | None:
    """Return the model's accuracy on the test images, or `None` where they have no labels."""
    if data.class_names is None:
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
    ours.addHandler(logging.StreamHandler())
    ours.setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    if args.process_index != 0:
        transformers.utils.logging.set_verbosity_error()
