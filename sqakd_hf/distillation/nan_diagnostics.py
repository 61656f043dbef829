"""Where a training that met NaN or infinity went wrong: the first layer, and what of it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import Trainer

from .._compat import is_sharded
from ..conversion.student import quantized_layers, quantizers


class NonFiniteError(ArithmeticError):
    """The loss, a gradient or a parameter is no number any more; the message names the first one concerned."""


def first_non_finite_layer(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run `forward` and say which layer of `model` is the first to have a bad input, range or other parameter."""
    found: list[str] = []
    handles = [
        layer.register_forward_pre_hook(_Inspect(name, found), with_kwargs=True)
        for name, layer in quantized_layers(model).items()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "no layer and no input of one, but what the model makes of them, or the teacher"


def first_non_finite_gradient(model: nn.Module) -> str | None:
    """Name the parameter where the backward went wrong, `None` if all gradients are finite.

    The backward goes from the last layer to the first: of the bad ones, the last in the model's order is the first.
    """
    bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter.grad)]
    return f"the gradient of {bad[-1]!r}" if bad else None


def first_non_finite_parameter(model: nn.Module) -> str | None:
    """Name the first parameter or buffer, in the model's order, that is not finite; `None` if all are."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return next((repr(name) for name, tensor in tensors if not _is_finite(tensor)), None)


class FiniteWatch:
    """Stops a training at the first number that is not finite: it would take the place of the last good checkpoint.

    To look at a number on an accelerator is to wait for it: there, only logs, evaluations and checkpoints look.

    Args:
        trainer (`Trainer`): Whose model, arguments and state are looked at.
        forward (`Callable`): From a batch's inputs to anything, by a forward pass of the model.
    """

    def __init__(self, trainer: Trainer, forward: Callable[[dict[str, Any]], object]) -> None:
        self._trainer, self._forward = trainer, forward

    @property
    def looks_at_each_step(self) -> bool:
        """Whether each step looks at its loss and gradients."""
        return self._trainer.args.device.type == "cpu"

    def _stop(self, what: str, value: float, where: str) -> NoReturn:
        raise NonFiniteError(
            f"{what} is {value} at step {self._trainer.state.global_step}. First not finite: {where}. Lower "
            "learning_rate or quantizer_learning_rate, clip gradients (max_grad_norm), or train in float32 or bf16; "
            "checkpoints of earlier steps are as they were."
        )

    def check_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Stop, on a CPU, at a loss that is not finite, and name the layer."""
        if not self.looks_at_each_step or torch.isfinite(loss):
            return
        model, where = self._trainer.model, "not looked for in a model that is sharded"
        if not is_sharded(model):
            if self._trainer.args.world_size > 1:
                model.eval()  # SyncBatchNorm would wait for the other processes
            where = first_non_finite_layer(model, lambda: self._forward(inputs))
        self._stop("The loss", loss.item(), where)

    def check_gradients(self) -> None:
        """Stop, on a CPU, where a gradient is not finite."""
        model = self._trainer.model
        if not self.looks_at_each_step or is_sharded(model):
            return
        norm = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
        if not torch.isfinite(norm) and (where := first_non_finite_gradient(model)) is not None:
            self._stop("The gradient's norm", norm.item(), where)

    def check_logs(self, logs: Mapping[str, float]) -> None:
        """Stop at a logged loss or norm that is not finite: on an accelerator, this is the first look."""
        for name, what in (("loss", "The loss"), ("grad_norm", "The gradient's norm")):
            # In fp16 the scaler skips steps whose gradient overflows.
            scaled = name == "grad_norm" and self._trainer.accelerator.mixed_precision == "fp16"
            if not math.isfinite(logs.get(name, 0)) and not scaled:
                where = first_non_finite_parameter(self._trainer.model) or "no parameter, so it is new"
                self._stop(what, logs[name], f"{where} (some time since the last log)")

    def check_model(self) -> None:
        """Let no parameter that is not finite be evaluated or saved."""
        if (bad := first_non_finite_parameter(self._trainer.model)) is not None:
            raise NonFiniteError(
                f"The student's {bad} is not finite at step {self._trainer.state.global_step}: training met NaN or "
                "infinity since the last log. logging_steps=1 shows the step; the last checkpoint is from before."
            )


class _Inspect:
    """Note what of a layer is not finite when it runs: its input, a range, another parameter, in this order."""

    def __init__(self, name: str, found: list[str]):
        self.name, self.found = name, found

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not all(map(_is_finite, inputs)):
            self.found.append(f"the input of layer {self.name!r}")
        for quantizer in quantizers(layer):
            if not all(map(_is_finite, quantizer.range_tensors().values())):
                self.found.append(f"the range of the {quantizer.role} quantizer of layer {self.name!r}")
        if not all(map(_is_finite, layer.parameters())):
            self.found.append(f"a parameter of layer {self.name!r}")


def _is_finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
