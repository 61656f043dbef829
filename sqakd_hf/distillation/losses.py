"""The loss of SQAKD: the divergence of the student's class distribution from its teacher's. No label, no weight."""

import math

import torch
from torch.nn import functional as F

from ..errors import InputError
from ..outputs.distributions import check_distribution, class_dim


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 4.0,
    reduction: str = "mean",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `T² · KL(softmax(teacher / T) ‖ softmax(student / T))`, computed in float32 or wider.

    The one loss of [SQAKD](https://arxiv.org/abs/2403.11106). No gradient flows to the teacher's logits.

    Args:
        student_logits (`torch.Tensor`): `(B, K)`, or at many positions: `(B, K, H, W)` per pixel, `(B, Q, K)` per
            query or token.
        teacher_logits (`torch.Tensor`): The same shape.
        temperature (`float`, *optional*, defaults to 4.0): `T`, positive.
        reduction (`str`, *optional*, defaults to `"mean"`): `"none"` for one value an image, `(B,)`, the mean over
            its own valid positions, or `"mean"`, the mean of these: a batch of 8 has the mean loss of two of 4.
        mask (`torch.Tensor`, *optional*): Boolean, the shape of the logits without their class dimension: `False`
            leaves a position out. An image without any valid position has the loss 0, which `"mean"` counts.

    Raises:
        `InputError`: Shapes that differ, a single class, a temperature that is not positive, an unknown reduction.

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
    shapes = student_logits.shape, teacher_logits.shape
    if student_logits.dim() < 2 or student_logits.dim() != teacher_logits.dim():
        raise InputError(
            "Student and teacher logits must both be (batch, classes), (batch, classes, height, width) or (batch, "
            f"queries, classes), got {tuple(shapes[0])} and {tuple(shapes[1])}."
        )
    dim = class_dim(student_logits)
    check_same_classes(shapes[0][dim], shapes[1][dim])
    if shapes[0] != shapes[1]:
        raise InputError(
            f"Student and teacher logits must have the same shape, got {tuple(shapes[0])} and {tuple(shapes[1])}."
        )
    check_distribution(student_logits)
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(wide) / temperature, dim=dim)
    teacher = F.log_softmax(teacher_logits.detach().to(wide) / temperature, dim=dim)
    divergence = temperature**2 * (teacher.exp() * (teacher - student)).sum(dim)
    return masked_mean(divergence, mask, reduction)


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None, reduction: str) -> torch.Tensor:
    """Return each image's mean of `(B, ...)` over the positions where `mask` is true (`"none"`), or their `"mean"`."""
    values = values.flatten(1) if values.dim() > 1 else values[:, None]
    if mask is None:
        return values.mean() if reduction == "mean" else values.mean(1)
    mask = mask.to(values.dtype).reshape(values.shape)
    each = (values * mask).sum(1) / mask.sum(1).clamp(min=1)
    return each.mean() if reduction == "mean" else each


def box_loss(
    student_boxes: torch.Tensor, teacher_boxes: torch.Tensor, teacher_logits: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Return the L1 distance of the student's boxes from the teacher's, for detectors that predict by query.

    A query that sees no object has no box: an image's queries count by the teacher's probability that there is one
    (its last class is "no object", as in [DETR](https://huggingface.co/papers/2005.12872)).

    Args:
        student_boxes, teacher_boxes (`torch.Tensor`): `(B, Q, 4)`, in shares of the image's sides.
        teacher_logits (`torch.Tensor`): `(B, Q, K + 1)`.
        reduction (`str`, *optional*, defaults to `"mean"`): As in [`distillation_loss`].
    """
    is_object = 1 - teacher_logits.detach().float().softmax(-1)[..., -1]
    distance = (student_boxes.float() - teacher_boxes.detach().float()).abs().sum(-1) * is_object
    each = distance.sum(1) / is_object.sum(1).clamp(min=1e-6)
    return each.mean() if reduction == "mean" else each


def mean_teacher_logits(logits: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """Return logits whose distribution at `temperature` is the mean of those of several teachers.

    Examples:
        >>> both = mean_teacher_logits([torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 9.0]])], 4.0)
        >>> both.softmax(1)
        tensor([[0.5000, 0.5000]])
    """
    if len(logits) == 1:
        return logits[0]
    for other in logits[1:]:
        if other.shape != logits[0].shape:
            raise InputError(
                f"The teachers must give logits of one shape, got {[tuple(each.shape) for each in logits]}."
            )
    dim = class_dim(logits[0])
    each = torch.stack([F.log_softmax(one.float() / temperature, dim=dim) for one in logits])
    return temperature * (each.logsumexp(0) - math.log(len(logits)))


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
