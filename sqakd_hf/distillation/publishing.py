"""What a training leaves behind: the saved student, its card and report, and their upload."""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from .._compat import is_sharded
from ..errors import reason
from ..hub.model_card import model_card
from ..hub.model_preprocessing import processor_of
from ..hub.upload import upload_errors, weight_bytes
from ..hub_access import hub_id
from ..reporting.html_report import html_report
from ..reporting.tables import plot_learning_curve
from ..reporting.training_record import TrainingRecord


logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "training_args.json"
NOT_UPLOADED = ["_*", "checkpoint-*"]
# What a reader of the card wants to know; all arguments are in ARGUMENTS_FILE.
CARD_ARGUMENTS = (
    "objective",
    "temperature",
    "learning_rate",
    "quantizer_learning_rate",
    "calibration_images",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "seed",
    "bf16",
    "fp16",
    "reestimate_batch_norm",
    "freeze_batch_norm",
    "oscillation_dampening",
    "oscillation_freezing",
    "delta_estimation_steps",
)


def save_arguments(args: Any, folder: str) -> None:
    """Write the training arguments as JSON, which hides tokens, in the place of Trainer's pickle, which has them."""
    if os.path.exists(pickled := os.path.join(folder, "training_args.bin")):
        os.remove(pickled)
    with open(os.path.join(folder, ARGUMENTS_FILE), "w", encoding="utf-8") as file:
        file.write(args.to_json_string())


def save_student(
    model: PreTrainedModel, processor: Any, folder: str, format: str, state_dict: dict[str, torch.Tensor] | None
) -> None:
    """Save a transformers student and its image processor: `"packed"` codes for others, `"latent"` to go on from.

    Args:
        model (`PreTrainedModel`): The student.
        processor (`ImageProcessor`, *optional*): By default the one that goes with the model, beside packed codes.
        folder (`str`): Where to.
        format (`str`): `"packed"` or `"latent"`.
        state_dict (`dict`, *optional*): The whole state where it is spread over processes.
    """
    with model.hf_quantizer.saving(format, state_dict):
        model.save_pretrained(folder)
    if processor is None and format == "packed":
        processor = processor_of(model)
    if processor is not None:
        processor.save_pretrained(folder)


def listed(names: str | Sequence[str] | None) -> list[str]:
    """Return one name, several or none as a list."""
    return [names] if isinstance(names, str) else list(names or ())


class Publisher:
    """Writes the card and the report of a trainer's student, and uploads its folder.

    Args:
        trainer (`SQAKDTrainer`): Whose student it is; its measurements and arguments go into the card.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._hub = HfApi()  # one: it uploads in the background one after the other

    def write_card(self, name: str, finetuned_from: str | None, with_labels: bool, **card: Any) -> None:
        """Write `README.md`, the report, the learning curve and the training record into the output folder.

        Args:
            name (`str`): Of the student, or its repository.
            finetuned_from (`str`, *optional*): Hub id of the full-precision model; by default the teacher's.
            with_labels (`bool`): Whether the training read labels.
            **card: What [`~sqakd_hf.hub.model_card.model_card`] takes besides.
        """
        trainer, model, folder = self._trainer, self._trainer.model, self._trainer.args.output_dir
        os.makedirs(folder, exist_ok=True)
        TrainingRecord(trainer.results, trainer.state.log_history, trainer.layer_sqnr).save(folder)
        record = TrainingRecord.load(folder)  # numbers alone
        curve = "learning_curve.png" if any("loss" in log for log in record.log_history) else None
        report = None if is_sharded(model) else "report.html"
        if report is not None:
            page = html_report(model, name, record)
            with open(os.path.join(folder, report), "w", encoding="utf-8") as file:
                file.write(page)
        if curve is not None:
            plot_learning_curve(record.log_history, os.path.join(folder, curve), name)
        teacher = getattr(trainer.teacher.models[0], "config", None)
        base = hub_id(getattr(teacher, "_name_or_path", None)) or model.hf_quantizer.base_model
        written = model_card(
            model,
            name,
            base_model=finetuned_from or base,
            results=trainer.results,
            training_arguments={name: getattr(trainer.args, name) for name in CARD_ARGUMENTS},
            stored_bytes=weight_bytes(folder) or None,
            learning_curve=curve,
            report=report,
            with_labels=with_labels,
            **card,
        )
        written.save(os.path.join(folder, "README.md"))

    def upload(self, **options: Any) -> CommitInfo | Future[CommitInfo]:
        """Upload the output folder; the options are those of `HfApi.upload_folder`.

        Raises:
            `UploadError`: The Hub refused, or the connection broke; the files stay where they are.
        """
        trainer = self._trainer
        with upload_errors(trainer.hub_model_id, f"All files are in {trainer.args.output_dir!r}"):
            upload = self._hub.upload_folder(
                repo_id=trainer.hub_model_id,
                folder_path=trainer.args.output_dir,
                ignore_patterns=NOT_UPLOADED,
                **options,
            )
        if options.get("run_as_future"):
            trainer.push_in_progress = PushInProgress([upload])
        return upload

    def upload_while_training(self, checkpoint: str) -> None:
        """Upload, in the background, the output folder and, where `hub_strategy` wants it, the `checkpoint` folder."""
        trainer = self._trainer
        args, state = trainer.args, trainer.state
        by_steps = args.save_strategy == SaveStrategy.STEPS
        message = f"Training in progress, {f'step {state.global_step}' if by_steps else f'epoch {int(state.epoch)}'}"
        upload = functools.partial(
            self._hub.upload_folder,
            repo_id=trainer.hub_model_id,
            token=args.hub_token,
            run_as_future=True,
            revision=args.hub_revision,
        )
        jobs = [upload(folder_path=args.output_dir, commit_message=message, ignore_patterns=NOT_UPLOADED)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            inside = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else os.path.basename(checkpoint)
            jobs.append(upload(folder_path=checkpoint, path_in_repo=inside, commit_message=f"{message}, checkpoint"))
        for job in jobs:
            job.add_done_callback(_warn_of_failure)
        trainer.push_in_progress = PushInProgress(jobs)


def _warn_of_failure(upload: Future) -> None:
    """Say it when an upload in the background failed: nobody asks for its result."""
    if not upload.cancelled() and (error := upload.exception()) is not None:
        logger.warning("An upload while training did not complete: %s. Training goes on.", reason(error))


def warn_of_harm(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Say it if the trained student is further from its teacher than it was, on the same images, before training."""
    before, after = rows.get("calibrated"), rows.get("student")
    if before and after and after["agreement"] < before["agreement"] and after["kl"] > before["kl"]:
        logger.warning(
            "Training did harm: the student agrees with its teacher on %.1f %% of these images, before its first "
            "step on %.1f %%. Where the training images are few or of another kind, keep the teacher's BatchNorm "
            "statistics (freeze_batch_norm=True) and lower learning_rate; held-out images and "
            "load_best_model_at_end=True keep the better student.",
            100 * after["agreement"],
            100 * before["agreement"],
        )
