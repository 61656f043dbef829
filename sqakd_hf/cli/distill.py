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
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from ..conversion.config import QuantizationConfig
from ..conversion.convert import quantize_model
from ..conversion.planner import plan_quantization
from ..data.dataset import ImageData, load_image_data
from ..data.labels import is_labelled
from ..data.splits import split_holdout
from ..data.transforms import ImageTransform
from ..distillation.callbacks import StopWithoutGain
from ..distillation.checkpoint import last_checkpoint
from ..distillation.interrupt import InterruptCallback
from ..distillation.trainer import SQAKDTrainer
from ..errors import InputError
from ..hub.model_preprocessing import preprocessing, record_preprocessing
from ..hub.preprocessing import Preprocessing, image_processor
from ..reporting.tables import results_table
from ..reporting.training_record import to_json
from ..research.objective import parse_objective, reads_labels
from .allocator import keep_freed_memory
from .distill_arguments import (
    IMAGE_SIZES,
    LOSSLESS_BITS,
    LOSSLESS_KL,
    DistillationArguments,
    Recipe,
    ScriptArguments,
    seconds_of,
    set_defaults,
)
from .quantization_arguments import QuantizationArguments
from .students import class_names
from .teachers import accuracy, coupled_adam, get_teacher, train_teacher


logger = logging.getLogger(__name__)

RESULT_KEYS = ("accuracy", "agreement", "kl")
RECONSTRUCTION = "_reconstruction"  # in the output folder: blocks that are finished


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    keep_freed_memory()
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
        last = saved_progress(args)
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
        args.metric_for_best_model = "eval_accuracy" if by_labels else "eval_kl"
        args.greater_is_better = by_labels


def distil(
    script: ScriptArguments, quantization: QuantizationArguments, args: DistillationArguments, given: set[str]
) -> None:
    if script.num_threads:
        torch.set_num_threads(script.num_threads)
    recipe = Recipe.of(script.recipe)
    config = quantization.to_config(as_published=not recipe.keeps_statistics)
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
    teacher, is_trained = get_teacher(script, args, data)
    set_defaults(args, given, recipe, config.weight_bits, teacher)
    data = data.numbered_like(class_names(teacher))
    plan = plan_quantization(teacher, config)  # a pattern that matches nothing is better found before the training
    transform = image_transform(script, teacher)
    # Small centred pictures gain nothing from cropping in a few epochs, and a mirrored digit is another sign.
    augment = script.augment or ("none" if script.dataset in IMAGE_SIZES else "crop-flip")
    plain, augmented = transform("none"), transform(augment)
    used = Preprocessing(plain.size, plain.mean, plain.std, plain.crop_pct, plain.interpolation)
    record_preprocessing(teacher, used)
    train, test = data.train.with_transform(augmented), data.test.with_transform(plain)
    if not is_trained:
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
    if recipe.by_need and is_lossless(trainer, config):
        recipe = replace(recipe, reconstructs=False, trains=False)
    if recipe.reconstructs and reconstruct(trainer, script):
        results["reconstructed"] = evaluate(trainer, test)
    if recipe.trains:
        if recipe.by_need and args.load_best_model_at_end and not {"num_train_epochs", "max_steps"} & given:
            trainer.add_callback(StopWithoutGain(patience=2))
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if interrupt.interrupted:
            raise KeyboardInterrupt
    kept = evaluate(trainer, test), trainer.results["student"]
    results["student"] = {**kept[0], "stage": kept[1]["stage"], "step": kept[1]["step"]}
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
            "--metric_for_best_model eval_kl (the KL divergence) or --validation_fraction 0."
        )
    if data.validation is None:
        train, validation = split_holdout(data.train, script.validation_fraction, args.seed, keep_labels=by_labels)
        return replace(data, train=train, validation=validation)
    unread = () if by_labels or not is_labelled(data.validation) else ("label",)
    return replace(data, validation=data.validation.remove_columns(unread))


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


def is_lossless(trainer: SQAKDTrainer, config: QuantizationConfig) -> bool:
    """Tell whether a calibrated student of many bits is so near to its teacher that there is nothing to gain."""
    bits = min(config.weight_bits, config.activation_bits or LOSSLESS_BITS)
    if bits < LOSSLESS_BITS or trainer.eval_dataset is None:
        return False
    divergence = trainer.evaluate()["eval_kl"]
    if divergence <= LOSSLESS_KL:
        logger.info("Calibration is enough: the KL divergence on held-out images is %.4f.", divergence)
        return True
    logger.warning(
        "After calibration at %d bits the KL divergence on held-out images is %.4f, above %g. It goes on with "
        "reconstruction and training. Are these images such as the network knows, in its own size? If so, report.html "
        "beside the student shows which layers are far off; --overrides and --modules_to_not_convert keep them high.",
        bits,
        divergence,
        LOSSLESS_KL,
    )
    return False


def reconstruct(trainer: SQAKDTrainer, script: ScriptArguments) -> bool:
    """Let each block learn to put out what the teacher's does; return whether that helped.

    What stands in the way (too few images, say) is an error only where reconstruction was asked for.
    """
    folder = None if trainer.args.world_size > 1 else Path(trainer.args.output_dir, RECONSTRUCTION)
    try:
        budget = None if script.time_budget is None else seconds_of(script.time_budget)
        return trainer.reconstruct(time_budget=budget, checkpoint_dir=folder) is not None
    except InputError as error:
        if script.recipe == "reconstruct":
            raise
        logger.warning("Not reconstructed block by block: %s", error)
        return False


def evaluate(trainer: SQAKDTrainer, test) -> dict[str, float | None]:
    """Return accuracy (`None` without labels), agreement with the teacher and KL on the test images."""
    metrics = trainer.evaluate(test, metric_key_prefix="test")
    return {name: metrics.get(f"test_{name}") for name in RESULT_KEYS}


def check_output_folder(script: ScriptArguments, args: DistillationArguments) -> None:
    """Find what a resumed run goes on from; else refuse a folder that is not empty, or begin anew in it."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint == "last":
        if saved_progress(args) == str(folder / RECONSTRUCTION):
            args.resume_from_checkpoint = None  # the run goes the same way again and finds its blocks there
            return
        args.resume_from_checkpoint = last_checkpoint(args.output_dir)
    if args.resume_from_checkpoint:
        return
    if not script.overwrite_output_dir and folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"The output folder {args.output_dir!r} is not empty. Pass --overwrite_output_dir to write into it, "
            "--resume_from_checkpoint last to go on with its run, or another --output_dir."
        )
    if args.process_index == 0:
        shutil.rmtree(folder / RECONSTRUCTION, ignore_errors=True)


def saved_progress(args: DistillationArguments) -> str | None:
    """Return the folder that a run can go on from: its last checkpoint, or the blocks that were finished before."""
    with contextlib.suppress(InputError):
        return last_checkpoint(args.output_dir)
    folder = Path(args.output_dir, RECONSTRUCTION)
    return str(folder) if folder.is_dir() else None


def set_up_logging(args: DistillationArguments) -> None:
    ours = logging.getLogger("sqakd_hf")
    if not any(type(handler) is logging.StreamHandler for handler in ours.handlers):  # of a call before
        ours.addHandler(logging.StreamHandler())
    ours.setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    if args.process_index != 0:
        transformers.utils.logging.set_verbosity_error()
