"""What a training leaves behind: the saved student, its card and report, and their upload."""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from .._compat import is_sharded
from .._text import reason
from ..data.hub_access import hub_id
from ..hub.model_card import model_card
from ..hub.model_preprocessing import processor_of
from ..hub.upload import upload_errors, weight_bytes
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
    "channels_last",
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


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


class PublishingMixin:
    """The part of `SQAKDTrainer` that writes cards and uploads, with the signatures of Trainer's own."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload the packed student, its image processor and its card, as [`~transformers.Trainer.push_to_hub`] does.

        Raises:
            `UploadError`: The Hub refused, or the connection broke; the files stay in `args.output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            with upload_errors(self.args.hub_model_id or self.args.output_dir, "Nothing was changed on this side"):
                self.init_hf_repo(token=token, **({} if private is None else {"private": private}))
        self._finish_current_push()  # which reads the files that are written now
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [*_listed(kwargs.pop("tags", None)), *_listed(getattr(self.model, "model_tags", None))]
        kwargs.setdefault("model_name", self.hub_model_id.split("/")[-1])
        self.create_model_card(tags=list(dict.fromkeys(tags)), **kwargs)
        with upload_errors(self.hub_model_id, f"All files are in {self.args.output_dir!r}"):
            upload = self._hub.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=self.args.output_dir,
                commit_message=commit_message,
                token=token,
                run_as_future=not blocking,
                ignore_patterns=NOT_UPLOADED,
                revision=self.args.hub_revision if revision is None else revision,
            )
        if not blocking:
            self.push_in_progress = PushInProgress([upload])
        return upload

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the student's card, `README.md` in the output folder, and its report, with what this trainer measured.

        The report is `report.html`, see [`~sqakd_hf.reporting.html_report.html_report`]; `training_record.json` holds
        its numbers. A student that is sharded over processes gets none: `sqakd inspect --html` makes it of the saved
        one.

        The arguments are those of [`~transformers.Trainer.create_model_card`]; `tasks` and `dataset_args` follow from
        the model. A model that is not of transformers gets transformers' own card.
        """
        if not isinstance(self.model, PreTrainedModel):
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        if not self.is_world_process_zero():
            return
        folder = self.args.output_dir
        name = self.hub_model_id or model_name or os.path.basename(os.path.abspath(folder))
        os.makedirs(folder, exist_ok=True)
        TrainingRecord(self.results, self.state.log_history, self.layer_sqnr).save(folder)
        record = TrainingRecord.load(folder)  # numbers alone
        curve = "learning_curve.png" if any("loss" in log for log in record.log_history) else None
        report = None if is_sharded(self.model) else "report.html"
        if report is not None:
            page = html_report(self.model, name, record)
            with open(os.path.join(folder, report), "w", encoding="utf-8") as file:
                file.write(page)
        if curve is not None:
            plot_learning_curve(record.log_history, os.path.join(folder, curve), name)
        card = model_card(
            self.model,
            name,
            base_model=finetuned_from or self._base_model(),
            results=self.results,
            training_arguments=self._card_arguments(),
            datasets=_listed(dataset_tags),
            dataset_name=", ".join(_listed(dataset)) or None,
            license=license,
            language=language,
            tags=_listed(tags),
            stored_bytes=weight_bytes(folder) or None,
            learning_curve=curve,
            report=report,
            with_labels=any(extension.reads_labels for extension in self.extensions),
        )
        card.save(os.path.join(folder, "README.md"))

    def _card_arguments(self) -> dict[str, Any] | None:
        return {name: getattr(self.args, name) for name in CARD_ARGUMENTS} if self.state.global_step else None

    def _base_model(self) -> str | None:
        teacher = getattr(self.teacher.models[0], "config", None)
        return hub_id(getattr(teacher, "_name_or_path", None)) or self.model.hf_quantizer.base_model

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload while training: the packed student, and the checkpoint itself where `hub_strategy` wants it.

        Trainer's own copies the checkpoint's float latents, and a pickle with the token in it.
        """
        if self.args.hub_strategy == HubStrategy.END:
            return
        gathered = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None  # by all processes
        if not self.is_world_process_zero():
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()  # it reads the files that are written now
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._format = "packed"
        self._save(self.args.output_dir, gathered)
        self.create_model_card()
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {progress}"
        upload = functools.partial(
            self._hub.upload_folder,
            repo_id=self.hub_model_id,
            token=self.args.hub_token,
            run_as_future=True,
            revision=self.args.hub_revision,
        )
        jobs = [upload(folder_path=self.args.output_dir, commit_message=message, ignore_patterns=NOT_UPLOADED)]
        strategy = self.args.hub_strategy
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            inside = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else os.path.basename(checkpoint_folder)
            jobs.append(
                upload(folder_path=checkpoint_folder, path_in_repo=inside, commit_message=f"{message}, checkpoint")
            )
        for job in jobs:
            job.add_done_callback(_warn_of_failure)
        self.push_in_progress = PushInProgress(jobs)


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
