"""The moments of a training, passed on to the trainer's own parts."""

from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .training_images import TrainingImages


if TYPE_CHECKING:
    from .trainer import SQAKDTrainer


class StepCallback(TrainerCallback):
    """Tells the trainer and its extensions that a training, an epoch or a step begins, and that a step was made.

    Args:
        trainer (`SQAKDTrainer`): Whose callback it is.
        images (`TrainingImages`): Those that it trains on.
    """

    def __init__(self, trainer: "SQAKDTrainer", images: TrainingImages) -> None:
        self._trainer, self._images = trainer, images

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.best.before_training()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._images.begin_epoch(int(state.epoch))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        for extension in self._trainer.extensions:
            extension.on_step_begin()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        for extension in self._trainer.extensions:
            extension.on_optimizer_step((state.global_step + 1) / state.max_steps)


class StopWithoutGain(TrainerCallback):
    """Ends a training after some evaluations in a row that were not better than the best before them.

    What it decides by is the log alone, so that a resumed training ends where the uninterrupted one does; the counter
    of transformers' `EarlyStoppingCallback` begins anew.

    Args:
        patience (`int`): So many evaluations.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        values = [log[metric] for log in state.log_history if metric in log]
        if values:
            best = values.index(max(values) if args.greater_is_better else min(values))
            if len(values) - 1 - best >= self.patience:
                control.should_training_stop = True
