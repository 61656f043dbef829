"""The images of a training as they are trained on: with cached logits, without end, or drawn again as they were."""

from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_utils import has_length

from ..data.reproducible import RepeatableImages
from ..data.stream import EndlessStream
from ..errors import InputError
from .teacher_cache import cache_teacher_logits


if TYPE_CHECKING:
    from .trainer import SQAKDTrainer


class TrainingImages:
    """Prepares the training dataset of a trainer, for one training.

    Args:
        trainer (`SQAKDTrainer`): Whose dataset it is.
    """

    def __init__(self, trainer: "SQAKDTrainer") -> None:
        self._trainer = trainer
        self._repeatable: RepeatableImages | None = None

    def as_trained(self, images: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Let images bring their teacher's logits if `cache_teacher_logits` says so, and let streams never end.

        What is augmented at random draws numbers that a resumed run draws as well.
        """
        trainer, args = self._trainer, self._trainer.args
        self._repeatable = None
        if args.cache_teacher_logits is not None:
            return cache_teacher_logits(
                images,
                args.cache_teacher_logits,
                self._logits,
                f"{trainer.teacher.fingerprint()} T={args.temperature} {args.output_field}",
                trainer.data_collator,
                args.per_device_eval_batch_size,
                args.dataloader_num_workers,
                computes=trainer.is_local_process_zero(),
                disable_progress=args.disable_tqdm or not trainer.is_world_process_zero(),
            )
        if isinstance(images, IterableDataset):
            return images if has_length(images) else EndlessStream(images, args.seed)
        self._repeatable = RepeatableImages(images, args.seed)
        return self._repeatable

    def begin_epoch(self, epoch: int) -> None:
        """Let images that are augmented at random draw the numbers of this epoch."""
        if self._repeatable is not None:
            self._repeatable.begin_epoch(epoch)

    def _logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        prediction = self._trainer.teacher_prediction(self._trainer._prepare_inputs(batch))
        if prediction.boxes is not None:
            raise InputError("cache_teacher_logits keeps class logits alone: a detector's teacher has boxes as well.")
        return prediction.logits
