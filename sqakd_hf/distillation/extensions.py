"""Optional behaviour of a training, switched on by a training argument: one class each, registered by its module."""

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..outputs.forward import Prediction


if TYPE_CHECKING:
    from .trainer import SQAKDTrainer
    from .training_args import SQAKDTrainingArguments


class Extension:
    """What one training does beyond distillation. A subclass overrides the methods that it needs.

    The trainer makes one for each training whose arguments ask for it, in the order of registration.

    Args:
        trainer (`SQAKDTrainer`): Its student, teacher, arguments and state are there to be read.
    """

    option = ""  # the training argument that asks for it

    def __init__(self, trainer: "SQAKDTrainer") -> None:
        self.trainer = trainer

    def __str__(self) -> str:
        """How messages call it."""
        return self.option

    @property
    def needs_whole_weights(self) -> bool:
        """Whether it is refused where weights are sharded over processes."""
        return True

    @property
    def reads_labels(self) -> bool:
        """Whether its loss reads the labels of the images."""
        return False

    @classmethod
    def check_arguments(cls, args: "SQAKDTrainingArguments") -> None:
        """Raise `InputError` for a value of its arguments, or a combination of them, that is not accepted."""

    @classmethod
    def is_asked_for(cls, args: "SQAKDTrainingArguments") -> bool:
        """Tell whether these arguments ask for it."""
        return bool(getattr(args, cls.option))

    def check(self) -> None:
        """Raise `InputError`, before the first step, where student or teacher are not fit for it."""

    def load(self, folder: str | None) -> None:
        """Go on from the checkpoint in `folder`, or begin (`None`)."""

    @classmethod
    def leave(cls, folder: str) -> None:
        """Say what is lost if a checkpoint's training had this, and the one that goes on from it has not."""

    def save(self, folder: str) -> None:
        """Write into the checkpoint `folder`, which exists, what [`load`] reads. One process calls it."""

    def on_step_begin(self) -> None:
        """Act before an optimizer step's first batch."""

    def on_optimizer_step(self, progress: float) -> None:
        """Act after an optimizer step, at `progress` from 0 to 1."""

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Context around the forward passes of student and teacher and [`loss`]."""
        return contextlib.nullcontext()

    def loss(self, loss: torch.Tensor, student: Prediction, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the loss to minimise instead of `loss`, the KL divergence or what an extension made of it."""
        return loss

    def logs(self) -> dict[str, float]:
        """Return what is added to the training's logs."""
        return {}

    def close(self) -> None:
        """Let go of what it holds: the training has ended, well or not."""


_REGISTERED: list[type[Extension]] = []
Class = TypeVar("Class", bound=type[Extension])


def register_extension(cls: Class) -> Class:
    """Register a subclass of [`Extension`]: trainings whose arguments ask for it get one."""
    _REGISTERED.append(cls)
    return cls


def registered_extensions() -> tuple[type[Extension], ...]:
    """Return all registered classes, in the order of registration."""
    return tuple(_REGISTERED)


def requested_extensions(trainer: "SQAKDTrainer") -> list[Extension]:
    """Return one of each that the trainer's arguments ask for."""
    return [cls(trainer) for cls in _REGISTERED if cls.is_asked_for(trainer.args)]


def load_extensions(extensions: list[Extension], checkpoint: str | None) -> None:
    """Let a training's extensions go on from a checkpoint, or begin; those that it leaves out say what is lost."""
    for extension in extensions:
        extension.load(checkpoint)
    if checkpoint is not None:
        for cls in set(_REGISTERED) - set(map(type, extensions)):
            cls.leave(checkpoint)
