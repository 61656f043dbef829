"""The choice of the best student by held-out images; the one before the first step takes part in it."""

import logging
from typing import TYPE_CHECKING

from transformers import Trainer

from .._compat import add_candidate
from ..conversion.calibration import reestimate_batch_norm
from ..conversion.student import batch_norms


if TYPE_CHECKING:
    from .trainer import SQAKDTrainer

logger = logging.getLogger(__name__)


class BestStudent:
    """Which student a training ends with, where `load_best_model_at_end` and held-out images choose one.

    Args:
        trainer (`SQAKDTrainer`): Whose training it is.
    """

    def __init__(self, trainer: "SQAKDTrainer") -> None:
        self._trainer = trainer

    @property
    def is_chosen(self) -> bool:
        """Whether held-out images choose."""
        return self._trainer.args.load_best_model_at_end and self._trainer.eval_dataset is not None

    @property
    def step(self) -> int | None:
        """The step of the training that the best student so far is of, 0 before the first; `None` without a choice."""
        return self._trainer.state.best_global_step if self.is_chosen else None

    @property
    def is_untrained(self) -> bool:
        """Whether it is the student as it was before the first step, which no later one surpassed."""
        return self.step == 0

    @property
    def metric(self) -> str:
        """The metric that chooses, such as `"eval_loss"`."""
        return f"eval_{self._trainer.args.metric_for_best_model.removeprefix('eval_')}"

    def warn_if_not_chosen(self) -> None:
        """Say it where the trained student will be kept whatever it lost."""
        if not self.is_chosen:
            logger.warning(
                "No held-out images compare the trained student with the calibrated one: the trained one is kept, "
                "whatever it lost. Pass eval_dataset, load_best_model_at_end=True, eval_strategy and save_strategy."
            )

    def before_training(self) -> None:
        """Evaluate and save the student before its first step, which takes part in the choice."""
        state = self._trainer.state
        if self.is_chosen and state.global_step == 0 and state.best_model_checkpoint is None:
            add_candidate(self._trainer, self._trainer._trial)

    def after_training(self) -> None:
        """Note which student was kept; replace its BatchNorm statistics if `reestimate_batch_norm` asks for it."""
        if self.step is not None:
            self._note_kept()
            if self.is_untrained:
                logger.warning(
                    "Training did not help: by %s on the held-out images no step of it was better than the student "
                    "before its first step, which is kept.",
                    self.metric,
                )
        if self._trainer.args.reestimate_batch_norm:
            self._reestimate_batch_norm()

    def _reestimate_batch_norm(self) -> None:
        """Replace BatchNorm's statistics by those of training images, unless held-out images say that it does harm."""
        trainer = self._trainer
        norms = batch_norms(trainer.model)
        before = [{name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)} for module in norms]
        images = trainer.sample_images(trainer.args.reestimate_batch_norm)
        reestimate_batch_norm(trainer.model, images, disable_progress=not trainer.is_world_process_zero())
        if not self.is_chosen:
            return
        best = trainer.state.best_metric
        value = Trainer.evaluate(trainer)[self.metric]  # which does not warn of a harm that is undone below
        if value >= best if trainer.args.greater_is_better else value <= best:
            trainer.state.best_metric = value
            return
        logger.warning(
            "New BatchNorm statistics made the student worse on the held-out images (%s %.4g instead of %.4g): it "
            "keeps those of its training. reestimate_batch_norm=0 does not try.",
            self.metric,
            value,
            best,
        )
        for module, buffers in zip(norms, before, strict=True):
            for key, buffer in module.named_buffers(recurse=False):
                buffer.copy_(buffers[key])
        self._note_kept()

    def _note_kept(self) -> None:
        """Show what was measured of the student that is kept."""
        trainer = self._trainer
        if self.is_untrained:
            trainer.measurements.keep_stage(trainer._stage or "calibrated", step=0)
        else:
            trainer.measurements.keep_step(self.step)
