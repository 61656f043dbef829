"""Ctrl-C that ends training at the next step, with a checkpoint to resume from."""

import signal
import threading
from types import FrameType

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class InterruptCallback(TrainerCallback):
    """On the first Ctrl-C finish the step, save a checkpoint and stop; on the second stop at once.

    Of several processes any may get the signal, one or all: they stop together, a step after the first of them knows.
    Only acts in the main thread, where Python delivers signals, and only while training runs: until `on_train_end`,
    or [`close`], which `SQAKDTrainer` calls when `train` ends in an error. Around another trainer's `train` put
    `contextlib.closing(callback)`.

    Attributes:
        interrupted (`bool`): Whether training was ended by Ctrl-C, in all processes alike. The last checkpoint in the
            output folder is then the one to resume from.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._asked = False
        self._previous = None
        self._others: _Any | None = None

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def close(self) -> None:
        """Give Ctrl-C back to whoever had it before training began."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
        self._others = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.close()
        self.interrupted = self._asked = False
        if args.world_size > 1:
            self._others = _Any()
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request_stop)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.interrupted = self._asked if self._others is None else self._others.of_last_call(self._asked)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        others = self._others
        self.close()  # first: what is asked for later is not of this training
        self.interrupted = self._asked if others is None else others.of_this_call(self._asked)


class _Any:
    """Whether any process says yes, as all of them know it one call later.

    The answer travels between the hosts while they compute: to wait for that of the call before is to wait for no
    accelerator, and for no process that is less than a call behind.
    """

    def __init__(self) -> None:
        self._group = distributed.new_group(backend="gloo")
        self._answer = torch.zeros((), dtype=torch.int32)
        self._pending: distributed.Work | None = None

    def of_last_call(self, yes: bool) -> bool:
        """Say yes or no; return whether any process said yes in the last call, which all made."""
        if self._pending is not None:
            self._pending.wait()
        last, self._answer = bool(self._answer), torch.tensor(int(yes), dtype=torch.int32)
        self._pending = distributed.all_reduce(self._answer, distributed.ReduceOp.MAX, self._group, async_op=True)
        return last

    def of_this_call(self, yes: bool) -> bool:
        """Say yes or no for the last time; return whether any process said yes."""
        self.of_last_call(yes)
        self._pending.wait()
        distributed.destroy_process_group(self._group)
        return bool(self._answer)
