"""Searches for hyperparameters: each trial trains a student of its own."""

import operator
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.trainer_utils import BestRun

from ..errors import InputError
from ..hub.model_preprocessing import record_processor


class TrialsMixin:
    """The part of `SQAKDTrainer` that makes students by `model_init` and searches for hyperparameters."""

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new student of `model_init`, checked like one that the trainer is given."""
        model = super().call_model_init(trial)
        if model is self.model:
            raise InputError(
                "model_init returned the student that this trainer has already. Return a new one: "
                "copy.deepcopy(teacher), then quantize_model."
            )
        self._take_student(model)
        record_processor(model, getattr(self, "processing_class", None))
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """Set what a trial changes of the arguments, and get ready: the student is made, no checkpoint is loaded.

        `Trainer.train` calls it there, with and without a trial.
        """
        rate = self.args.quantizer_learning_rate
        follows = rate == self.args.learning_rate / 100
        super()._hp_search_setup(trial)
        if follows and self.args.quantizer_learning_rate == rate:
            self.args.quantizer_learning_rate = self.args.learning_rate / 100
        self._get_ready()

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Search as [`~transformers.Trainer.hyperparameter_search`] does; what is minimised is by default `eval_loss`.

        Trainer's own default is the sum of the other metrics, the agreement with the teacher among them.
        """
        if compute_objective is None and direction == "minimize":
            compute_objective = operator.itemgetter("eval_loss")
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, **kwargs)
