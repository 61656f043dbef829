"""Metrics as `evaluate.Metric`s that need no network. Two of them need no label either."""

import datasets
import evaluate
import numpy as np
import torch

from .._validation import is_integer
from ..errors import InputError
from ..outputs.distributions import check_distribution
from .losses import distillation_loss


_CITATION = "Zhao and Zhao. Self-Supervised Quantization-Aware Knowledge Distillation. AISTATS 2024."
_LOGITS = datasets.Sequence(datasets.Value("float32"))


class TopKAccuracy(evaluate.Metric):
    """Share of images whose label is among the `k` largest logits.

    `compute(predictions=logits (N, K), references=labels (N,), k=1)` returns `{"top{k}_accuracy": float}`. A negative
    label, such as PyTorch's -100, is none: its image does not count.

    Examples:
        >>> TopKAccuracy().compute(predictions=[[0.1, 0.9], [0.8, 0.2]], references=[1, 1])
        {'top1_accuracy': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Top-k accuracy.", datasets.Value("int64"))

    def _compute(self, predictions: list, references: list, k: int = 1) -> dict[str, float]:
        logits = _distributions(predictions).numpy()
        if not is_integer(k, 1, logits.shape[1]):
            raise InputError(f"k must be an integer from 1 to the number of classes, {logits.shape[1]}, got {k!r}.")
        labels = np.asarray(references)
        if not (labels >= 0).any():
            raise InputError("No image has a label. Accuracy needs one, 0 or more, of some of them.")
        best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        return {f"top{k}_accuracy": float((best == labels[:, None]).any(1)[labels >= 0].mean())}


class TeacherAgreement(evaluate.Metric):
    """Share of images where student and teacher name the same class; needs no label.

    `compute(predictions=student logits (N, K), references=teacher logits (N, K))` returns `{"agreement": float}`.

    Examples:
        >>> TeacherAgreement().compute(predictions=[[0.1, 0.9], [0.8, 0.2]], references=[[0.0, 1.0], [0.0, 1.0]])
        {'agreement': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Top-1 agreement of a student with its teacher.", _LOGITS)

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        student, teacher = _distributions(predictions).numpy(), _distributions(references).numpy()
        return {"agreement": float((student.argmax(1) == teacher.argmax(1)).mean())}


class TeacherDivergence(evaluate.Metric):
    """Mean KL divergence of the student from its teacher, `KL(teacher ‖ student)`; needs no label.

    `compute(predictions=student logits (N, K), references=teacher logits (N, K), temperature=1.0)` returns
    `{"kl": float}`; at another temperature `T` it is [`distillation_loss`], `T²` times the divergence there.

    Examples:
        >>> TeacherDivergence().compute(predictions=[[0.0, 1.0]], references=[[0.0, 1.0]])
        {'kl': 0.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Kullback-Leibler divergence of a student from its teacher.", _LOGITS)

    def _compute(self, predictions: list, references: list, temperature: float = 1.0) -> dict[str, float]:
        student, teacher = _distributions(predictions), _distributions(references)
        return {"kl": distillation_loss(student, teacher, temperature).item()}


def _distributions(logits: list) -> torch.Tensor:
    logits = torch.as_tensor(np.asarray(logits))
    check_distribution(logits)
    return logits


def _info(description: str, references: object) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description="`predictions`: logits, one row an image.",
        features=datasets.Features({"predictions": _LOGITS, "references": references}),
    )
