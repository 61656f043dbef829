"""The teacher of the command `distill`: given, loaded, or fine-tuned here."""

import contextlib
import logging
import os

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..data.collator import ImageCollator
from ..data.dataset import ImageData
from ..data.labels import is_labelled
from ..data.reproducible import own_random_numbers
from ..distillation.interrupt import InterruptCallback
from ..distillation.last_batch import check_last_batch
from ..distillation.metrics import TopKAccuracy
from ..errors import InputError
from ..hub.loading import WeightsNotFoundError, build_model, load_model
from ..hub.model_preprocessing import preprocessing
from ..hub.preprocessing import Preprocessing, image_processor
from .distill_arguments import IMAGE_SIZES, DistillationArguments, ScriptArguments
from .quantization_arguments import parse_json


logger = logging.getLogger(__name__)


def get_teacher(script: ScriptArguments, args: DistillationArguments, data: ImageData) -> tuple[PreTrainedModel, bool]:
    """Return the teacher, and whether it is trained; else it is still to learn these classes."""
    if args.resume_from_checkpoint and script.teacher is None and is_labelled(data.train):
        return load_model(teacher_folder(args)), True
    teacher = script.teacher or (None if is_labelled(data.train) else script.model)
    if teacher is not None:
        return load_given_teacher(script, teacher), True
    classes, model_args = len(data.class_names), parse_json("model_args", script.model_args)
    try:
        if model_args or script.teacher_from_scratch:
            why = "--model_args change the architecture." if model_args else "--teacher_from_scratch asks for it."
            raise WeightsNotFoundError(why)
        model = load_model(script.model, num_labels=classes)
    except WeightsNotFoundError as error:
        size = script.image_size or IMAGE_SIZES.get(script.dataset)
        model = build_model(script.model, classes, size, model_args)
        logger.warning("The teacher starts from random weights. %s", error)
    model.config.id2label = dict(enumerate(data.class_names))
    model.config.label2id = {name: index for index, name in enumerate(data.class_names)}
    return model, False


def load_given_teacher(script: ScriptArguments, name: str) -> PreTrainedModel:
    """Return a trained teacher; refuse arguments that ask for another network than its own."""
    if script.teacher_from_scratch and script.teacher is None:
        raise InputError("--teacher_from_scratch trains a teacher by labels, and the images have none.")
    try:
        model = load_model(name)
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


def teacher_folder(args: DistillationArguments) -> str:
    return os.path.join(args.output_dir, "teacher")
