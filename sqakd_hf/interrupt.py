"""Ctrl-C that ends training at the next step, with a checkpoint to resume from."""

import signal
import threading
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class InterruptCallback(TrainerCallback):
    """On the first Ctrl-C finish the step, save a checkpoint and stop; on the second stop at once.

    Only acts in the main thread, where Python delivers signals, and only while training runs.

    Attributes:
        interrupted (`bool`): Whether training was ended by Ctrl-C. The last checkpoint in the output folder is then
            the one to resume from.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous = None

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.interrupted = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request_stop)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
