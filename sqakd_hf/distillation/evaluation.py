"""The sums of an evaluation: exact means over the images, whatever the batch size and the number of processes."""

from typing import Any

import torch
from accelerate import Accelerator

from ..outputs.forward import Prediction
from ..quantization.functional import widest_float
from .losses import distillation_loss, masked_mean


def agreement(student: Prediction, teacher: Prediction, mask: torch.Tensor | None) -> torch.Tensor:
    """Return for each image, `(B,)`, the share of its positions where both name the same class."""
    return masked_mean((student.classes() == teacher.classes()).float(), mask, "none")


class RunningMean:
    """A mean whose sum stays on its device until it is asked for: adding never waits for an accelerator."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count: torch.Tensor | int = 0

    def __bool__(self) -> bool:
        return bool(self.count > 0)

    def add(self, value: torch.Tensor, count: torch.Tensor | int = 1) -> None:
        """Add the sum `value` of `count` images."""
        self.total = self.total + value.detach()
        self.count += count

    def pop_sums(self) -> tuple[float, int]:
        """Return the sum and the number of images, and begin anew."""
        sums = float(self.total), int(self.count)
        self.total, self.count = 0.0, 0
        return sums

    def pop(self) -> float:
        """Return the mean, and begin anew."""
        total, count = self.pop_sums()
        return total / count


class EvaluationSums:
    """Sums over the images of one evaluation, of all processes: loss, KL divergence, agreement and accuracies.

    The KL divergence is at temperature 1, whatever the loss is at.

    Args:
        accelerator (`Accelerator`): Gathers what the processes found.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._means: dict[str, RunningMean] = {}

    def add(
        self,
        loss: torch.Tensor,
        student: Prediction,
        teacher: Prediction,
        mask: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> None:
        """Add a batch: each image's loss `(B,)`, what both models say of it, its valid positions and its label."""
        counts = student.counted(mask)
        divergence = distillation_loss(student.logits, teacher.logits, 1.0, "none", mask)
        values = {
            "loss": (loss, counts),
            "kl": (divergence, counts),
            "agreement": (agreement(student, teacher, mask), counts),
        }
        # Of a batch without labels as well: another process may have one with.
        nothing = torch.zeros_like(loss), torch.zeros_like(counts)
        for name, prediction in (("accuracy", student), ("teacher_accuracy", teacher)):
            values[name] = (None if labels is None else prediction.hits(labels)) or nothing
        for name, (value, counts) in values.items():
            # Drops the images that fill up the last batch of a distributed loader.
            value, counts = self._accelerator.gather_for_metrics((value.to(widest_float(value.device)), counts))
            self._means.setdefault(name, RunningMean()).add((value * counts).sum(), counts.sum())

    def means(self) -> dict[str, Any]:
        """Return the mean of each metric that any image had."""
        means = {name: mean.pop() for name, mean in self._means.items() if mean}
        if "kl" in means:
            means["kl"] = max(means["kl"], 0.0)  # which rounding can miss where both models are alike
        return means
