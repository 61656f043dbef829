"""The loss of SQAKD: the divergence of the student's class distribution from its teacher's. No label, no weight."""

import torch
from torch.nn import functional as F

from .errors import InputError


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 4.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Return `T² · KL(softmax(teacher / T) ‖ softmax(student / T))`, computed in float32 or wider.

    The one loss of [SQAKD](https://arxiv.org/abs/2403.11106). No gradient flows to the teacher's logits.

    Args:
        student_logits (`torch.Tensor`): `(B, K)`.
        teacher_logits (`torch.Tensor`): `(B, K)`.
        temperature (`float`, *optional*, defaults to 4.0): `T`, positive.
        reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` over the batch, or `"none"` for one value an
            image, `(B,)`.

    Raises:
        `InputError`: Shapes that differ, a temperature that is not positive, an unknown reduction.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(distillation_loss(student, teacher, temperature=1.0).item(), 4)
        1.5232
        >>> distillation_loss(teacher, teacher).item()
        0.0
    """
    check_temperature(temperature)
    if reduction not in ("mean", "none"):
        raise InputError(f"reduction must be 'mean' or 'none', got {reduction!r}.")
    if student_logits.dim() != 2 or teacher_logits.dim() != 2 or student_logits.shape[0] != teacher_logits.shape[0]:
        raise InputError(
            "Student and teacher logits must both be (batch, classes), got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    check_same_classes(student_logits.shape[1], teacher_logits.shape[1])
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(wide) / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().to(wide) / temperature, dim=1)
    divergence = temperature**2 * (teacher.exp() * (teacher - student)).sum(1)
    return divergence.mean() if reduction == "mean" else divergence


def check_temperature(temperature: float) -> None:
    """Raise `InputError` unless `temperature` is a positive, finite number."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be a positive number, got {temperature!r}; the paper uses 4.")


def check_same_classes(student: int, teacher: int) -> None:
    """Raise `InputError` unless student and teacher have the same number of classes."""
    if student != teacher:
        raise InputError(
            f"The student has {student} classes but the teacher has {teacher}. Distillation compares the "
            "distributions class by class: use a teacher trained on the student's classes."
        )
