"""Class distributions: which outputs are one, and where their classes lie."""

import torch

from ..errors import InputError


def no_distribution(found: str) -> InputError:
    """Return the error for an output that is no class distribution; `found` says what it is instead."""
    return InputError(
        f"{found}. Distillation compares class distributions by softmax: logits (B, K) of K >= 2 classes, "
        "(B, K, H, W) of pixels, or (B, Q, K) of queries with a class for 'no object'. Where a model has several such "
        "heads, output_field names the one to learn."
    )


def check_distribution(logits: torch.Tensor) -> None:
    """Raise `InputError` unless `logits` has two classes or more: of one, the softmax is 1 whatever the model says."""
    shape = tuple(logits.shape)
    if logits.dim() < 2 or shape[class_dim(logits)] < 2:
        raise no_distribution(f"An output of the shape {shape} has fewer than two classes")
    if not logits.is_floating_point():
        raise no_distribution(f"An output of {logits.dtype} holds no logits, but numbers that were made of them")


def class_dim(logits: torch.Tensor) -> int:
    """Return the dimension of the classes: the second, or the last of `(B, Q, K)`.

    Examples:
        >>> class_dim(torch.zeros(2, 10)), class_dim(torch.zeros(2, 10, 8, 8)), class_dim(torch.zeros(2, 100, 10))
        (1, 1, 2)
    """
    return 2 if logits.dim() == 3 else 1
