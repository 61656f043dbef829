"""What comes before a training: ranges from training images, and block-wise reconstruction."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..conversion.rollback import StudentState
from ..conversion.student import is_calibrated
from ..data.sampling import sample_batches
from ..errors import InputError
from ..reconstruction import Reconstruction, calibrate_model, reconstruct_model
from .processes import follow_first_process


logger = logging.getLogger(__name__)


class PreparingMixin:
    """The part of `SQAKDTrainer` that makes a student which a training can begin from."""

    def calibrate(self) -> None:
        """Set the student's ranges by [`calibrate_model`], from `args.calibration_images` of the training images.

        Where BatchNorm keeps the teacher's statistics (`freeze_batch_norm`), the teacher takes part: it is a trained
        network. Every process reads the same images and takes the ranges of the first.
        """
        if self.train_dataset is None:
            raise InputError("Calibration needs images: pass train_dataset, or call calibrate_model yourself.")
        self._move_model_to_device(self.model, self.args.device)
        teachers = self.teacher.models
        calibrate_model(
            self.model,
            list(self._sampled(self.args.calibration_images)),
            teacher=(teachers[0] if len(teachers) == 1 else teachers) if self.args.freezes_batch_norm else None,
            disable_progress=not self.is_world_process_zero(),
        )
        follow_first_process(self.model, self.args.world_size)
        self._stage = "calibrated"

    def reconstruct(
        self,
        *,
        steps: int = 100,
        time_budget: float | None = None,
        images: int = 512,
        checkpoint_dir: str | Path | None = None,
    ) -> Reconstruction | None:
        """Let each block of the student learn to put out what the teacher's does, by [`reconstruct_model`].

        A student without ranges is calibrated first. Where held-out images choose (`load_best_model_at_end`), the
        student is measured on them before and after, and stays as it was if it was better before.

        Args:
            steps (`int`, *optional*, defaults to 100): Updates of each block.
            time_budget (`float`, *optional*): Seconds, in the place of `steps`, see [`reconstruct_model`].
            images (`int`, *optional*, defaults to 512): So many of the training images, or all where there are less.
                Several processes share them.
            checkpoint_dir (`str` or `Path`, *optional*): A folder for finished blocks: an interrupted call goes on
                behind the last of them. On one process.

        Returns:
            `Reconstruction`: Each block's error before and after; `None` if the student stays as it was.
        """
        if self.train_dataset is None:
            raise InputError("Reconstruction needs images: pass train_dataset, or call reconstruct_model yourself.")
        self._move_model_to_device(self.model, self.args.device)
        if not is_calibrated(self.model):
            self.calibrate()
        before = self._stage = self._stage or "calibrated"
        value = Trainer.evaluate(self)[self.best.metric] if self.best.is_chosen else None
        state = StudentState(self.model)
        with self.accelerator.autocast():
            found = reconstruct_model(
                self.model,
                self.teacher.models[0] if len(self.teacher.models) == 1 else self.teacher.models,
                self._own_share(images),
                steps=steps,
                time_budget=time_budget,
                seed=self.args.seed,
                checkpoint_dir=checkpoint_dir,
                disable_progress=not self.is_world_process_zero(),
            )
        follow_first_process(self.model, self.args.world_size)
        self._stage = "reconstructed"
        if value is None:
            return found
        after = Trainer.evaluate(self)[self.best.metric]
        if after >= value if self.args.greater_is_better else after <= value:
            return found
        logger.warning(
            "Reconstruction did not help: %s on the held-out images was %.4g before and %.4g after. The student stays "
            "as it was %s.",
            self.best.metric,
            value,
            after,
            before,
        )
        state.restore()
        self._stage = before
        self.measurements.keep_stage(before)
        return None

    def sample_images(self, total: int, batch: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Yield prepared batches of `total` training images, see [`~sqakd_hf.data.sampling.sample_batches`].

        By default in batches of the training's size, of 32 at least.
        """
        return map(self._prepare_inputs, self._sampled(total, batch))

    def _sampled(self, total: int, batch: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        batch = batch or max(self.args.train_batch_size, 32)
        return sample_batches(self.train_dataset, self.data_collator, total, batch, self.args.seed)

    def _own_share(self, total: int) -> list[dict[str, Any]]:
        """Return this process's part of `total` images, as many as every other process has."""
        rank, world = self.args.process_index, self.args.world_size
        batches = []
        for batch in self._sampled(total):
            share = len(batch["pixel_values"]) // world
            batches.append({name: rows[rank * share : (rank + 1) * share] for name, rows in batch.items()})
        return batches
