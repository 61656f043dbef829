"""What a trainer knows of its student: on which images it was measured, as what, and how far its layers are off."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from .._compat import is_sharded
from ..conversion.student import is_calibrated
from ..errors import InputError
from .layer_sqnr import layer_sqnr
from .publishing import warn_of_harm


class MeasuringMixin:
    """The part of `SQAKDTrainer` around its evaluations; the evaluation itself is `evaluation_loop`."""

    @property
    def kept_untrained(self) -> bool:
        """Whether training ended with the student as it was before its first step, which no later one surpassed."""
        return self.best.is_untrained

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """What was measured on the images evaluated last: teacher, student, and the student at its stages before."""
        return self.measurements.last.rows if self.measurements.last else {}

    @property
    def _step_of_student(self) -> int | None:
        """The step of the training that the student is of, 0 before the first; `None` where nothing was trained."""
        if not self.is_in_train and self.best.step is not None:
            return self.best.step
        return self.state.global_step if self.is_in_train or self.state.global_step or self._stage else None

    @property
    def _measured_as(self) -> str:
        """What the student is: before its first step its stage, such as `"calibrated"`, else a trained `"student"`."""
        before = self._stage or ("calibrated" if self.is_in_train else None)
        return before if before and self.state.global_step == 0 else "student"

    @property
    def _stage_of_student(self) -> str:
        """What the student is, also where a training ended with what it began from."""
        if self._measured_as != "student":
            return self._measured_as
        return self._stage or "calibrated" if not self.is_in_train and self.best.is_untrained else "trained"

    def measure_layers(self, images: int = 64) -> dict[str, float]:
        """Return how far each layer's output is from the teacher's, in dB, and keep it for the report.

        See [`~sqakd_hf.distillation.layer_sqnr.layer_sqnr`]. It is empty where the teacher is of another
        architecture, where there are several, and for a student that is sharded over processes. Images are the same
        each time, also as they are augmented, and training's random numbers stay what they are.

        Args:
            images (`int`, *optional*, defaults to 64): So many of the training images, at least 2.
        """
        if not is_calibrated(self.model):
            raise InputError("The student has no ranges yet. Call trainer.calibrate() or trainer.train() first.")
        if self.train_dataset is None:
            raise InputError("Layers are measured on training images: pass train_dataset.")
        if images < 2:
            raise InputError(f"images must be at least 2, got {images!r}.")
        if len(self.teacher.models) > 1 or is_sharded(self.model):
            return {}
        self._move_model_to_device(self.model, self.args.device)
        teacher = self.teacher.models[0]
        if any(parameter.dtype != torch.float32 for parameter in teacher.parameters()):
            teacher = copy.deepcopy(teacher).float()
        self.layer_sqnr[self._measured_as] = layer_sqnr(self.model, teacher, self.sample_images(images))
        return self.layer_sqnr[self._measured_as]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the student, see the class; warn of a trained one that was better before its first step."""
        metrics = super().evaluate(*args, **kwargs)
        if not self.is_in_train and self._measured_as == "student" and self.is_world_process_zero():
            warn_of_harm(self.results)
        return metrics

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the loader of all images: `dataloader_drop_last` is of the training."""
        with self._last_batch_kept():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the loader of all images: `dataloader_drop_last` is of the training."""
        with self._last_batch_kept():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _last_batch_kept(self) -> Iterator[None]:
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops
