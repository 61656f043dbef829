"""EWGS's gradient scaling `delta`, estimated without labels from the curvature of the distillation loss."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .._compat import own_forward
from .._validation import check_integer
from ..conversion.calibration import batch_statistics
from ..conversion.student import device_of, quantizers
from ..conversion.trace import evaluating
from ..distillation.extensions import Extension, register_extension
from ..errors import InputError
from ..outputs.forward import predict
from ..quantization.functional import along, widest_float
from ..quantization.quantizers import FakeQuantizer


if TYPE_CHECKING:
    from ..distillation.training_args import SQAKDTrainingArguments

logger = logging.getLogger(__name__)


# Of a quantizer's range: small beside the step between few codes, large beside the rounding of float32 gradients.
_DIFFERENCE = 1e-2


def estimate_delta(
    model: nn.Module,
    loss: Callable[[Mapping[str, Any]], torch.Tensor],
    batches: Iterable[Mapping[str, Any]],
    *,
    max_draws: int = 50,
    tolerance: float = 1e-3,
    running_statistics: bool = False,
    seed: int = 0,
    disable_progress: bool = False,
) -> dict[FakeQuantizer, float]:
    """Return `max(0, Tr(H) / n / (3 std(g)))` for each quantizer of `model`, averaged over the batches.

    `g` is the gradient of the loss for the quantizer's `n` outputs in units of its range, `H` its Hessian. The trace
    is Hutchinson's estimate: random signs, for all quantizers at once, until each running mean changes by less than
    `tolerance` of itself. The rule of [EWGS](https://huggingface.co/papers/2104.00903), whose own loss needs labels.
    Products with the Hessian are central differences of gradients, so that no operation (fused attention has none)
    needs a second derivative.

    Args:
        model (`nn.Module`): Calibrated. BatchNorm keeps its running statistics; all but BatchNorm is in eval mode.
        loss (`Callable`): From a batch to its loss, by a forward pass of `model`.
        batches (`Iterable`): Batches, a few.
        max_draws (`int`, *optional*, defaults to 50): Draws for a batch at most.
        tolerance (`float`, *optional*, defaults to 1e-3): See above.
        running_statistics (`bool`, *optional*, defaults to `False`): Let BatchNorm normalise by these, as in a
            training that freezes them, instead of by the batch.
        seed (`int`, *optional*, defaults to 0): Of the draws.
        disable_progress (`bool`, *optional*, defaults to `False`): Show no progress bar.

    Raises:
        `InputError`: No batch.
    """
    sums: dict[FakeQuantizer, float] = {}
    count = 0
    norms = nullcontext() if running_statistics else batch_statistics(model)
    with evaluating(model), norms, tqdm(disable=disable_progress, leave=False) as bar:
        bar.set_description("Estimating delta")
        for batch in batches:
            # On the model's device: there are as many signs as there are weights and activations.
            generator = torch.Generator(device_of(model)).manual_seed(seed + count)
            found = _of_batch(model, loss, batch, max_draws, tolerance, generator, bar)
            sums = {quantizer: sums.get(quantizer, 0.0) + value for quantizer, value in found.items()}
            count += 1
    if not count:
        raise InputError("delta can't be estimated without images: got no batch.")
    return {quantizer: max(0.0, total / count) for quantizer, total in sums.items()}


class _Output:
    """Hook that makes a quantizer's output what the straight-through estimator takes it for, plus a perturbation.

    The first pass notes how far the codes lie from the input; later ones add that to the input, where it is not
    clipped. A perturbation thus travels as gradients say it does, instead of flipping codes further on.
    """

    def __init__(self, quantizer: FakeQuantizer):
        self.quantizer = quantizer
        # One of each for every call in a forward: a module may run several times.
        self.values: list[torch.Tensor] = []
        self.perturbations: list[torch.Tensor] = []
        self._bases: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.width = torch.empty(0)

    def __call__(self, quantizer: FakeQuantizer, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        x, call = args[0], len(self.values)
        if call == len(self._bases):
            grid = quantizer.grid()
            # Nothing lies before a weight.
            passes = (x >= grid.lower) & (x <= grid.upper) if quantizer.role == "activation" else torch.tensor(False)
            self._bases.append((passes, (output - x * passes).detach()))
            ends = (grid.scale * (quantizer.levels - 1)).detach()
            self.width = along(ends, x, quantizer.channel_axis)
        passes, offset = self._bases[call]
        value = x * passes + offset
        if self.perturbations:
            value = value + self.perturbations[call]
        self.values.append(value if value.requires_grad else value.requires_grad_())
        return self.values[-1]

    @property
    def size(self) -> int:
        """Elements of all calls."""
        return sum(value.numel() for value in self.values)


def _of_batch(
    model: nn.Module,
    loss: Callable[[Mapping[str, Any]], torch.Tensor],
    batch: Mapping[str, Any],
    max_draws: int,
    tolerance: float,
    generator: torch.Generator,
    bar: tqdm,
) -> dict[FakeQuantizer, float]:
    outputs = [_Output(quantizer) for quantizer in quantizers(model)]

    def gradients() -> list[list[torch.Tensor]]:
        """Return the gradients in units of the quantizers' ranges, zero where the loss does not depend on one."""
        for output in outputs:
            output.values.clear()
        with torch.enable_grad():
            value = loss(batch)
            every = [each for output in outputs for each in output.values]
            found = iter(torch.autograd.grad(value, every, allow_unused=True, materialize_grads=True))
        return [[output.width * next(found) for _ in output.values] for output in outputs]

    with ExitStack() as stack:
        for output in outputs:
            stack.callback(output.quantizer.register_forward_hook(output).remove)
        base = [gradient for gradient in gradients() if gradient]
        outputs = [output for output in outputs if output.values]  # those that ran
        spread = torch.stack([torch.cat([each.flatten() for each in gradient]).std() for gradient in base])
        traces = torch.zeros(len(outputs), dtype=widest_float(spread.device), device=spread.device)
        for draw in range(1, max_draws + 1):
            signs = [[_signs(value, generator) for value in output.values] for output in outputs]
            products = torch.zeros_like(traces)
            for side in (1, -1):
                for output, sign in zip(outputs, signs, strict=True):
                    output.perturbations = [side * _DIFFERENCE * output.width * each for each in sign]
                sums = [
                    sum((one * other).sum() for one, other in zip(sign, gradient, strict=True))
                    for sign, gradient in zip(signs, gradients(), strict=True)
                ]
                products += side * torch.stack(sums) / (2 * _DIFFERENCE)
            before, traces = traces, traces + (products - traces) / draw
            bar.update()
            if draw > 1 and bool(((traces - before).abs() <= tolerance * before.abs()).all()):
                break
    sizes = traces.new_tensor([output.size for output in outputs])
    deltas = traces / sizes / (3 * spread.clamp(min=torch.finfo(spread.dtype).tiny))
    return dict(zip((output.quantizer for output in outputs), deltas.tolist(), strict=True))


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.empty_like(like).bernoulli_(generator=generator).mul_(2).sub_(1)


@register_extension
class DeltaEstimation(Extension):
    """`delta_estimation_steps`: every so many steps, [`estimate_delta`] from three batches of training images."""

    option = "delta_estimation_steps"
    FILE = "deltas.json"  # of a checkpoint whose quantizers had theirs estimated

    @classmethod
    def check_arguments(cls, args: "SQAKDTrainingArguments") -> None:
        check_integer(args.delta_estimation_steps, "delta_estimation_steps", 0, "It is a number of steps; 0: never.")

    def _quantizers(self) -> dict[str, FakeQuantizer]:
        modules = self.trainer.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, FakeQuantizer)}

    def _set(self, deltas: Mapping[str, float]) -> None:
        for name, quantizer in self._quantizers().items():
            quantizer.delta = deltas.get(name, 0.0)

    def load(self, folder: str | None) -> None:
        """Go on from what a checkpoint's quantizers had; say it if that training did not estimate."""
        path = os.path.join(folder or "", self.FILE)
        if folder is None or not os.path.exists(path):
            if folder is not None:
                logger.warning(
                    "%s is of a training without delta_estimation_steps: delta is 0 until it is estimated.", folder
                )
            return self._set({})
        with open(path, encoding="utf-8") as file:
            self._set(json.load(file))

    @classmethod
    def leave(cls, folder: str) -> None:
        if os.path.exists(os.path.join(folder, cls.FILE)):
            logger.warning(
                "%s is of a training with delta_estimation_steps: without it, delta is the quantizers' own again.",
                folder,
            )

    def save(self, folder: str) -> None:
        deltas = {name: quantizer.delta for name, quantizer in self._quantizers().items()}
        with open(os.path.join(folder, self.FILE), "w", encoding="utf-8") as file:
            json.dump(deltas, file)

    def on_step_begin(self) -> None:
        step = self.trainer.state.global_step
        if step and step % self.trainer.args.delta_estimation_steps == 0:
            self._estimate()

    def _estimate(self) -> None:
        trainer = self.trainer

        def loss(inputs: Mapping[str, Any]) -> torch.Tensor:
            student = predict(trainer.model, inputs, trainer.args.output_field)
            return trainer.kl_loss(student, trainer.teacher_prediction(inputs), student.mask_of(inputs))

        batch = max(trainer.args.train_batch_size, 2)
        with own_forward(trainer.model):  # in float32: half precision is too coarse for second differences
            found = estimate_delta(
                trainer.model,
                loss,
                list(trainer.sample_images(3 * batch, batch)),
                running_statistics=trainer.args.freezes_batch_norm,
                disable_progress=trainer.args.disable_tqdm,
            )
        names = self._quantizers()
        values = torch.tensor([found.get(each, 0.0) for each in names.values()], device=trainer.args.device)
        if trainer.args.world_size > 1:  # sums may differ between devices
            torch.distributed.broadcast(values, src=0)
        self._set(dict(zip(names, values.tolist(), strict=True)))
