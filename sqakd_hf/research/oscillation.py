"""Weights that flip between two codes from step to step: a term that holds them in one, and a way to stop them.

Both are of [Overcoming Oscillations in Quantization-Aware Training](https://arxiv.org/abs/2203.11086).
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from ..conversion.student import quantized_layers
from ..distillation.extensions import Extension, register_extension
from ..errors import InputError
from ..layers.quantized_layer import QuantizedLayer
from ..outputs.forward import Prediction
from ..quantization.quantizers import FEW_BITS, FakeQuantizer


if TYPE_CHECKING:
    from ..distillation.trainer import SQAKDTrainer
    from ..distillation.training_args import SQAKDTrainingArguments

logger = logging.getLogger(__name__)


def dampening_loss(layers: Iterable[QuantizedLayer]) -> torch.Tensor:
    """Return the summed squared distance of the weights from their quantized values, up to the last value.

    Its gradient pulls a weight to the value it is rounded to, away from the threshold where it would flip. It does not
    reach the ranges.
    """
    total = 0.0
    for layer in layers:
        quantizer = layer.weight_quantizer
        weight = quantizer.transform(layer.float_weight())
        with torch.no_grad():
            codes = quantizer.quantize(layer.float_weight())
            values = quantizer.dequantize(codes)
            # Beyond the last value there is no threshold to stay away from.
            first, last = (quantizer.dequantize(torch.full_like(codes, code)) for code in (0, quantizer.levels - 1))
            between = (weight > first) & (weight < last)
        total = total + ((weight - values) * between).square().sum()
    return total


def ramp(step: float, steps: float) -> float:
    """Return the share of the way at a step: half a cosine from 0 to 1, as weights settle late.

    Examples:
        >>> ramp(0, 10), ramp(5, 10), ramp(10, 10)
        (0.0, 0.5, 1.0)
    """
    return round((1 - math.cos(math.pi * min(step / max(steps, 1), 1))) / 2, 12)


class OscillationFreezer:
    """Holds weights that oscillate at the code where they are most of the time, for the rest of the training.

    A weight oscillates when its code changes against the direction of its last change. The share of such steps is a
    running average; a weight for which it exceeds the threshold is frozen. Layers with weights of more than 4 bits are
    left alone: there codes change with almost every step, and nothing is lost by it.

    Args:
        layers (`Mapping[str, QuantizedLayer]`): Layers by name.
        threshold (`float`): The share of steps at the end of the training; four times that at its beginning, and half
            a cosine between them.
        momentum (`float`, *optional*, defaults to 0.01): What one step weighs in the averages of flips and of codes.

    Raises:
        `InputError`: No layer with weights of up to 4 bits, or one whose weights are not what is rounded (by DoReFa,
            PACT or StatsQ, in standardized layers): there no weight can be held where it is while others move.
    """

    # Tensors of each layer, by name.
    STATE = ("codes", "directions", "frequencies", "averages", "frozen")

    def __init__(self, layers: Mapping[str, QuantizedLayer], threshold: float, momentum: float = 0.01) -> None:
        self.layers = {name: layer for name, layer in layers.items() if layer.weight_quantizer.bits <= FEW_BITS}
        if not self.layers:
            raise InputError(f"oscillation_freezing: no layer of the student has weights of up to {FEW_BITS} bits.")
        for name, layer in self.layers.items():
            quantizer = layer.weight_quantizer
            moves = any(
                getattr(type(quantizer), method) is not getattr(FakeQuantizer, method)
                for method in ("transform", "latent")
            )
            if moves or layer.float_weight() is not layer.stored_weight:
                raise InputError(
                    f"oscillation_freezing: the values of layer {name!r} depend on all of its weights, so that none "
                    "can be held. Use the quantizers lsq, lsq+ or ewgs, or oscillation_dampening."
                )
        self.threshold = threshold
        self.momentum = momentum
        self._state: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Look at the codes after a step of the optimizer, at `progress` from 0 to 1; put frozen weights back."""
        threshold = self.threshold * (4 - 3 * ramp(progress, 1))
        for name, layer in self.layers.items():
            quantizer, weight = layer.weight_quantizer, layer.stored_weight
            codes = quantizer.quantize(weight)
            if name not in self._state:
                self._state[name] = {
                    "codes": codes,
                    "directions": torch.zeros_like(codes, dtype=torch.int8),
                    "frequencies": torch.zeros_like(codes, dtype=torch.float32),
                    "averages": codes.float(),
                    "frozen": torch.zeros_like(codes, dtype=torch.bool),
                }
            state = self._state[name]
            frozen = state["frozen"]
            change = torch.sign(codes.short() - state["codes"].short()).to(torch.int8)
            flips = (change * state["directions"]) < 0
            state["directions"] = torch.where(change != 0, change, state["directions"])
            state["frequencies"].lerp_(flips.float(), self.momentum)
            # The average of a frozen weight stays, and with it the code where it is held.
            state["averages"] = torch.where(
                frozen, state["averages"], state["averages"].lerp(codes.float(), self.momentum)
            )
            frozen |= state["frequencies"] > threshold
            held = state["averages"].round().to(torch.uint8)
            state["codes"] = torch.where(frozen, held, codes)
            weight.copy_(torch.where(frozen, quantizer.dequantize(held).to(weight.dtype), weight))

    def frozen_share(self) -> float:
        """Return the share of the weights that is frozen."""
        frozen = [state["frozen"] for state in self._state.values()]
        return sum(int(mask.sum()) for mask in frozen) / max(sum(mask.numel() for mask in frozen), 1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all tensors by `layer.tensor`, to be kept in a checkpoint."""
        return {
            f"{name}.{key}": value.contiguous() for name, state in self._state.items() for key, value in state.items()
        }

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what [`state_dict`] returned; `InputError` if that was of other layers."""
        if missing := [name for name in self.layers if any(f"{name}.{key}" not in tensors for key in self.STATE)]:
            raise InputError(
                f"The checkpoint does not tell which weights of {', '.join(missing[:3])} are frozen: it is of another "
                "student, or of other bits."
            )
        device = {name: layer.stored_weight.device for name, layer in self.layers.items()}
        self._state = {
            name: {key: tensors[f"{name}.{key}"].to(device[name], copy=True) for key in self.STATE}
            for name in self.layers
        }


@register_extension
class Dampening(Extension):
    """`oscillation_dampening`: adds [`dampening_loss`], with a weight that grows over the training."""

    option = "oscillation_dampening"

    @classmethod
    def check_arguments(cls, args: "SQAKDTrainingArguments") -> None:
        if not 0 <= args.oscillation_dampening < math.inf:
            raise InputError(
                f"oscillation_dampening must be a non-negative number, got {args.oscillation_dampening!r}."
            )

    def loss(self, loss: torch.Tensor, student: Prediction, inputs: Mapping[str, Any]) -> torch.Tensor:
        if not self.trainer.model.training:
            return loss
        state = self.trainer.state
        weight = self.trainer.args.oscillation_dampening * ramp(state.global_step, state.max_steps)
        return loss + weight * dampening_loss(quantized_layers(self.trainer.model).values())


@register_extension
class Freezing(Extension):
    """`oscillation_freezing`: an [`OscillationFreezer`] that looks after each optimizer step."""

    option = "oscillation_freezing"
    FILE = "oscillations.safetensors"  # of a checkpoint

    def __init__(self, trainer: "SQAKDTrainer") -> None:
        super().__init__(trainer)
        self.freezer = OscillationFreezer(quantized_layers(trainer.model), trainer.args.oscillation_freezing)

    @classmethod
    def check_arguments(cls, args: "SQAKDTrainingArguments") -> None:
        if not 0 <= args.oscillation_freezing < 1:
            raise InputError(
                f"oscillation_freezing must be a share of the steps, from 0 to 1, got {args.oscillation_freezing!r}."
            )

    def load(self, folder: str | None) -> None:
        if folder is None:
            return
        path = os.path.join(folder, self.FILE)
        if os.path.exists(path):
            self.freezer.load_state_dict(safetensors.torch.load_file(path))
        else:
            logger.warning("%s is of a training without oscillation_freezing: no weight is frozen yet.", folder)

    def save(self, folder: str) -> None:
        safetensors.torch.save_file(self.freezer.state_dict(), os.path.join(folder, self.FILE))

    def on_optimizer_step(self, progress: float) -> None:
        self.freezer.step(progress)

    def logs(self) -> dict[str, float]:
        return {"frozen": round(self.freezer.frozen_share(), 4)}
